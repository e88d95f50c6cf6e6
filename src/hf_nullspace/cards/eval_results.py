"""A run's results in the two forms that the Hub reads: ``model-index`` in the card, and ``.eval_results/*.yaml``.

A number that a check doubts is in neither: these forms have no place for the doubt beside the number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from huggingface_hub import EvalResult, EvalResultEntry

from hf_nullspace.cards.run_folder import Report, RunFolder, Source, source
from hf_nullspace.robustness.suite import ConditionResult


@dataclass(frozen=True)
class Measured:
    """One reliable result of the folder's model, and the images that it is over."""

    result: ConditionResult
    images: Source
    note: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def measured(run: RunFolder) -> Iterator[Measured]:
    """The results that no check doubts, of every report, a condition of several reports once."""
    seen = set()
    for report in run.reports:
        for result in report.results[report.subject]:
            found = _measured(report, result)
            if not report.doubts(report.subject, result) and (found.images.name, result.condition) not in seen:
                seen.add((found.images.name, result.condition))
                yield found


def _measured(report: Report, result: ConditionResult) -> Measured:
    """Which data set a result is over: that of the fine-tuning, the user's own, or a published set."""
    context, protocol = report.context, result.protocol
    if data := context.get("settings", {}).get("data"):  # recipes/finetune.py
        images, note = source(data["dataset_name"]), str(context.get("images", "")).partition(", ")[2]
        place = (data.get("dataset_config"), data["eval_split"], data.get("dataset_revision"))
        return Measured(result, images, note, *place)
    note = str(protocol.get("note", f"{result.n} images"))
    own, split = context.get("dataset_name"), context.get("split")
    if own and protocol.get("set", f"{own}, {split}") == f"{own}, {split}":
        return Measured(result, source(own), note, split=split)
    name, _, rest = str(protocol.get("from", "")).partition(", split ")
    if not rest:  # a published set from a folder
        return Measured(result, Source(str(protocol.get("set", result.condition)), None), note)
    split, _, commit = rest.partition(", commit ")
    return Measured(result, source(name), note, split=split, revision=commit if commit.isalnum() else None)


def model_index(run: RunFolder) -> list[EvalResult]:
    """An accuracy in [0, 1] for every condition, with its number of images, interval and seed."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=found.images.hub_id or found.images.name.rpartition("/")[2],
            dataset_name=f"{str(found.images).replace('`', '')}, {found.note}" if found.note else str(found.images),
            dataset_config=found.config,
            dataset_split=found.split,
            dataset_revision=found.revision,
            metric_type="accuracy",
            metric_name=f"Accuracy, {found.result.condition}",
            metric_value=round(found.result.score.value, 6),
            metric_args={
                "condition": found.result.condition,
                "images": found.result.n,
                "interval_95": [round(found.result.score.low, 6), round(found.result.score.high, 6)],
                "seed": found.result.seed,
            },
        )
        for found in measured(run)
    ]


def eval_result_entries(run: RunFolder) -> dict[str, list[EvalResultEntry]]:
    """File name -> entries, one file for each data set.

    The format is for benchmarks that are data sets on the Hub, measured as they are: images of a local folder, attacked
    or corrupted images are in ``model-index`` alone.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    for found in measured(run):
        hub_id, score = found.images.hub_id, found.result.score
        if hub_id is None or {"attack", "generated"} & found.result.protocol.keys():
            continue
        notes = f"accuracy in [0, 1], 95% interval [{score.low:.4f}, {score.high:.4f}], {found.result.n} images; "
        entry = EvalResultEntry(
            dataset_id=hub_id,
            task_id="default",
            value=round(score.value, 6),
            dataset_revision=found.revision,
            notes=notes + found.note,
        )
        files.setdefault(f"{hub_id.replace('/', '--')}.yaml", []).append(entry)
    return files
