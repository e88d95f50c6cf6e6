"""Rows of a data set become ``pixel_values`` (C, H, W) and ``labels``: the way of one batch begins here."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_nullspace.models.preprocessing import Preprocessing, rgb_image
from hf_nullspace.training.augmentation import Augmentation, generator_for
from hf_nullspace.training.columns import DataError, check_labels, features_of, label_problem, labels_of

logger = logging.getLogger(__name__)

CORRUPT_IN_A_ROW = 100  # more is no bad file, but a bad disk, column or download


class CorruptImageError(DataError):
    """An image that cannot be decoded; the message names row and file."""


class ImageClassificationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Images and labels for a Trainer or a DataLoader.

    ``rows`` is a `datasets.Dataset`, or any sequence of rows (dicts with an image and a label). An image is a PIL
    image, a uint8 array (H, W, 3), a path, or ``{"bytes": ..., "path": ...}``. Item ``i`` is ``{"pixel_values":
    (C, H, W) float32, normalised, "labels": int}``, with ``normalize=False`` ``{"pixels": (C, H, W) float32 in [0, 1],
    "labels": int}``.

    ``augmentation`` is drawn for each image from (``seed``, epoch, index): the same for any batch size, worker, process
    and order. ``remap[label]`` is the model's label. ``num_labels`` is the size of the model's head.
    ``on_corrupt="skip"`` puts the next good row in the place of an image that cannot be decoded, logs each such row
    once per process, and lists them in ``corrupt_rows``; by default it is a ``CorruptImageError``.

    Raises ``DataError`` when there are no rows, or a label is missing or out of range (checked at once for a
    `datasets.Dataset`, else when the row is read).
    """

    def __init__(
        self,
        rows: Any,
        preprocessing: Preprocessing,
        *,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: Augmentation | None = None,
        seed: int = 0,
        remap: Sequence[int] | None = None,
        num_labels: int | None = None,
        normalize: bool = True,
        on_corrupt: Literal["error", "skip"] = "error",
    ) -> None:
        if len(rows) == 0:
            raise DataError("The data set has no rows. Choose another split, or extract archives first.")
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self._rows = _undecoded(rows, image_column)
        self._image_column, self._label_column = image_column, label_column
        self._remap, self._num_labels, self._normalize = remap, num_labels, normalize
        if isinstance(rows, datasets.Dataset):
            _checked_labels(labels_of(rows, label_column), remap, num_labels)
        self._stream: tuple[int | str, ...] | None = None
        # Shared memory: persistent workers see a new epoch, and the main process sees what workers found.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._corrupt = torch.zeros(len(rows), dtype=torch.bool).share_memory_() if on_corrupt == "skip" else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # negative indices, and IndexError at the end
        row, image = self._good_row(index)
        label = _label(row[self._label_column], self._remap, self._num_labels, f"Row {index}")
        if self.augmentation is not None:
            image = self.augmentation.apply(image, generator_for(self.seed, *self._key(), index))
        return _item(image, label, self.preprocessing, self._normalize, augmented=self.augmentation is not None)

    def raw_image(self, index: int) -> Image.Image:
        """The image of a row at its own size: PIL, RGB, neither resized nor augmented. Corruptions act here."""
        return _decoded(self._rows[index][self._image_column], f"Row {index}")

    def label(self, index: int) -> int:
        """The label of a row, as the model numbers it."""
        return _label(self._rows[index][self._label_column], self._remap, self._num_labels, f"Row {index}")

    @property
    def corrupt_rows(self) -> list[int]:
        """The rows found unreadable so far, by this process and its workers (``on_corrupt="skip"``)."""
        return [] if self._corrupt is None else self._corrupt.nonzero().flatten().tolist()

    def set_epoch(self, epoch: int) -> None:
        """New crops and flips; workers that live on see it too. A view of ``with_stream`` is not affected."""
        self._epoch.fill_(epoch)

    def with_stream(self, *key: int | str) -> "ImageClassificationDataset":
        """The same rows, augmented from (``seed``, ``*key``, index) whatever the epoch; e.g. ``("noise", round)``."""
        view = copy.copy(self)
        view._stream = key
        return view

    def _key(self) -> tuple[int | str, ...]:
        return ("epoch", int(self._epoch)) if self._stream is None else ("stream", *self._stream)

    def _good_row(self, index: int) -> tuple[Mapping[str, Any], Image.Image]:
        for tried in range(index, index + min(len(self), CORRUPT_IN_A_ROW)):
            place = tried % len(self)
            if self._corrupt is not None and self._corrupt[place]:
                continue
            row = self._rows[place]
            try:
                return row, _decoded(row[self._image_column], f"Row {place}")
            except CorruptImageError as error:
                if self._corrupt is None:
                    raise
                self._corrupt[place] = True
                logger.warning("%s The next good row takes its place.", error)
        raise CorruptImageError(f"Rows {index} to {place} have no readable image. Check the disk and image_column.")


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of items: ``pixel_values`` (or ``pixels``) (B, C, H, W) float32, ``labels`` (B,) int64."""
    images = "pixel_values" if "pixel_values" in rows[0] else "pixels"
    return {
        images: torch.stack([row[images] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.int64),
    }


def _item(
    image: Image.Image, label: int, preprocessing: Preprocessing, normalize: bool, augmented: bool
) -> dict[str, Any]:
    # A random crop goes to the model's size as it is: a second crop at the centre would narrow the range of scales.
    pixels = preprocessing.pixels_from_image(image, preprocessing.size if augmented else None)
    return (
        {"pixel_values": preprocessing.normalize(pixels), "labels": label}
        if normalize
        else {
            "pixels": pixels,
            "labels": label,
        }
    )


def _undecoded(rows: Any, image_column: str) -> Any:
    """The same rows with the image as bytes and path, so that we decode, and can say which row is broken."""
    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return rows
    is_image = isinstance(features_of(rows).get(image_column), datasets.Image)
    return rows.cast_column(image_column, datasets.Image(decode=False)) if is_image else rows


def _decoded(value: Any, where: str) -> Image.Image:
    path = value if isinstance(value, str) else value.get("path") if isinstance(value, Mapping) else None
    named = f"{where} ({path})" if path else where
    if value is None or (isinstance(value, Mapping) and value.get("bytes") is None and not path):
        raise CorruptImageError(f"{named} has no image. Remove the row, or pass on_corrupt='skip'.")
    try:
        if isinstance(value, np.ndarray):
            return rgb_image(Image.fromarray(value))
        source = {"bytes": None, "path": value} if isinstance(value, str) else value
        return rgb_image(datasets.Image().decode_example(source))
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise CorruptImageError(
            f"{named} cannot be decoded: {type(error).__name__}: {error}. "
            "Replace or remove the file, or pass on_corrupt='skip'."
        ) from error


def _label(value: Any, remap: Sequence[int] | None, num_labels: int | None, where: str) -> int:
    if value is None:
        raise DataError(f"{where} has no label. Remove such rows, or use a labelled split.")
    label = int(value)
    if remap is not None:
        if not 0 <= label < len(remap):
            raise DataError(label_problem(label, len(remap), where))
        label = remap[label]
    if label < 0 or (num_labels is not None and label >= num_labels):
        raise DataError(label_problem(label, num_labels, where))
    return label


def _checked_labels(labels: np.ndarray, remap: Sequence[int] | None, num_labels: int | None) -> None:
    if remap is not None:
        check_labels(labels, len(remap))
        labels = np.asarray(remap)[labels]
    check_labels(labels, num_labels)
