"""The order of a study: choose on selection images, write down what can be seen, report. And the time that is left."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from hf_nullspace.robustness.records import Records, versions
from hf_nullspace.training.config import NullspaceConfig
from study.analysis import power
from study.design import BEFORE, CLEAN, Choice, Measurement, Run, Study
from study.tasks import Runner, Task, run_of

NOISE_STEPS = 225
"""Gradient steps per round that are assumed of Algorithm 1 (measured from A = 3 on a ViT of 1.2 M parameters)."""
SPEED = 550.0
"""Forward passes of one image per second that are assumed until a task was timed."""
_VIEWS = {
    "madry": ("adversarial",),
    "trades": ("clean", "divergent"),
    "fast": ("clean", "fast"),
    "fgm": ("clean", "fgm"),
    "pyramid": ("clean", "pyramid"),
    "universal": ("clean", "universal"),
    "plain": ("clean", "again"),
}
_ATTACK_STEPS = {"madry": 10, "trades": 10, "pyramid": 5}
"""Where a run does not set them."""


@dataclass
class Schedule:
    """All tasks of a study in their order."""

    selection: list[Task]
    report: list[Task]
    """Before the selection is finished, with a choice from the grid's middle."""
    chosen: dict[str, Choice] | None
    """None while the selection is not finished."""


def schedule_of(study: Study, runner: Runner) -> Schedule:
    """The tasks; learning rates and alphas are chosen if the selection is finished."""
    selection = _tasks(study.selection_runs(), study.selection_measurements)
    done = all(runner.finished(task) for task in selection)
    chosen = study.chosen(*averages_of(study, runner)) if done else None
    middle = study.choices[len(study.choices) // 2]
    runs = study.report_runs(chosen or {arm.name: middle for arm in study.selecting()})
    return Schedule(selection, _tasks(runs, study.measurements), chosen)


def _tasks(runs: Sequence[Run], measurements: Callable[[Run], Sequence[Measurement]]) -> list[Task]:
    """Every run after the one that trains its weights, and followed by its measurements."""
    return list(
        dict.fromkeys(task for run in runs for task in cast(list[Task], [run.trained, run, *measurements(run)]))
    )


def _correct(study: Study, runner: Runner, run: Run) -> dict[str, Any]:
    """Condition -> one bool per selection image."""
    return {task.planned.title: runner.correct(task) for task in study.selection_measurements(run)}


def averages_of(study: Study, runner: Runner) -> tuple[dict[str, dict[Choice, float]], dict[str, dict[Choice, float]]]:
    """Arm -> choice -> average in %, and points of clean accuracy lost, on the selection slice, which is finished."""
    averages: dict[str, dict[Choice, float]] = {}
    lost: dict[str, dict[Choice, float]] = {}
    clean = 0.0 if study.keep_clean is None else _correct(study, runner, Run(BEFORE))[CLEAN].mean()
    for run in study.selection_runs():
        if run.choice is not None:
            correct = _correct(study, runner, run)
            average = float(sum(weight * correct[title].mean() for title, weight in study.average.items()))
            averages.setdefault(run.arm, {})[run.choice] = round(100 * average, 4)
            if study.keep_clean is not None:
                lost.setdefault(run.arm, {})[run.choice] = round(100 * float(clean - correct[CLEAN].mean()), 4)
    return averages, lost


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
            begin, title = time.perf_counter(), f"{_verb(task)} {task}" if isinstance(task, Run) else task
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


def _verb(run: Run) -> str:
    return "train" if run == run.trained else "average"


def selected(study: Study, runner: Runner, chosen: dict[str, Choice]) -> dict[str, Any]:
    """Averages over the grid, what is chosen, and the power of the report."""
    averages, lost = averages_of(study, runner)
    found: dict[str, Any] = {
        "averages": _with_text_keys(averages),
        "chosen": {arm: choice.learning_rate for arm, choice in chosen.items()},
        "power": None,
    }
    if any(choice.alpha != 1 for choice in study.choices):
        found["alphas"] = {arm: choice.alpha for arm, choice in chosen.items()}
    if study.keep_clean is not None:
        found["clean_lost"] = _with_text_keys(lost)
    if study.selection is not None and len(study.selecting()) > 1:
        runs = {arm.name: Run(arm.name, chosen[arm.name], arm.seeds[0]) for arm in study.selecting()}
        correct = {name: _correct(study, runner, run) for name, run in runs.items()}
        images = {planned.title: len(study.report.places(planned.limit)) for planned in study.plan}
        control = correct.pop(study.control)
        found["power"] = power(control, correct, study.average, images)
    return found


def _with_text_keys(found: dict[str, dict[Choice, float]]) -> dict[str, dict[str, float]]:
    return {arm: {str(choice): value for choice, value in values.items()} for arm, values in found.items()}


def content_of(study: Study, runner: Runner, described: dict[str, Any]) -> dict[str, Any]:
    """Everything about a finished study, ready for JSON; the tables are computed from it (``report.complete``)."""
    chosen = schedule_of(study, runner).chosen
    assert chosen is not None
    runs = []
    for run in study.report_runs(chosen):
        trained = runner.finished(run)
        assert trained is not None
        records = {t.planned.title: record for t in study.measurements(run) if (record := runner.finished(t))}
        rate = None if run.choice is None else run.choice.learning_rate
        entry: dict[str, Any] = {"arm": run.arm, "learning_rate": rate, "seed": run.seed}
        if run.choice is not None and run != run.trained:
            entry["alpha"] = run.choice.alpha
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
            "arms": {arm.name: {**arm.settings, **arm.data, "seeds": list(arm.seeds)} for arm in study.arms.values()},
            "control": study.control,
            "learning_rates": list(dict.fromkeys(choice.learning_rate for choice in study.choices)),
            "alphas": list(dict.fromkeys(choice.alpha for choice in study.choices)),
            "keep_clean": study.keep_clean,
            "conditions": {planned.title: planned.limit for planned in study.plan},
            "condition_seeds": {title: list(seeds) for title, seeds in study.condition_seeds.items()},
            "groups": {name: dict(weights) for name, weights in study.groups.items()},
            "report": asdict(study.report),
            "selection": None if study.selection is None else asdict(study.selection),
            "selection_limit": study.selection_limit,
            "seed": study.seed,
        },
        "selection": {name: value for name, value in selection.items() if name != "power"},
        "power": selection["power"],
        "runs": runs,
    }


# ---- how much is left


def work(task: Task, config_of: Callable[[Run], NullspaceConfig]) -> float:
    """Forward passes of one image that a task takes, roughly."""
    if isinstance(task, Measurement):
        return float(len(task.places) * task.planned.condition.cost)
    if task.seed is None or task != task.trained:
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
        name = f"{_verb(task)} {task}" if isinstance(task, Run) else f"measure {task.run} ({task.slice.name})"
        groups.setdefault(name, []).append((runner.finished(task) is None, load))
    lines = []
    if schedule.chosen is None:
        lines.append("Nothing is chosen yet; the report is shown with the middle of the grid")
    for name, mine in groups.items():
        left = [load for is_left, load in mine if is_left]
        state = f"{len(mine) - len(left)} of {len(mine)} done, {sum(left):,.0f} passes left" if left else "finished"
        lines.append(f"{name}: {state}")
    seconds, timed = seconds_left(loads, runner)
    count = sum(is_left for mine in groups.values() for is_left, _ in mine)
    basis = "by the speed of the finished tasks" if timed else "nothing was timed yet"
    return [*lines, f"{count} of {len(tasks)} tasks left, about {seconds / 60:.0f} minutes ({basis})"]
