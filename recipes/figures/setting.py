"""What the figures are made from: options, model, images, and where the results go."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from torch import Tensor
from transformers import set_seed

from hf_nullspace.command_line import UsageError, option
from hf_nullspace.core.files import write_json
from hf_nullspace.core.settings import check_numbers, fraction
from hf_nullspace.data.columns import class_names
from hf_nullspace.data.image_set import collate
from hf_nullspace.data.label_maps import LabelAlignment
from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.patch_embedding import find_patch_embedding
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.artifact import hub_commit
from hf_nullspace.robustness.attacks.gradient import FGSM, PGD
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.records import Records, versions
from hf_nullspace.robustness.suite import Attacked, Clean, Condition, Corrupted
from hf_nullspace.training.base_model import BASE_RANGES, train_base_model
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.loading import (
    Classifier,
    DataArguments,
    ModelArguments,
    evaluation_images,
    load_classifier,
    load_rows,
    training_images,
)
from hf_nullspace.training.preflight import BATCHES, check_images
from hf_nullspace.training.run_settings import OtherRunError, claim_folder


@dataclass
class FigureArguments:
    """What the figures need besides a model, images, and the settings of the method."""

    _group_title: ClassVar[str] = "Figures and tables"

    first_eval_image: int = option(0, "Measure from this image of the evaluation split on.")
    max_eval_images: int | None = option(1000, "Measure on so many images.")
    base_epochs: float = option(20, "Small ViT: epochs of its training.")
    base_learning_rate: float = option(2e-3, "Small ViT: learning rate of its training.")
    base_batch_size: int = option(64, "Small ViT: images per step of its training.")
    lambdas: list[float] = option([0.0, 0.1, 0.3, 1.0, 3.0, 10.0], "Figure 2: lambda of equation 6.")
    seeds: int = option(3, "Figure 2: noises per lambda.")
    sweep_steps: int = option(300, "Figure 2: gradient steps of one noise.")
    sweep_limit: float = option(0.1, "Figure 2: A, the noise starts as U(-A, A).")
    sweep_norm: str = option("centred", "Figure 2: the norm in equation 6, 'centred' or 'raw' (the paper).")
    raw_permutation: bool = option(False, "Figure 2: permute the elements as they are, as the paper does.")
    runs: int = option(1, "Figure 3, table 5: fine-tunings per arm, with seeds --seed, --seed + 1, ...")
    noises_per_round: int = option(1, "Figure 3: noises per checkpoint, to measure their norm.")
    fgsm: list[str] = option(["1/255", "2/255"], "Figure 3: strengths of FGSM, in pixels of [0, 1].")
    pgd: list[str] = option([], "Figure 3: strengths of PGD, 10 steps of a quarter of that.")
    corruptions: list[str] = option(["gaussian_noise", "contrast", "jpeg_compression"], "Figure 3: corruptions.")
    severities: list[int] = option([3, 5], "Figure 3: severities of the corruptions, 1 to 5.")
    noises: str | None = option(None, "Figure 4: folder of a bank or a run, or Hub id; unset: noises are learned.")
    noise_count: int = option(8, "Figure 4: how many noises (the paper: 98).")
    pairs: int = option(4, "Figure 4: how many pairs of them are combined (the paper: 10).")
    grid: int = option(10, "Figure 4: steps from 0 to 1 of every factor.")
    contour: float | None = option(None, "Figure 4: influence of the contour; unset: the smallest of the noises.")
    closure_control: bool = option(False, "Figure 4: also with the noises permuted, at the same influence.")
    table4: list[str] = option(["paper"], "Table 4: models, D:patch for random weights, 'paper' for the paper's rows.")

    def __post_init__(self) -> None:
        counts = ("seeds", "sweep_steps", "runs", "noise_count", "pairs", "noises_per_round", "max_eval_images")
        ranges = dict.fromkeys(counts, "int [1, inf)") | {"first_eval_image": "int [0, inf)", "grid": "int [2, inf)"}
        ranges |= {"lambdas": "[0, inf)", "sweep_limit": "(0, inf)", "contour": "(0, 2]"}
        check_numbers(self, BASE_RANGES | ranges)
        if not any(self.lambdas):
            raise UsageError(f"lambdas={self.lambdas}: expected numbers >= 0, one of them positive")
        if self.sweep_norm not in ("centred", "raw"):
            raise UsageError(f"sweep_norm={self.sweep_norm!r}: expected 'centred' or 'raw'")
        self.conditions()  # raises on a name or a number that does not exist

    def conditions(self) -> list[Condition]:
        """What figure 3 measures at every checkpoint.

        Raises:
            UsageError: if a strength is no number, or a group would be empty.
        """
        try:
            attacks = [Attacked(FGSM(fraction(eps))) for eps in self.fgsm]
            attacks += [Attacked(PGD(fraction(eps))) for eps in self.pgd]
        except ValueError as error:
            raise UsageError(f"fgsm={self.fgsm}, pgd={self.pgd}: expected numbers like 1/255 ({error})") from error
        corrupted = [Corrupted(name, severity) for name in self.corruptions for severity in self.severities]
        if not attacks or not corrupted:
            raise UsageError("figure 3 has three groups: name an attack (--fgsm, --pgd) and one of --corruptions")
        conditions: list[Condition] = [Clean(), *attacks, *corrupted]
        if len({str(condition) for condition in conditions}) < len(conditions):
            raise UsageError(f"{', '.join(map(str, conditions))}: expected each attack, corruption and severity once")
        return conditions


@dataclass
class FigureConfig(NullspaceConfig):
    """The figures are about Algorithm 1."""

    preset: str = field(default="descent", metadata={"help": "Where unset fields come from: 'descent' or 'paper'."})


@dataclass
class Setting:
    """Options, model and images of a figure. :meth:`load` fills what is not given."""

    args: FigureArguments
    model_args: ModelArguments
    data_args: DataArguments
    config: NullspaceConfig
    state: PartialState
    bar: Progress
    classifier: Any = None
    eval_set: Any = None
    batches: list[Tensor] = field(default_factory=list)
    """The evaluation images as ``pixel_values`` (b, C, H, W): this process's share."""
    _train_rows: Any = None

    def __post_init__(self) -> None:
        self.output = Path(str(self.config.output_dir))
        """The folder of all results; it belongs to one model and one data set."""
        self.records = Records(self.output / "points")
        """The finished points."""
        self.seeds = range(self.config.seed, self.config.seed + self.args.runs)
        """Of the fine-tunings of figure 3 and table 5."""

    def say(self, text: str) -> None:
        """A line, once, that does not break the bar."""
        if self.state.is_main_process:
            self.bar.say(text)

    def load(self, *, aligned: bool) -> None:
        """Model and images; the small ViT is trained if no model is named.

        ``aligned``: the model has to know the images' classes. Figures 2 and 4 compare the model with itself only.

        Raises:
            UsageError: if there is no such image, or the model's head is for other classes.
        """
        args, data, config = self.args, self.data_args, self.config
        small = self.model_args.model_name_or_path is None
        with self.state.main_process_first():
            base = {name: getattr(args, name) for name in ("base_epochs", "base_learning_rate", "base_batch_size")}
            claim(self.output, {"model": asdict(self.model_args) | (base if small else {}), "data": asdict(data)})
            self._train_rows = load_rows(data, data.train_split, streaming=data.streaming)
            rows: Any = load_rows(data, data.eval_split)
        if not 0 <= args.first_eval_image < len(rows):
            raise UsageError(f"first_eval_image={args.first_eval_image}: the split has {len(rows)} images")
        rows = rows.select(range(args.first_eval_image, len(rows)))
        set_seed(config.seed)
        if small or aligned:
            self.classifier = load_classifier(self.model_args, self._train_rows, self.say)
        else:
            self.classifier = self._with_its_own_head()
        images = self.images(config.seed)
        if not data.streaming:
            check_images(config, len(images), BATCHES if aligned else ["noise_batch_size"])
        if small:
            train_base_model(
                self.classifier, images, self.output / "base", config, epochs=args.base_epochs,
                learning_rate=args.base_learning_rate, batch_size=args.base_batch_size, say=self.say,
            )  # fmt: skip
        elif self.classifier.labels.new_head:
            raise UsageError("the model's head is not for these classes; name a model that was trained on them")
        self.classifier.model.to(config.device).eval()
        self.eval_set = evaluation_images(
            rows, self.classifier, args.max_eval_images, skip_corrupt=data.skip_corrupt_images
        )
        mine = range(config.process_index, len(self.eval_set), config.world_size)
        size = config.per_device_eval_batch_size
        starts = range(0, len(mine), size)
        self.batches = [collate([self.eval_set[i] for i in mine[at : at + size]])["pixel_values"] for at in starts]

    def _with_its_own_head(self) -> Classifier:
        """The model as it is, whatever the classes of the images; their labels are left as they are."""
        name, revision = str(self.model_args.model_name_or_path), self.model_args.model_revision
        model, processor = load_model(name, revision), load_image_processor(name, revision)
        find_patch_embedding(model)
        model.config._commit_hash = hub_commit(model, revision)
        preprocessing = Preprocessing.from_processor(processor)
        preprocessing.check_fits(model.config)
        classes = max(model.config.num_labels or 0, len(class_names(self._train_rows) or ()))
        names = {index: str(index) for index in range(classes)}
        labels = LabelAlignment(names, {name: index for index, name in names.items()}, None, False, "")
        return Classifier(model, processor, preprocessing, labels)

    def images(self, seed: int) -> Any:
        """The training images, augmented from ``seed``."""
        return training_images(self.data_args, self._train_rows, self.classifier, seed)

    def keep(self, figure: str, found: dict[str, Any], quoted: Any, plot: Callable[[Path], Path]) -> None:
        """FIGURE.json with command, versions, settings, protocol and what the paper says, and FIGURE.png."""
        if not self.state.is_main_process:
            return
        protocol: dict[str, Any] = {}
        if self.eval_set is not None:
            first, data = self.args.first_eval_image, self.data_args
            protocol = {
                "images": f"{data.dataset_name}, split {data.eval_split}, {first} to {first + len(self.eval_set) - 1}",
                "seed": self.config.seed,
                "noises learned in": "bfloat16 autocast" if self.config.bf16 else "float32",
                "measured in": "float32",
            }
        every = self.config.to_dict()
        method = {name: every[name] for name in (*NullspaceConfig.__annotations__, "bf16") if name in every}
        written = {"figure": asdict(self.args), "model": asdict(self.model_args), "data": asdict(self.data_args)}
        head = {
            "figure": figure,
            "command": shlex.join(["python", "recipes/reproduce.py", *sys.argv[1:]]),
            "versions": versions(),
            "commit": commit(),
            "protocol": protocol,
            "settings": written | {"method": method},
            "quoted_from_the_paper": quoted,
        }
        path = write_json(self.output / f"{figure}.json", head | found)
        self.say(f"Numbers: {path}. Picture: {plot(self.output / f'{figure}.png')}")


def commit() -> str | None:
    """The commit of the checkout that this file lies in; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def claim(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """``claim_folder`` for a folder with a run that these recipes never delete.

    Raises:
        UsageError: if it holds a run with other settings; the message names them.
    """
    try:
        claim_folder(folder, settings)
    except OtherRunError as error:
        raise UsageError(f"{str(error).partition(' Choose')[0]} Choose another --output_dir") from error
