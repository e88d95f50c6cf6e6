"""The order of a study: select learning rates, write down what can be seen, report. And the time that is left."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from hf_nullspace.robustness.records import Records, versions
from hf_nullspace.training.config import NullspaceConfig
from study.analysis import power
from study.design import Measurement, Run, Study
from study.tasks import Runner, Task, run_of

NOISE_STEPS = 225
"""Gradient steps per round that are assumed of Algorithm 1 (measured from A = 3 on a ViT of 1.2 M parameters)."""
SPEED = 550.0
"""Forward passes of one image per second that are assumed until a task was timed."""
_VIEWS = {
    "madry": ("adversarial",),
    "trades": ("clean", "divergent"),
    "fast": ("clean", "fast"),
    "pyramid": ("clean", "pyramid"),
    "plain": ("clean", "again"),
}
_ATTACK_STEPS = {"madry": 10, "trades": 10, "pyramid": 5}
"""Where a run does not set them."""


@dataclass
class Schedule:
    """All tasks of a study in their order."""

    selection: list[Task]
    report: list[Task]
    """Before the selection is finished, with a learning rate from the grid's middle."""
    chosen: dict[str, float] | None
    """Learning rates; None while the selection is not finished."""


def schedule_of(study: Study, runner: Runner) -> Schedule:
    """The tasks; learning rates are chosen if the selection is finished."""
    selection = _tasks(study.selection_runs(), study.selection_measurements)
    done = all(runner.finished(task) for task in selection)
    chosen = study.chosen(averages_of(study, runner)) if done else None
    middle = study.learning_rates[len(study.learning_rates) // 2]
    runs = study.report_runs(chosen or {arm.name: middle for arm in study.selecting()})
    return Schedule(selection, _tasks(runs, study.measurements), chosen)


def _tasks(runs: Sequence[Run], measurements: Callable[[Run], Sequence[Measurement]]) -> list[Task]:
    """Every run, followed by its measurements."""
    return [task for run in runs for task in cast(list[Task], [run, *measurements(run)])]


def _correct(study: Study, runner: Runner, run: Run) -> dict[str, Any]:
    """Condition -> one bool per selection image."""
    return {task.planned.title: runner.correct(task) for task in study.selection_measurements(run)}


def averages_of(study: Study, runner: Runner) -> dict[str, dict[float, float]]:
    """Arm -> learning rate -> average in % on the selection slice, which is finished."""
    found: dict[str, dict[float, float]] = {}
    for run in study.selection_runs():
        correct = _correct(study, runner, run)
        average = float(sum(weight * correct[title].mean() for title, weight in study.average.items()))
        assert run.learning_rate is not None
        found.setdefault(run.arm, {})[run.learning_rate] = round(100 * average, 4)
    return found


def work_through(
    study: Study,
    runner: Runner,
    *,
    only: Collection[str] = (),
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Do what is left, task by task; whether the whole study is finished.

    ``only`` these arms, if any are named; ``deadline`` is on the clock of ``time.monotonic``: no task begins after it.

    Raises:
        OtherRunError: if a run of other settings lies where one of this study belongs.
    """

    def do(tasks: Sequence[Task]) -> bool:
        mine = [task for task in tasks if not only or run_of(task).arm in only]
        for run in dict.fromkeys(map(run_of, mine)):
            runner.claim(run)
        left = [task for task in mine if runner.finished(task) is None]
        for number, task in enumerate(left):
            if deadline is not None and time.monotonic() > deadline:
                say(f"Time is up; {len(left) - number} tasks of this part are left. Start it again to go on")
                return False
            begin, title = time.perf_counter(), f"train {task}" if isinstance(task, Run) else task
            if not runner.do(task, deadline):
                say(f"Time is up in the middle of: {title}. Start it again to go on from its last checkpoint")
                return False
            say(f"[{number + 1}/{len(left)}] {title}: {time.perf_counter() - begin:.1f} s")
        return True

    if not do(schedule_of(study, runner).selection):
        return False
    schedule, records = schedule_of(study, runner), Records(runner.folder)
    if schedule.chosen is None:
        say("The selection of other arms is not finished; the report images are not looked at before it is")
        return False
    if records.read("selection") is None:
        records.write("selection", selected(study, runner, schedule.chosen))
    return do(schedule.report) and all(runner.finished(task) for task in schedule.report)


def selected(study: Study, runner: Runner, chosen: dict[str, float]) -> dict[str, Any]:
    """Averages by learning rate, the chosen ones, and the power of the report."""
    averages = averages_of(study, runner)
    text_keys = {arm: {f"{rate:g}": value for rate, value in rates.items()} for arm, rates in averages.items()}
    found: dict[str, Any] = {"averages": text_keys, "chosen": chosen, "power": None}
    if study.selection is not None and len(study.selecting()) > 1:
        runs = {arm.name: Run(arm.name, chosen[arm.name], arm.seeds[0]) for arm in study.selecting()}
        correct = {name: _correct(study, runner, run) for name, run in runs.items()}
        images = {planned.title: len(study.report.places(planned.limit)) for planned in study.plan}
        control = correct.pop(study.control)
        found["power"] = power(control, correct, study.average, images)
    return found


def content_of(study: Study, runner: Runner, described: dict[str, Any]) -> dict[str, Any]:
    """Everything about a finished study, ready for JSON; the tables are computed from it (``report.complete``)."""
    chosen = schedule_of(study, runner).chosen
    assert chosen is not None
    runs = []
    for run in study.report_runs(chosen):
        trained = runner.finished(run)
        assert trained is not None
        records = {t.planned.title: record for t in study.measurements(run) if (record := runner.finished(t))}
        entry: dict[str, Any] = {"arm": run.arm, "learning_rate": run.learning_rate, "seed": run.seed}
        entry |= {name: trained[name] for name in ("cost", "rounds", "weights")}
        entry["correct_bits"] = {title: record["correct_bits"] for title, record in records.items()}
        entry["seconds"] = round(sum(record["seconds"] for record in records.values()), 1)
        runs.append(entry)
    selection = selected(study, runner, chosen)
    return {
        "format": 1,
        **described,
        "versions": versions(),
        "study": {
            "arms": {arm.name: {**arm.settings, "seeds": list(arm.seeds)} for arm in study.arms.values()},
            "control": study.control,
            "learning_rates": list(study.learning_rates),
            "conditions": {planned.title: planned.limit for planned in study.plan},
            "condition_seeds": {title: list(seeds) for title, seeds in study.condition_seeds.items()},
            "groups": {name: dict(weights) for name, weights in study.groups.items()},
            "report": asdict(study.report),
            "selection": None if study.selection is None else asdict(study.selection),
            "selection_limit": study.selection_limit,
            "seed": study.seed,
        },
        "selection": {"averages": selection["averages"], "chosen": selection["chosen"]},
        "power": selection["power"],
        "runs": runs,
    }


# ---- how much is left


def work(task: Task, config_of: Callable[[Run], NullspaceConfig]) -> float:
    """Forward passes of one image that a task takes, roughly."""
    if isinstance(task, Measurement):
        return float(len(task.places) * task.planned.condition.cost)
    if task.seed is None:
        return 0.0
    config: Any = config_of(task)  # its fields are set
    names = set(config.objective.split("+"))
    views = len({view for name in names for view in _VIEWS.get(name, ("clean", "other"))})
    steps = {name: config.attack_steps or number for name, number in _ATTACK_STEPS.items()} | {"fast": 1}
    passes = 3 * views + 2 * sum(steps[name] for name in names & set(steps))
    each = 0
    if names & {"nullspace", "permuted"}:
        if config.noise_learner == "boundary":
            each = 2 * config.noise_max_steps * config.noise_batch_size + config.noise_pool_images
        else:
            each = 3 * min(config.noise_max_steps, NOISE_STEPS) * config.noise_batch_size
    noise = config.rounds * (each + 10 * config.held_out_images) if each or "random" in names else 0
    return float(config.rounds * config.steps_per_round * config.global_batch_size * passes + noise)


def seconds_left(tasks: Sequence[tuple[Task, float]], runner: Runner) -> tuple[float, bool]:
    """Seconds that the unfinished of (task, work) will take, and whether finished ones were there to measure by.

    Trainings and measurements run at speeds of their own.
    """
    total, measured = 0.0, False
    for kind in (Run, Measurement):
        mine = [(runner.finished(task), load) for task, load in tasks if isinstance(task, kind) and load]
        done = [(load, _seconds(found)) for found, load in mine if found]
        speed = sum(load for load, _ in done) / max(sum(seconds for _, seconds in done), 1e-9) if done else SPEED
        measured |= bool(done)
        total += sum(load for found, load in mine if found is None) / speed
    return total, measured


def _seconds(found: dict[str, Any]) -> float:
    return float(found["seconds"] if "seconds" in found else (found["cost"] or {"seconds": 0.0})["seconds"])


def what_is_left(study: Study, runner: Runner, config_of: Callable[[Run], NullspaceConfig]) -> list[str]:
    """A line for each training, one for the measurements of a run on a slice, in their order, and the time left."""
    schedule = schedule_of(study, runner)
    tasks = list(dict.fromkeys(schedule.selection + schedule.report))
    loads = [(task, work(task, config_of)) for task in tasks]
    groups: dict[str, list[tuple[bool, float]]] = {}
    for task, load in loads:
        name = f"train {task}" if isinstance(task, Run) else f"measure {task.run} ({task.slice.name})"
        groups.setdefault(name, []).append((runner.finished(task) is None, load))
    lines = []
    if schedule.chosen is None:
        lines.append("The learning rates are not chosen yet; the report's are shown with the middle one")
    for name, mine in groups.items():
        left = [load for is_left, load in mine if is_left]
        state = f"{len(mine) - len(left)} of {len(mine)} done, {sum(left):,.0f} passes left" if left else "finished"
        lines.append(f"{name}: {state}")
    seconds, timed = seconds_left(loads, runner)
    count = sum(is_left for mine in groups.values() for is_left, _ in mine)
    basis = "by the speed of the finished tasks" if timed else "nothing was timed yet"
    return [*lines, f"{count} of {len(tasks)} tasks left, about {seconds / 60:.0f} minutes ({basis})"]
