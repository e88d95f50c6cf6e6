"""The order of a study: select, write down what can be seen, report. And how much of it is left."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_nullspace.core.files import DamagedFileError, read_json, write_json
from hf_nullspace.robustness.records import versions
from study.analysis import power, selection_averages
from study.design import Run, Study
from study.pieces import Piece, Workshop, pieces_of

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a study stands."""

    selection: list[Piece]
    report: list[Piece]
    chosen: dict[str, float] | None
    """Learning rates; None while the selection is not finished."""


def standing(study: Study, shop: Workshop) -> Progress:
    """All pieces in order. Before the selection is finished, those of the report have a rate in the grid's middle."""
    selection: list[Piece] = []
    if study.selection is not None:
        for run in study.selection_runs():
            selection += pieces_of(run, study.selection_plan(), study.selection)
    done = all(shop.finished(piece) for piece in selection)
    chosen = study.chosen(averages_of(study, shop)) if done else None
    middle = study.learning_rates[len(study.learning_rates) // 2]
    expected = chosen or {arm.name: middle for arm in study.selecting()}
    report = [p for run in study.report_runs(expected) for p in pieces_of(run, study.plan_of(run), study.report)]
    return Progress(selection, report, chosen)


def averages_of(study: Study, shop: Workshop) -> dict[str, dict[float, float]]:
    """Arm -> learning rate -> average on the selection slice, from finished pieces; none without a selection."""
    if study.selection is None:
        return {}
    found: dict[str, list[Any]] = {}
    for run in study.selection_runs():
        found.setdefault(run.arm, []).append((run.learning_rate, correct_of(study, shop, run)))
    return selection_averages(found, study.average)


def correct_of(study: Study, shop: Workshop, run: Run) -> dict[str, Any]:
    """Condition -> one bool per selection image."""
    assert study.selection is not None
    pieces = [p for p in pieces_of(run, study.selection_plan(), study.selection) if p.planned is not None]
    return {piece.planned.title: shop.correct(piece) for piece in pieces if piece.planned is not None}


def work_through(
    study: Study,
    shop: Workshop,
    *,
    only: Collection[str] = (),
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Do what is left, piece by piece; whether the whole study is finished.

    ``only`` these arms, if any are named; ``deadline`` is on the clock of ``time.monotonic``: no piece begins after it.

    Raises:
        OtherRunError: if a run of other settings lies where one of this study belongs.
    """
    for phase in ("selection", "report"):
        progress = standing(study, shop)
        pieces = progress.selection if phase == "selection" else progress.report
        if phase == "report":
            if progress.chosen is None:
                say("The selection of other arms is not finished; the report images are not looked at before it is")
                return False
            write_down(study, shop, progress.chosen)
        mine = [piece for piece in pieces if not only or piece.run.arm in only]
        for run in dict.fromkeys(piece.run for piece in mine):
            shop.claim(run)
        if not _do_all(mine, shop, deadline, say):
            return False
    progress = standing(study, shop)
    return all(shop.finished(piece) for piece in progress.report)


def _do_all(pieces: Sequence[Piece], shop: Workshop, deadline: float | None, say: Callable[[str], None]) -> bool:
    left = [piece for piece in pieces if shop.finished(piece) is None]
    for number, piece in enumerate(left):
        if deadline is not None and time.monotonic() > deadline:
            say(f"Time is up; {len(left) - number} pieces of this part are left. Start it again to go on")
            return False
        begin = time.perf_counter()
        if not shop.do(piece, deadline):
            say(f"Time is up in the middle of: {piece}. Start it again to go on from its last checkpoint")
            return False
        say(f"[{number + 1}/{len(left)}] {piece}: {time.perf_counter() - begin:.1f} s")
    return True


def write_down(study: Study, shop: Workshop, chosen: dict[str, float]) -> None:
    """Keep the choice of learning rates and the smallest visible difference, before the report images are looked at."""
    path = shop.folder / "selection.json"
    try:
        read_json(path)
    except (FileNotFoundError, DamagedFileError) as error:
        if isinstance(error, DamagedFileError):
            logger.warning("%s; it is written again", error)
        write_json(path, selected(study, shop, chosen), sealed=True)


def selected(study: Study, shop: Workshop, chosen: dict[str, float]) -> dict[str, Any]:
    """Averages by learning rate, the chosen ones, and the power of the report."""
    found = {"averages": _with_text_keys(averages_of(study, shop)), "chosen": chosen, "power": None}
    if study.selection is not None and len(study.selecting()) > 1:
        runs = {arm.name: Run(arm.name, chosen[arm.name], arm.seeds[0]) for arm in study.selecting()}
        correct = {name: correct_of(study, shop, run) for name, run in runs.items()}
        images = {planned.title: len(study.report.places(planned.limit)) for planned in study.plan}
        control = correct.pop(study.control)
        found["power"] = power(control, correct, study.average, images)
    return found


def content_of(study: Study, shop: Workshop, described: dict[str, Any]) -> dict[str, Any]:
    """Everything about a finished study, ready for JSON; the tables are computed from it (``report.complete``)."""
    progress = standing(study, shop)
    assert progress.chosen is not None
    runs = []
    for run in study.report_runs(progress.chosen):
        trained, *measured = list(pieces_of(run, study.plan_of(run), study.report))
        found = shop.finished(trained)
        assert found is not None
        entry: dict[str, Any] = {"arm": run.arm, "learning_rate": run.learning_rate, "seed": run.seed}
        entry |= {"cost": found["cost"], "rounds": found["rounds"], "weights": found["weights"]}
        records = {piece.planned.title: shop.finished(piece) for piece in measured if piece.planned is not None}
        entry["correct_bits"] = {title: record["correct_bits"] for title, record in records.items() if record}
        entry["seconds"] = round(sum(record["seconds"] for record in records.values() if record), 1)
        runs.append(entry)
    chosen = selected(study, shop, progress.chosen)
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
        "selection": {"averages": chosen["averages"], "chosen": chosen["chosen"]},
        "power": chosen["power"],
        "runs": runs,
    }


def _with_text_keys(averages: dict[str, dict[float, float]]) -> dict[str, dict[str, float]]:
    return {arm: {f"{rate:g}": value for rate, value in rates.items()} for arm, rates in averages.items()}
