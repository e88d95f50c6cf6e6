"""Before a release: is the folder complete, does it load afresh, and is it the model that was measured?"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from hf_nullspace.cards.run_folder import HISTORY_NAME, REPORTS, SETTINGS_NAME, Report, RunFolder
from hf_nullspace.data.columns import class_names
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.data.label_maps import align_labels
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.artifact import WEIGHTS_NAME, bank_file_name
from hf_nullspace.robustness.pixel_model import PixelModel, model_fingerprint
from hf_nullspace.robustness.plots import cell
from hf_nullspace.robustness.suite import Clean, Condition, ConditionResult, Corrupted, evaluate
from hf_nullspace.training.loading import Classifier, DataArguments, evaluation_images, load_rows

IMAGES = 200
TOLERANCE = 0.01  # share of images whose answer may differ: rounding on another machine changes a few


class ReleaseError(ValueError):
    """A run is not fit to be released; the message says why and what to do."""


@dataclass(frozen=True)
class Recheck:
    """One recorded condition, measured again on its first ``images`` images."""

    condition: str
    images: int
    recorded: int
    found: int
    differing: int
    same_weights: bool | None = None
    """Whether the hash of the weights is the recorded one; None where none was recorded."""

    @property
    def allowed(self) -> int:
        return max(1, int(TOLERANCE * self.images))

    @property
    def passed(self) -> bool:
        return self.differing <= self.allowed and self.same_weights is not False

    def __str__(self) -> str:
        hashed = {True: "; weights of the recorded hash", False: "; NOT the weights that were measured", None: ""}
        return (
            f"{self.condition}: {self.found} of the first {self.images} images right, recorded {self.recorded}; "
            f"{self.differing} answers differ, {self.allowed} may{hashed[self.same_weights]}"
        )


def what_is_missing(run: Path) -> list[str]:
    """Every file that a release needs and the folder lacks, each with how to make it; [] if it is complete."""
    run = Path(run)
    if not run.is_dir():
        return [f"{run} is no folder; give the --output_dir of recipes/finetune.py"]
    folder, index = RunFolder(run), run / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if index.is_file():
        weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    needed = {
        "config.json": "the model's; save it with trainer.save_model()",
        **dict.fromkeys(weights, "the weights; save them with trainer.save_model()"),
        "preprocessor_config.json": "without it nobody knows how images are prepared; save it with "
        "image_processor.save_pretrained(RUN), or give the trainer processing_class=image_processor",
        " or ".join(REPORTS): "measure with recipes/finetune.py, or recipes/evaluate_robustness.py with "
        "--model_name_or_path RUN --output_dir RUN/robustness",
    }
    if folder.history:
        noises = [WEIGHTS_NAME, *(f"noises/{bank_file_name(entry['round'])}" for entry in folder.history)]
        needed |= dict.fromkeys(noises, f"{HISTORY_NAME} names its round; take it from a copy of the run, or run again")
    missing = [
        f"{name}: {how_to_make_it}"
        for name, how_to_make_it in needed.items()
        if not any((run / file).is_file() for file in name.split(" or "))
    ]
    if folder.settings.get("training", {}).get("objective") == "nullspace" and not folder.history:
        problem = f"{SETTINGS_NAME} speaks of noises; let recipes/finetune.py go on, it writes both"
        missing.append(f"{HISTORY_NAME}: {problem}")
    return missing


def recheck(run: Path, count: int = IMAGES, dataset_name: str | None = None) -> list[Recheck]:
    """Load the folder with plain transformers and measure again: clean images and the quickest corruption recorded.

    Each on the first ``count`` recorded images, compared image by image. ``dataset_name`` is where the recorded data
    set is now.

    Raises:
        ReleaseError: if nothing is recorded that could be measured again, or the data are not there.
    """
    report, wanted = recorded(run)
    # A report is read without the paths of this machine; the context is read again with them.
    context = json.loads((run / report.file).read_text(encoding="utf-8")).get("context", {})
    try:
        model = load_model(str(run)).eval()
        preprocessing = Preprocessing.from_processor(load_image_processor(str(run)))
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{run} cannot be loaded: {error}; save the model and its image processor again") from error
    n = min(result.n for result in report.results[report.subject])
    try:
        images = recorded_images(context, n, model, preprocessing, dataset_name, count)
    except (OSError, ValueError) as error:
        raise ReleaseError(f"the recorded images cannot be read: {error}; say where they are with --dataset_name, or "
                           "leave the measurement out with --recheck_images 0") from error  # fmt: skip
    pixel_model = PixelModel(model, preprocessing.mean, preprocessing.std)
    fingerprint, found = model_fingerprint(pixel_model), []
    for result, condition in wanted:
        with torch.autocast("cpu", torch.bfloat16) if context.get("bf16") else contextlib.nullcontext():
            (again,) = evaluate(pixel_model, images, [condition], batch_size=64, seed=result.seed, progress=False)
        before = result.correct[: again.n]
        known = result.protocol.get("fingerprints", {}).get("model")
        same = None if known is None else known == fingerprint
        right = (int(before.sum()), int(again.correct.sum()))
        found.append(Recheck(result.condition, again.n, *right, int((before != again.correct).sum()), same))
    return found


def recorded(run: Path) -> tuple[Report, list[tuple[ConditionResult, Condition]]]:
    """The first report with something to measure again: clean images, the generated corruption that was quickest."""
    for report in RunFolder(run).reports:
        results = report.results[report.subject]
        chosen: list[tuple[ConditionResult, Condition]] = [(r, Clean()) for r in results if r.condition == "clean"]
        cells = [(r, found) for r in results if r.condition.startswith("generated ") and (found := cell(r))]
        if cells:
            quickest, (_, corruption, severity) = min(cells, key=lambda pair: pair[0].seconds)
            chosen.append((quickest, Corrupted(corruption, severity)))
        if chosen:
            return report, chosen
    raise ReleaseError(
        f"the results in {run} have neither clean images nor a generated corruption to measure again; "
        "add some with recipes/evaluate_robustness.py --output_dir RUN/robustness"
    )


def recorded_images(
    context: Mapping[str, Any], n: int, model: Any, preprocessing: Preprocessing, dataset_name: str | None, count: int
) -> ImageSet:
    """The first ``count`` of the ``n`` images that a report is over, in its order."""
    count = min(count, n)
    if data := context.get("settings", {}).get("data"):  # recipes/finetune.py: the first n of the split
        known = {field.name for field in fields(DataArguments)}
        named = {key: value for key, value in data.items() if key in known}
        args = DataArguments(**named | ({"dataset_name": dataset_name} if dataset_name else {}))
        rows = load_rows(args, args.eval_split, streaming=args.streaming)
        labels = align_labels(class_names(rows), model.config)
        classifier, skip = Classifier(model, None, preprocessing, labels), args.skip_corrupt_images
        return evaluation_images(rows, classifier, count, skip_corrupt=skip)
    dataset, split = dataset_name or context.get("dataset_name"), context.get("split", "test")
    if dataset is None:
        raise ReleaseError("the report names no data set")
    rows = load_image_dataset(dataset, split)
    labels = align_labels(class_names(rows), model.config)
    whole = ImageSet(rows, preprocessing, remap=labels.remap, name=f"{dataset}, {split}")
    return (whole.part(n) if n < len(whole) else whole).first(count)  # evaluate_robustness.py: n evenly spaced
