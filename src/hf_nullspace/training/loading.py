"""From names to a model and its data: what every recipe does before its own work begins."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import datasets
import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from hf_nullspace.command_line import option
from hf_nullspace.core.settings import check_numbers
from hf_nullspace.data.augmentation import Augmentation
from hf_nullspace.data.columns import class_names, num_classes
from hf_nullspace.data.image_files import CorruptImageError, DataError, decoded_image, readable_stream, undecoded
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.data.image_stream import Images, ImageStream
from hf_nullspace.data.label_maps import LabelAlignment, align_labels
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.data.transforms import Transforms
from hf_nullspace.models.loading import HEAD_NAMES, NoHeadError, load_image_processor, load_model, load_model_config
from hf_nullspace.models.patch_embedding import find_patch_embedding
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.noise.artifact import hub_commit, model_hash

logger = logging.getLogger(__name__)

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass
class ModelArguments:
    """Which model: a pretrained one, or a small ViT that the recipe trains first."""

    _group_title: ClassVar[str] = "Model"

    model_name_or_path: str | None = option(
        None, "Hub id or folder of an image classifier with a patch embedding. Unset: a small ViT is trained first."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.")
    attn_implementation: str | None = option(
        None,
        "'sdpa', 'eager', ...; unset: the model's. On a CPU in bf16, eager trains twice as fast (docs/scaling.md).",
    )
    image_size: int = option(32, "Small ViT: side of its images in pixels.")
    patch_size: int = option(8, "Small ViT: side of a patch in pixels.")
    hidden_size: int = option(64, "Small ViT: features D; below 3 * patch_size^2 the patch embedding has a nullspace.")
    num_hidden_layers: int = option(4, "Small ViT: layers.")
    num_attention_heads: int = option(4, "Small ViT: attention heads.")
    intermediate_size: int = option(128, "Small ViT: width of the MLP.")

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and not self.model_name_or_path.strip():
            raise ValueError("model_name_or_path='': expected a Hub id or a folder; leave it out for a small ViT")
        sizes = ("image_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        check_numbers(self, dict.fromkeys(sizes, "int [1, inf)") | {"patch_size": f"int [1, {self.image_size}]"})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: expected a multiple of num_attention_heads={self.num_attention_heads}"
            )


@dataclass
class DataArguments:
    """Which images, and what is done to them for training."""

    _group_title: ClassVar[str] = "Data"

    dataset_name: str = option("digits", "Hub id, folder of images or parquet files, or 'digits' (built in).")
    dataset_config: str | None = option(None, "Configuration of a Hub data set.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub data set.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str = option("test", "Split to measure on.")
    image_column: str | None = option(None, "Column of the images; found by itself if there is only one.")
    label_column: str | None = option(None, "Column of the labels; found by itself if it has a usual name.")
    streaming: bool = option(False, "Stream the data instead of downloading it.")
    shuffle_buffer: int = option(1000, "Streaming: images held to draw the next one from; 0 keeps the order.")
    crop_scale: float = option(0.08, "RandomResizedCrop: smallest area of a crop, in (0, 1]; 1 switches it off.")
    horizontal_flip: bool = option(True, "Mirror half of the training images. Not for digits or text.")
    augmentation: str | None = option(
        None,
        "'augmix', 'trivialaugment', 'mixup', 'cutmix' of torchvision (extra vision), or several joined by '+'; "
        "docs/augmentation.md says which measured corruption each resembles.",
    )
    max_train_images: int | None = option(None, "Train on the first so many images only.")
    skip_corrupt_images: bool = option(False, "Leave out images that cannot be decoded, with a warning.")

    def __post_init__(self) -> None:
        check_numbers(
            self, {"shuffle_buffer": "int [0, inf)", "crop_scale": "(0, 1]", "max_train_images": "int [1, inf)"}
        )
        for name in ("dataset_name", "train_split", "eval_split"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a name")
        self.transforms()  # raises on a name that is not known, and without torchvision

    def transforms(self) -> Transforms | None:
        """What ``augmentation`` names; None if nothing."""
        return None if self.augmentation is None else Transforms(self.augmentation)

    def crop_and_flip(self) -> Augmentation | None:
        """The random crop and flip that these settings ask for; None if neither."""
        if self.crop_scale >= 1 and not self.horizontal_flip:
            return None
        ratio = (3 / 4, 4 / 3) if self.crop_scale < 1 else (1.0, 1.0)
        scale = (min(self.crop_scale, 1.0), 1.0)
        return Augmentation(scale=scale, ratio=ratio, flip=0.5 if self.horizontal_flip else 0.0)


@dataclass(frozen=True)
class Classifier:
    """A model, its image processor, what that does to images, and how the data's labels become the model's."""

    model: PreTrainedModel
    image_processor: Any
    preprocessing: Preprocessing
    labels: LabelAlignment
    weights: str | None = None
    """Hash of the weights that were loaded, without a head that is new; None for a small ViT."""


def load_rows(args: DataArguments, split: str, streaming: bool = False) -> Rows:
    """One split of the data set that the arguments name, with the columns ``image`` and ``label``."""
    return load_image_dataset(
        args.dataset_name,
        split,
        streaming=streaming,
        image_column=args.image_column,
        label_column=args.label_column,
        config_name=args.dataset_config,
        revision=args.dataset_revision,
    )


def load_classifier(args: ModelArguments, rows: Rows, say: Callable[[str], None]) -> Classifier:
    """The model that the arguments name, with a head for the labels of ``rows``; ``say`` gets a line on the labels.

    Raises:
        DataError: if no model is named for a stream, or the labels make no classes (one, or unnamed ones far too many).
        NotAViTError: if the model has no patch embedding.
        OSError: if there is no such model, or its files cannot be used.
        ValueError: if the processor's images do not fit the model, or it has no such attention implementation.
    """
    names = class_names(rows)
    if args.model_name_or_path is None:
        if isinstance(rows, datasets.IterableDataset):
            raise DataError(
                "a small ViT is trained for whole epochs, and a stream has no length; name a model, or leave "
                "streaming out"
            )
        if names is None:
            raise DataError("the labels have no names, so the number of classes is not known; name a model instead")
        _check_classes(names)
        model: PreTrainedModel = ViTForImageClassification(_small_vit(args, names))
        processor = make_image_processor(args.image_size)
        labels = align_labels(names, model.config)
    else:
        model, processor, labels = _pretrained(args.model_name_or_path, args.model_revision, rows, names)
        say(labels.message)
    weights = None if args.model_name_or_path is None else _fingerprint(model, labels.new_head)
    if args.attn_implementation is not None:
        try:
            model.set_attn_implementation(args.attn_implementation)
        except (ValueError, ImportError) as error:
            raise ValueError(f"attn_implementation={args.attn_implementation!r}: {error}") from error
    find_patch_embedding(model)
    preprocessing = Preprocessing.from_processor(processor)
    preprocessing.check_fits(model.config)
    return Classifier(model, processor, preprocessing, labels, weights)


def _fingerprint(model: PreTrainedModel, new_head: bool) -> str:
    """Equal for equal weights; a new head is random, and not part of what was loaded."""
    without = [name for name, _ in _heads(model)] if new_head else []
    return model_hash(model, without=without)[:16]


def _pretrained(
    name: str, revision: str | None, rows: Rows, names: list[str] | None
) -> tuple[PreTrainedModel, Any, LabelAlignment]:
    config = load_model_config(name, revision)
    labels = align_labels(names, config, None if isinstance(rows, datasets.IterableDataset) else num_classes(rows))
    _check_classes(list(labels.id2label.values()))
    config.id2label, config.label2id = labels.id2label, labels.label2id
    try:
        model = load_model(name, revision, config=config, new_head=labels.new_head)
    except NoHeadError:
        labels = replace(labels, new_head=True, message="the checkpoint has no head, so it gets a new one")
        model = load_model(name, revision, config=config, new_head=True)
    model.config._commit_hash = hub_commit(model, revision)  # the provenance of noises; transformers forgets it
    if labels.new_head:  # of the same size it would keep the weights of other classes
        _new_head(model)
    return model, load_image_processor(name, revision), labels


def _heads(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in HEAD_NAMES]


def _check_classes(names: list[str]) -> None:
    """One class: transformers takes such a head for a regression."""
    if len(names) == 1:
        raise DataError(
            f"The data has one class, {names[0]!r}; a classifier needs two or more. Check label_column, or "
            "give the folder with one subfolder per class."
        )


def _new_head(model: PreTrainedModel) -> None:
    linear = [layer for _, head in _heads(model) for layer in head.modules() if isinstance(layer, torch.nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no module named {' or '.join(HEAD_NAMES)}; name a model with one")
    for layer in linear:
        torch.nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            torch.nn.init.zeros_(layer.bias)


def _small_vit(args: ModelArguments, names: list[str]) -> ViTConfig:
    return ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",  # else it depends on whether this process has trained it
    )


def training_images(args: DataArguments, rows: Rows, classifier: Classifier, seed: int) -> Images:
    """The training split as the model takes it, augmented; a stream if ``rows`` is one."""
    options: dict[str, Any] = {
        "augmentation": args.crop_and_flip(),
        "transforms": args.transforms(),
        "seed": seed,
        "remap": classifier.labels.remap,
        "num_labels": classifier.labels.num_labels,
        "on_corrupt": "skip" if args.skip_corrupt_images else "error",
    }
    count = args.max_train_images
    if isinstance(rows, datasets.IterableDataset):
        rows = rows if count is None else rows.take(count)
        return ImageStream(rows, classifier.preprocessing, shuffle_buffer=args.shuffle_buffer, repeat=True, **options)
    rows = rows if count is None else rows.select(range(min(count, len(rows))))
    return ImageSet(rows, classifier.preprocessing, **options)


def evaluation_images(
    rows: Rows,
    classifier: Classifier,
    count: int | None,
    *,
    skip_corrupt: bool = False,
) -> ImageSet:
    """The first ``count`` images (all, if None) to measure on: not augmented. Of a stream they are held, encoded.

    With ``skip_corrupt`` those that cannot be decoded are left out, with a warning that names each: every image is
    decoded once for that. None takes its place, so no image is measured twice.

    Raises:
        DataError: if a stream is given and no ``count``, or no image can be decoded.
    """
    chosen: Any = undecoded(rows)
    if isinstance(rows, datasets.IterableDataset):
        if count is None:
            raise DataError("a streamed evaluation split has no end that is known; set max_eval_images")
        chosen = list(readable_stream(chosen.take(count)))
    elif count is not None and count < len(rows):
        chosen = chosen.select(range(count))
    if skip_corrupt:
        chosen = _without_corrupt(chosen, f"split {str(rows.split)!r}" if rows.split else "the data")
    labels = classifier.labels
    return ImageSet(
        chosen,
        classifier.preprocessing,
        remap=labels.remap,
        num_labels=labels.num_labels,
        split=rows.split and str(rows.split),
    )


def _without_corrupt(rows: Any, where: str) -> Any:
    """The rows with images that can be decoded; a warning names each other one.

    Raises:
        CorruptImageError: if there is none.
    """
    good = []
    for index, row in enumerate(rows):
        try:
            decoded_image(row["image"], f"Row {index} of {where}")
            good.append(index)
        except CorruptImageError as error:
            logger.warning("%s It is left out.", error)
    if not good:
        raise CorruptImageError(f"None of the {len(rows)} images of {where} can be decoded.")
    if len(good) == len(rows):
        return rows
    return rows.select(good) if isinstance(rows, datasets.Dataset) else [rows[index] for index in good]
