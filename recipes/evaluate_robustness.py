"""Measure how robust image classifiers are, honestly: attacks in pixel space, corruptions, shifted sets.

    accelerate launch recipes/evaluate_robustness.py --model_name_or_path M --dataset_name D --suite quick
    accelerate launch recipes/evaluate_robustness.py --compare BEFORE CONTROL AFTER --dataset_name D --suite standard
    accelerate launch recipes/evaluate_robustness.py --model_name_or_path M --data_root FOLDER --suite paper --published

Writes results.json, .md, .csv and pictures to --output_dir. A finished condition is kept there and found again unless
the checkpoint, the data, the protocol or the seed changed. What cannot be measured is listed as missing, and the exit
code is then 1 (--allow_missing: 0).
"""

import dataclasses
import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState

from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import only_run_in
from hf_nullspace.core.settings import check_numbers, check_output_dir, nearest
from hf_nullspace.data.columns import class_names
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.data.image_stream import Images
from hf_nullspace.data.label_maps import align_labels
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.models.loading import load_image_processor, load_model, load_model_config
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.checks import Check, run_checks
from hf_nullspace.robustness.label_spaces import imagenet_columns
from hf_nullspace.robustness.pixel_model import PixelModel, model_fingerprint
from hf_nullspace.robustness.plans import BASE, OWN, Planned, lacks, load_plan
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.records import Records, evaluate_resumably, images_fingerprint, some_of
from hf_nullspace.robustness.report import terminal_table, write_report
from hf_nullspace.robustness.sets import CIFAR10_C_IMAGES, SETS, MissingData, load_cifar10_c, load_set
from hf_nullspace.robustness.suite import ConditionResult


@dataclass
class EvaluationArguments:
    """Which checkpoints, which conditions, which images."""

    _group_title: ClassVar[str] = "Robustness"

    model_name_or_path: str | None = option(None, "Hub id or folder of an image classifier.")
    compare: list[str] = option([], "Several checkpoints side by side; differences are against the first.")
    suite: str = option("quick", "quick, standard, paper, or a YAML file (docs/robustness_protocols.md).")
    dataset_name: str | None = option(None, "The user's own images: Hub id, folder, parquet, or 'digits'.")
    split: str = option("test", "Split of --dataset_name.")
    data_root: str | None = option(None, "Folder that holds the robustness sets, one folder each, by name.")
    location: list[str] = option([], "Other places: NAME=FOLDER or NAME=HUB_ID, for example imagenet-a=org/set.")
    label_order: str | None = option(
        None, "'imagenet': trust that logits (or a Hub set's numbers) without names are in ImageNet's order."
    )
    output_dir: str = option("outputs/robustness", "Where results and finished conditions go.")
    batch_size: int = option(64, "Images per forward on each process.")
    seed: int = option(0, "Seed of random starts and corruptions.")
    limit: int | None = option(None, "At most so many evenly spaced images of every set; the report says so.")
    workers: int = option(0, "Processes that prepare images, for each process that measures.")
    in_memory: bool = option(False, "Prepare the images of a set once and keep them (8 bits per value).")
    streaming: bool = option(False, "Read the robustness sets as streams.")
    bf16: bool = option(False, "Forwards in bfloat16.")
    use_cpu: bool = option(False, "Do not use a GPU.")
    checks: bool = option(True, "Doubt the evaluation: run the checks on a few images first.")
    published: bool = option(False, "Add the paper's table 1, marked as quoted.")
    per_sample: bool = option(False, "Write label, prediction and confidence of every image (parquet).")
    allow_missing: bool = option(False, "Exit with 0 although conditions are missing.")
    allow_partial: bool = option(False, "Accept a set without the published number of images; the report says so.")
    disable_tqdm: bool = option(False, "No progress bars.")

    def __post_init__(self) -> None:
        if bool(self.model_name_or_path) == bool(self.compare):
            raise UsageError("give either --model_name_or_path M or --compare A B ...")
        for place in self.location:
            name, _, where = place.partition("=")
            known = {*SETS, *(one.partition("/")[0] for one in SETS), "cifar10-c"}
            if not name or not where:
                raise UsageError(f"--location {place}: expected NAME=FOLDER or NAME=HUB_ID")
            if name not in known:
                raise UsageError(f"--location {place}: unknown set {name!r}{nearest(name, known)}")
        if self.label_order not in (None, "imagenet"):
            raise UsageError(f"label_order={self.label_order!r}: expected 'imagenet', or leave it out")
        at_least_1 = dict.fromkeys(("batch_size", "limit"), "int [1, inf)")
        check_numbers(self, at_least_1 | {"workers": "int [0, inf)", "seed": "int [0, 4294967295]"})
        check_output_dir(self.output_dir)


def main() -> None:
    (args,) = parse((EvaluationArguments,), str(__doc__))
    plan = load_plan(args.suite)
    if any(planned.images == BASE for planned in plan) and args.dataset_name is None:
        raise UsageError(f"suite {args.suite} measures your own images: name them with --dataset_name")
    with only_run_in(args.output_dir):
        Evaluation(args, plan).run()


class Evaluation:
    """The plan on every checkpoint, condition by condition, then the report."""

    def __init__(self, args: EvaluationArguments, plan: list[Planned]) -> None:
        self.args, self.plan = args, plan
        self.state = PartialState(cpu=args.use_cpu or not torch.cuda.is_available())
        self.records = Records(Path(args.output_dir) / "records")
        self.bar = Progress(shown=self.state.is_main_process and not args.disable_tqdm)
        self.missing: dict[str, str] = {}  # title -> why
        self.keys: list[str] = []  # of the records that this run wrote or found
        self.sets: dict[tuple[str, int | None], list[Planned]] = {}  # (images, limit) -> the conditions on them
        for planned in plan:
            limit = min((value for value in (args.limit, planned.limit) if value), default=None)
            self.sets.setdefault((planned.images, limit), []).append(planned)

    def run(self) -> None:
        args = self.args
        results: dict[str, list[ConditionResult]] = {}
        checks: dict[str, list[Check]] = {}
        checkpoints = args.compare or [args.model_name_or_path]
        with self.bar:  # an error gets a line of its own
            for checkpoint, ((where, limit), group) in itertools.product(checkpoints, self.sets.items()):
                size = self.published_size(where)
                for planned in group:
                    work = min(size, limit or size) * planned.condition.cost / self.state.num_processes
                    self.bar.expect((checkpoint, planned), work)
            for place, checkpoint in enumerate(checkpoints, 1):
                name = short_name(checkpoint, checkpoints)
                self.say(f"Checkpoint {place} of {len(checkpoints)}: {name}")
                results[name], checks[name] = self.measure(checkpoint, name)
        if not any(results.values()):
            reasons = "; ".join(f"{title}: {why}" for title, why in self.missing.items())
            raise MissingData(f"nothing could be measured: {reasons}")
        if self.state.is_main_process:
            self.report(results, checks if args.checks else {})
        if self.missing and not args.allow_missing:
            self.state.print(
                f"{len(self.missing)} conditions are missing; --allow_missing accepts that", file=sys.stderr
            )
            sys.exit(1)

    def measure(self, checkpoint: str, name: str) -> tuple[list[ConditionResult], list[Check]]:
        """All conditions of one checkpoint, in the plan's order, and the results of the checks."""
        args = self.args
        model = load_model(checkpoint).to(self.state.device).eval()
        preprocessing = Preprocessing.from_processor(load_image_processor(checkpoint))
        preprocessing.check_fits(model.config)

        @functools.cache
        def on_pixels(imagenet: bool) -> tuple[PixelModel, str]:
            """The model on pixels, its logits in ImageNet's order or in its own, and a hash of every weight."""
            columns = imagenet_columns(load_model_config(checkpoint).id2label) if imagenet else None
            pixel_model = PixelModel(model, preprocessing.mean, preprocessing.std, columns)
            return pixel_model, model_fingerprint(pixel_model)

        found: dict[str, ConditionResult] = {}
        answers: list[Check] = []
        for (where, limit), group in self.sets.items():
            self.bar.begin(f"reading {self.name_of(where)}")
            try:
                images = self.load_images(where, limit, checkpoint, preprocessing)
                lacking = {planned.title: why for planned in group if (why := lacks(planned.condition, images))}
            except MissingData as error:
                lacking = {planned.title: str(error) for planned in group}
            self.missing |= lacking
            for planned in group:  # evaluate_resumably knows what is left of them
                self.bar.expect((checkpoint, planned), 0)
            conditions = {planned.title: planned.condition for planned in group if planned.title not in lacking}
            if not conditions:
                continue
            in_its_order = is_own(where) or where.startswith("cifar10-c") or args.label_order == "imagenet"
            pixel_model, fingerprint = on_pixels(not in_its_order)
            with torch.autocast(self.state.device.type, torch.bfloat16, enabled=args.bf16):
                answers = answers or self.check(pixel_model, images, fingerprint)
                results, keys = evaluate_resumably(
                    self.records,
                    pixel_model,
                    images,
                    conditions,
                    batch_size=args.batch_size,
                    seed=args.seed,
                    dtype="bf16" if args.bf16 else str(model.dtype),
                    workers=args.workers,
                    fingerprint=fingerprint,
                    samples=Path(args.output_dir) / "per_sample" / name if args.per_sample else None,
                    progress=self.bar,
                    say=self.say,
                )
            found |= results
            self.keys += keys
        return [found[planned.title] for planned in self.plan if planned.title in found], answers

    def load_images(self, where: str, limit: int | None, checkpoint: str, preprocessing: Preprocessing) -> Images:
        """The set ``where`` with labels as the checkpoint numbers them."""
        args = self.args
        places = dict(place.split("=", 1) for place in args.location)
        images: Images
        if is_own(where):
            dataset = self.name_of(where)
            rows = own_rows(dataset, args.split)
            labels = align_labels(class_names(rows), load_model_config(checkpoint))
            if labels.new_head:
                raise UsageError(f"{checkpoint} does not know the classes of {dataset}: {labels.message}")
            images = ImageSet(rows, preprocessing, remap=labels.remap, name=f"{dataset}, {args.split}")
        elif where.startswith("cifar10-c/"):
            _, corruption, severity = where.split("/")
            folder = places.get("cifar10-c", str(Path(args.data_root or ".") / "cifar10-c"))
            partial = args.allow_partial
            images = load_cifar10_c(folder, corruption, int(severity), preprocessing, allow_partial=partial)
        else:
            location = places.get(where)
            if location is None and where.startswith("imagenet-c/") and "imagenet-c" in places:
                location = str(Path(places["imagenet-c"]) / where.removeprefix("imagenet-c/"))
            images = load_set(
                where, preprocessing, data_root=args.data_root, location=location, streaming=args.streaming,
                label_order=args.label_order, allow_partial=args.allow_partial,
            )  # fmt: skip
        if isinstance(images, ImageSet):
            images = images.part(limit) if limit is not None and limit < len(images) else images
            return images.in_memory() if args.in_memory else images
        if limit is not None:
            raise UsageError(f"a limit takes evenly spaced images, and a stream has no length: measure {where} whole, "
                             "or leave --streaming out")  # fmt: skip
        return images

    def check(self, model: PixelModel, images: Images, fingerprint: str) -> list[Check]:
        """What the checks say to 32 evenly spaced images, or to a stream's first 32; on every process alike."""
        if not self.args.checks:
            return []
        key = Records.key(model=fingerprint, images=images_fingerprint(images), seed=self.args.seed)
        kept = self.records.read(f"checks-{key}", lambda entry: [Check(**each) for each in entry["checks"]])
        if kept is not None:
            return list(kept)
        if not (rows := some_of(images, 32)):
            raise ValueError("the set has no images")
        pixels = torch.stack([images.pixels_from_image(image) for image, _ in rows]).to(model.device)
        labels = torch.tensor([label for _, label in rows], device=model.device)
        answers = run_checks(model, pixels, labels, seed=self.args.seed)
        self.records.write(f"checks-{key}", {"checks": [dataclasses.asdict(answer) for answer in answers]})
        return answers

    def report(self, results: dict[str, list[ConditionResult]], checks: dict[str, list[Check]]) -> None:
        if others := self.records.others(self.keys):
            what = "are of another checkpoint, protocol, data set, limit or seed, and were not used"
            self.state.print(f"{others} records in {self.records.folder} {what}")
        shown: dict[str, Any] = {"missing": self.missing, "checks": checks, "published": self.args.published}
        paths = write_report(results, self.args.output_dir, context=dataclasses.asdict(self.args), **shown)
        self.state.print("\n" + terminal_table(results, **shown) + "\n")
        self.state.print(f"Numbers: {paths['json']}. Table: {paths['md']}. Pictures: {paths['png'].parent}")

    def name_of(self, where: str) -> str:
        return str(self.args.dataset_name) if where == BASE else where.removeprefix(OWN)

    def published_size(self, where: str) -> int:
        """For the time left, before a set was read: the images of the published set, or of the user's own."""
        if is_own(where):
            return len(own_rows(self.name_of(where), self.args.split))
        return CIFAR10_C_IMAGES if where.startswith("cifar10-c/") else SETS[where].images

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            self.bar.say(text)


def is_own(where: str) -> bool:
    return where == BASE or where.startswith(OWN)


@functools.cache
def own_rows(dataset: str, split: str) -> Any:
    return load_image_dataset(dataset, split)


def short_name(checkpoint: str, all_of_them: list[str]) -> str:
    """As many of the last parts of a path or Hub id as tell it from the others."""
    parts = [Path(other).parts for other in all_of_them]
    own = Path(checkpoint).parts
    for length in range(1, len(own) + 1):
        if sum(other[-length:] == own[-length:] for other in parts) == 1:
            return "/".join(own[-length:])
    raise UsageError(f"{checkpoint} is given twice")


if __name__ == "__main__":
    run(main)
