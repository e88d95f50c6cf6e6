"""Images with labels and one preprocessing: to train on, to learn noises on, to measure on."""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_nullspace.data.augmentation import Augmentation, generator_for, seed_for
from hf_nullspace.data.columns import check_label, check_labels, class_names, labels_of
from hf_nullspace.data.fingerprints import rows_fingerprint, table_digest, table_stamp
from hf_nullspace.data.image_files import (
    CorruptImageError,
    DataError,
    decoded_image,
    in_shared_memory,
    undecoded,
)
from hf_nullspace.data.transforms import Transforms
from hf_nullspace.models.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

FINGERPRINT_ROWS = 64
CORRUPT_IN_A_ROW = 100  # more is no bad file, but a bad disk, column or download
SKIP_HINT = ", or skip such images: on_corrupt='skip', on the command line --skip_corrupt_images true"


@dataclass(eq=False, repr=False)
class LabelledImages:
    """What a set and a stream have in common.

    Args:
        rows: dicts with "image" and "label". An image is a PIL image, a uint8 array (H, W, 3), a path, or ``{"bytes":
            ..., "path": ...}``.
        remap: ``remap[label]`` is the model's class. Default: the label itself.
        num_labels: the size of the model's head; a label beyond it is an error.
        augmentation: drawn for each image from a key of its own (``seed``, epoch, image): the same for any batch size,
            worker, process and order.
        transforms: drawn in the same way, after the resize. With mixup or CutMix the labels of training images become
            class probabilities. A view of ``with_key`` mixes nothing: noises are learned and held to epsilon on cropped
            and changed images, because those are the ones that a training step adds them to, but not on mixed ones,
            which are no images of the data.
        on_corrupt: "skip" leaves out images that cannot be decoded, with a warning; by default they are an error.
        name: of a set that is measured; part of the protocol of its results.
        subset: the classes among which the answer is looked for (ImageNet-A and -R). Default: all.
        note, origin: for the protocol: what is special, and where on the Hub the images come from.
        ready: the images have the size of the input already, and one that has not is an error.
        split: what errors call the rows. Default: the name of a `datasets` split.
        source: what ``content_digest`` goes by: the rows of a named set or stream, or the commit that they come from.
    """

    rows: Any
    preprocessing: Preprocessing
    _: KW_ONLY
    remap: Sequence[int] | None = None
    num_labels: int | None = None
    augmentation: Augmentation | None = None
    transforms: Transforms | None = None
    seed: int = 0
    on_corrupt: Literal["error", "skip"] = "error"
    name: str = ""
    subset: Sequence[int] | None = None
    note: str = ""
    origin: str = ""
    ready: bool = False
    split: str | None = None
    source: "datasets.Dataset | ArrayRows | str | None" = None

    def __post_init__(self) -> None:
        if self.split is None and isinstance(self.rows, (datasets.Dataset, datasets.IterableDataset)):
            self.split = self.rows.split and str(self.rows.split)
        self.called = self.name or (f"split {self.split!r}" if self.split else "the data")
        self._hint = "" if self.name or self.on_corrupt == "skip" else SKIP_HINT
        self.rows = undecoded(self.rows)
        if self.transforms is not None and self.transforms.mixes and self.num_labels is None:
            raise ValueError(
                f"num_labels=None: {self.transforms.names} makes class probabilities of labels; pass the head's size"
            )
        self._key: tuple[int | str, ...] | None = None
        self._epoch = in_shared_memory(torch.zeros((), dtype=torch.int64))  # workers that live on see a new epoch, too

    def set_epoch(self, epoch: int) -> None:
        """New crops, flips and, of a stream, a new order; a view of ``with_key`` is not affected.

        In one process accelerate's loader calls this; in several it does not (accelerate 1.15 stops at the sampler),
        and whoever runs the epochs must, as NullspaceTrainer does.
        """
        self._epoch.fill_(epoch)

    def class_of(self, label: int | None, where: str) -> int:
        """The model's class; ``DataError`` where there is no label, or none that data and model know."""
        if self.remap is not None:
            label = self.remap[check_label(label, len(self.remap), where)]
        return check_label(label, self.num_labels, where)

    def pixels_from_image(self, image: Image.Image) -> Tensor:
        """Pixels (C, H, W), float32 in [0, 1], of any image at the size of the model's input; not augmented."""
        height, width = self.preprocessing.size
        if self.ready and image.size != (width, height):
            raise ValueError(
                f"{self.name}: an image is {image.width}x{image.height}; those published are {width}x{height} already "
                "and must not be resized or cropped. Get the published set"
            )
        return self.preprocessing.pixels_from_image(image)

    def protocol(self) -> dict[str, Any]:
        """What was done to the images, for the record of a result."""
        p = self.preprocessing
        resize = "none" if p.resize is None else f"{p.resize} px, {Image.Resampling(p.resample).name.lower()}"
        described = {"set": self.name, "resize": resize, "input": f"{p.size[0]}x{p.size[1]}"} if self.name else {}
        return described | {key: text for key, text in (("from", self.origin), ("note", self.note)) if text}

    def content_digest(self) -> str:
        """A hash that tells a named set from one with other files, without decoding any.

        It covers every byte of a set that sits in Arrow or an array, the sizes of image files that lie on disk, and the
        commit of a stream from the Hub; "" for other images.
        """
        if isinstance(self.source, ArrayRows):
            return hashlib.sha256(np.ascontiguousarray(self.source.images).data).hexdigest()
        return table_digest(self.source) if isinstance(self.source, datasets.Dataset) else self.source or ""

    def modification_stamp(self) -> str:
        """A hash of when each image file of a named set was last written; "" where its images are no files on disk.

        It notices a file that was replaced by one of the same size, and changes when a set is copied: something for the
        records of a run on this machine, not a property of the set.
        """
        return table_stamp(self.source) if isinstance(self.source, datasets.Dataset) else ""

    def _randomness(self) -> tuple[int | str, ...]:
        return ("epoch", int(self._epoch)) if self._key is None else ("stream", *self._key)

    @property
    def _mixes(self) -> bool:
        return self.transforms is not None and self.transforms.mixes and self._key is None

    def _item(self, image: Image.Image, label: int, *key: int | str) -> dict[str, Any]:
        if self.augmentation is None:
            pixels = self.pixels_from_image(image)
        else:  # a crop goes to the model's size as it is: a second one at the centre would narrow the range of scales
            crop = self.augmentation.apply(image, generator_for(self.seed, *key))
            pixels = self.preprocessing.pixels_from_image(crop, self.preprocessing.size)
        if self.transforms is not None:
            pixels = self.transforms.change(pixels, seed_for(self.seed, "change", *key))
        return {"pixel_values": self.preprocessing.normalize(pixels), "labels": label}

    def _mixed(self, item: dict[str, Any], partner: dict[str, Any], *key: int | str) -> dict[str, Any]:
        """``item`` joined with ``partner``; its labels are then probabilities (num_labels,), float32."""
        assert self.transforms is not None
        assert self.num_labels is not None
        images, labels = collate([item, partner]).values()
        mixed, probabilities = self.transforms.mix(images, labels, self.num_labels, seed_for(self.seed, "mix", *key))
        return {"pixel_values": mixed, "labels": probabilities}


@dataclass(eq=False, repr=False)
class ImageSet(LabelledImages, torch.utils.data.Dataset[dict[str, Any]]):
    """Images and labels for a Trainer, a DataLoader or ``suite.evaluate``, from any sequence of rows.

    Item ``i`` is ``{"pixel_values": (C, H, W) float32, normalised and augmented, "labels": int}``. With mixup or CutMix
    its partner is any image of the set, as it is in this epoch, and the labels are probabilities (num_labels,). With
    ``on_corrupt="skip"`` the next good row takes the place of a corrupt one, which is logged once per process.

    ``places`` are the places of the images in the whole set, where ``rows`` are a part of it: random corruptions and
    starts depend on them.

    Raises ``DataError`` when there are no rows, or a label is missing or out of range (checked at once for a
    `datasets.Dataset`, else when the row is read).
    """

    _: KW_ONLY
    places: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.rows, datasets.IterableDataset):
            raise TypeError("rows is a stream; expected rows with a length. Use ImageStream.")
        super().__post_init__()
        if len(self.rows) == 0:
            raise DataError("The data set has no rows. Choose another split, or extract archives first.")
        if self.name and isinstance(self.rows, (datasets.Dataset, ArrayRows)):
            self.source = self.rows
        self._chosen: Sequence[int] = range(len(self.rows))
        self.places = self.places or self._chosen
        self.kept: tuple[Tensor, Tensor] | None = None  # of in_memory
        self._labels: np.ndarray | None = None
        if isinstance(self.rows, datasets.Dataset):
            self._labels = labels_of(self.rows, self.called)
            check_labels(self._labels, self.num_labels if self.remap is None else len(self.remap), self.called)
            if self.remap is not None:
                check_labels(np.asarray(self.remap)[self._labels], self.num_labels, self.called)
        skip = self.on_corrupt == "skip"
        # In shared memory: the main process sees what workers found.
        self._corrupt = in_shared_memory(torch.zeros(len(self.rows), dtype=torch.bool)) if skip else None

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._unmixed(index)
        if not self._mixes:
            return item
        key = (*self._randomness(), self.places[index])
        partner = generator_for(self.seed, "partner", *key).integers(len(self))
        return self._mixed(item, self._unmixed(int(partner)), *key)

    def raw_image(self, index: int) -> Image.Image:
        """The image at its own size: PIL, RGB, neither resized nor augmented. Corruptions act here.

        Raises ``CorruptImageError``, with the row and the file, where it cannot be decoded.
        """
        return self._decoded(self._chosen[index])

    def label(self, index: int) -> int:
        """As the model numbers it."""
        return self._class_of_row(self._chosen[index])

    def with_key(self, *key: int | str) -> "ImageSet":
        """The same rows, augmented from (``seed``, ``*key``, image) whatever the epoch; e.g. ``("noise", round)``."""
        view = copy.copy(self)
        view._key = key
        return view

    def part(self, limit: int) -> "ImageSet":
        """At most ``limit`` evenly spaced images; the protocol of their results says so."""
        view = self._view(evenly_spaced(len(self), limit))
        view.note = "; ".join(filter(None, (self.note, f"{len(view)} of {len(self)} images, evenly spaced")))
        return view

    def first(self, count: int) -> "ImageSet":
        """The first ``count`` images, with the random numbers that they have in the whole."""
        return self._view(range(min(count, len(self))))

    def _view(self, indices: Sequence[int]) -> "ImageSet":
        view = copy.copy(self)
        view.kept = None
        view._chosen, view.places = [self._chosen[i] for i in indices], [self.places[i] for i in indices]
        return view

    def in_memory(self) -> "ImageSet":
        """A set with ``kept``: pixels (n, C, H, W) as 8-bit numbers, a quarter of float32, and labels (n,).

        Conditions that do not corrupt the images take their batches from there. Raises ``ValueError`` where the pixels
        were not 8-bit (a ``pixels_from_image`` that computes in between).
        """
        rows = []
        for index in range(len(self)):
            pixels = self.pixels_from_image(self.raw_image(index))
            rows.append((pixels * 255).round().to(torch.uint8))
            if not torch.equal(rows[-1] / 255, pixels):
                raise ValueError(f"image {index} has pixels between the 8-bit levels; it cannot be kept in 8 bits")
        view = copy.copy(self)
        view.kept = torch.stack(rows), torch.tensor([self.label(index) for index in range(len(self))])
        return view

    def content_fingerprint(self) -> str:
        """A hash (16 hexadecimal digits) that tells these images and labels from others, whatever their files' names.

        It covers the number of rows, the classes' names, the files of 64 evenly spaced rows with their labels, and of a
        `datasets.Dataset` all labels in their order: an image that changed between the 64 is not noticed.
        """
        described = [str(len(self.rows))]
        if self._labels is not None:
            described += [repr(class_names(self.rows)), hashlib.sha256(self._labels.tobytes()).hexdigest()]
        sample = evenly_spaced(len(self.rows), FINGERPRINT_ROWS)
        return rows_fingerprint((self.rows[row] for row in sample), *described)

    @property
    def corrupt_rows(self) -> list[int]:
        """The rows found unreadable so far, by this process and its workers (``on_corrupt="skip"``)."""
        return [] if self._corrupt is None else self._corrupt.nonzero().flatten().tolist()

    def _unmixed(self, index: int) -> dict[str, Any]:
        row, image = self._good_row(self._chosen[index])
        return self._item(image, self._class_of_row(row), *self._randomness(), self.places[index])

    def _decoded(self, row: int) -> Image.Image:
        return decoded_image(self.rows[row]["image"], f"Row {row} of {self.called}", self._hint)

    def _class_of_row(self, row: int) -> int:
        label = self.rows[row]["label"] if self._labels is None else int(self._labels[row])
        return self.class_of(label, f"Row {row} of {self.called}")

    def _good_row(self, first: int) -> tuple[int, Image.Image]:
        if self._corrupt is None:
            return first, self._decoded(first)
        for tried in range(first, first + min(len(self.rows), CORRUPT_IN_A_ROW)):
            row = tried % len(self.rows)
            if self._corrupt[row]:
                continue
            try:
                return row, self._decoded(row)
            except CorruptImageError as error:
                self._corrupt[row] = True
                logger.warning("%s The next good row takes its place.", error)
        raise CorruptImageError(
            f"Rows {first} to {row} of {self.called} have no readable image. Check the disk and image_column."
        )


class ArrayRows:
    """Rows of a uint8 array (n, H, W, 3) that may lie on disk, and of n labels."""

    def __init__(self, images: Any, labels: Sequence[int] | np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(np.asarray(self.images[index])), "label": int(self.labels[index])}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of items: ``pixel_values`` (B, C, H, W) float32, ``labels`` (B,) int64 or (B, K) float32."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.utils.data.default_collate([row["labels"] for row in rows]),
    }


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 to ``count`` - 1, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(most, count))})
