"""Rows of a data set become ``pixel_values`` (C, H, W) and ``labels``: the way of one batch begins here."""

import copy
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor

from hf_nullspace.models.image_files import (
    FINGERPRINT_ROWS,
    CorruptImageError,
    content_key,
    decoded_image,
    in_shared_memory,
    rows_fingerprint,
    told_when_broken,
    undecoded,
)
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.training.augmentation import Augmentation, generator_for, seed_for
from hf_nullspace.training.columns import DataError, check_labels, class_names, label_problem, labels_of

logger = logging.getLogger(__name__)

CORRUPT_IN_A_ROW = 100  # more is no bad file, but a bad disk, column or download
SKIP_HINT = ", or skip such images: on_corrupt='skip', on the command line --skip_corrupt_images true"


class ImageClassificationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Images and labels for a Trainer or a DataLoader.

    ``rows`` is a `datasets.Dataset`, or any sequence of rows (dicts with an image and a label). An image is a PIL
    image, a uint8 array (H, W, 3), a path, or ``{"bytes": ..., "path": ...}``. Item ``i`` is ``{"pixel_values":
    (C, H, W) float32, normalised, "labels": int}``, with ``normalize=False`` ``{"pixels": (C, H, W) float32 in [0, 1],
    "labels": int}``.

    ``augmentation`` is drawn for each image from (``seed``, epoch, index): the same for any batch size, worker, process
    and order. ``remap[label]`` is the model's label. ``num_labels`` is the size of the model's head.
    ``split`` is what errors call the rows, by default the name of a `datasets.Dataset`'s split.
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
        split: str | None = None,
    ) -> None:
        if isinstance(rows, datasets.IterableDataset):
            raise TypeError("rows is a stream; expected rows with a length. Use StreamingImageClassificationDataset.")
        if len(rows) == 0:
            raise DataError("The data set has no rows. Choose another split, or extract archives first.")
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self._rows = undecoded(rows, image_column)
        self._image_column, self._label_column = image_column, label_column
        self._remap, self._num_labels, self._normalize = remap, num_labels, normalize
        self._split = _split_name(rows, split)
        if isinstance(rows, datasets.Dataset):
            _checked_labels(labels_of(rows, label_column), remap, num_labels)
        self._stream: tuple[int | str, ...] | None = None
        # Shared memory: persistent workers see a new epoch, and the main process sees what workers found.
        self._epoch = in_shared_memory(torch.zeros((), dtype=torch.int64))
        self._corrupt = in_shared_memory(torch.zeros(len(rows), dtype=torch.bool)) if on_corrupt == "skip" else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # negative indices, and IndexError at the end
        row, image = self._good_row(index)
        label = _label(row[self._label_column], self._remap, self._num_labels, self._where(index))
        if self.augmentation is not None:
            image = self.augmentation.apply(image, generator_for(self.seed, *self._key(), index))
        return _item(image, label, self.preprocessing, self._normalize, augmented=self.augmentation is not None)

    def raw_image(self, index: int) -> Image.Image:
        """The image of a row at its own size: PIL, RGB, neither resized nor augmented. Corruptions act here."""
        return decoded_image(self._rows[index][self._image_column], self._where(index), SKIP_HINT)

    def readable(self) -> list[int]:
        """The rows whose images can be decoded, in their order; each other one is a warning.

        Raises ``CorruptImageError`` if there is none.
        """
        good = []
        for index in range(len(self)):
            try:
                decoded_image(self._rows[index][self._image_column], self._where(index))
                good.append(index)
            except CorruptImageError as error:
                logger.warning("%s It is left out.", error)
        if not good:
            raise CorruptImageError(f"None of the {len(self)} images of {self._split or 'the data'} can be decoded.")
        return good

    def pixels_from_image(self, image: Image.Image) -> Tensor:
        """Pixels of any image at the model's size, not augmented: (C, H, W) float32 in [0, 1]."""
        return self.preprocessing.pixels_from_image(image)

    def label(self, index: int) -> int:
        """The label of a row, as the model numbers it."""
        return _label(self._rows[index][self._label_column], self._remap, self._num_labels, self._where(index))

    def content_fingerprint(self) -> str:
        """A hash (16 hexadecimal digits) that tells these images and labels from others, whatever their files' names.

        It covers the number of rows, the classes' names, the files of 64 evenly spaced rows with their labels, and of a
        `datasets.Dataset` all labels in their order: an image that changed between the 64 is not noticed.
        """
        rows, described = self._rows, [str(len(self))]
        if isinstance(rows, datasets.Dataset):
            labels = labels_of(rows, self._label_column)
            described += [repr(class_names(rows, self._label_column)), hashlib.sha256(labels.tobytes()).hexdigest()]
        places = sorted({round(place) for place in np.linspace(0, len(self) - 1, FINGERPRINT_ROWS)})
        sample = (rows[place] for place in places)
        return rows_fingerprint(((row[self._image_column], row[self._label_column]) for row in sample), *described)

    @property
    def corrupt_rows(self) -> list[int]:
        """The rows found unreadable so far, by this process and its workers (``on_corrupt="skip"``)."""
        return [] if self._corrupt is None else self._corrupt.nonzero().flatten().tolist()

    def set_epoch(self, epoch: int) -> None:
        """New crops and flips; workers that live on see it too. A view of ``with_stream`` is not affected.

        In one process accelerate's loader calls this; in several it does not (accelerate 1.15 stops at the sampler),
        and whoever runs the epochs must, as NullspaceTrainer does.
        """
        self._epoch.fill_(epoch)

    def with_stream(self, *key: int | str) -> "ImageClassificationDataset":
        """The same rows, augmented from (``seed``, ``*key``, index) whatever the epoch; e.g. ``("noise", round)``."""
        view = copy.copy(self)
        view._stream = key
        return view

    def _where(self, index: int) -> str:
        return f"Row {index} of {self._split}" if self._split else f"Row {index}"

    def _key(self) -> tuple[int | str, ...]:
        return ("epoch", int(self._epoch)) if self._stream is None else ("stream", *self._stream)

    def _good_row(self, index: int) -> tuple[Mapping[str, Any], Image.Image]:
        for tried in range(index, index + min(len(self), CORRUPT_IN_A_ROW)):
            place = tried % len(self)
            if self._corrupt is not None and self._corrupt[place]:
                continue
            row = self._rows[place]
            try:
                hint = SKIP_HINT if self._corrupt is None else ""
                return row, decoded_image(row[self._image_column], self._where(place), hint)
            except CorruptImageError as error:
                if self._corrupt is None:
                    raise
                self._corrupt[place] = True
                logger.warning("%s The next good row takes its place.", error)
        raise CorruptImageError(
            f"Rows {index} to {place}{' of ' + self._split if self._split else ''} have no readable image. "
            "Check the disk and image_column."
        )


class StreamingImageClassificationDataset(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The same items from a `datasets.IterableDataset`: nothing is downloaded beforehand, and there is no length.

    ``shuffle_buffer`` images are held (encoded) to draw the next from; 0 keeps the order. ``repeat=True`` starts over
    for ever, in a new order: a Trainer then sees one epoch of ``max_steps``, and a resumed run skips to the right
    place (otherwise Trainer counts batches from the start of a stream that has ended by then).

    An image's crop and flip depend on (``seed``, epoch, the bytes of its file), because a stream has no row numbers;
    so they do not depend on workers, processes or order. The order depends on ``seed``, the epoch and how the shards
    fall on processes and workers: keep these numbers when resuming. ``on_corrupt="skip"`` leaves out, and logs, images
    that cannot be decoded; by default they raise ``CorruptImageError``.

    Iterating raises ``DataError`` for an empty stream, a label out of range (``num_labels``, ``remap``), a broken
    connection.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
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
        shuffle_buffer: int = 0,
        repeat: bool = False,
    ) -> None:
        if not isinstance(rows, datasets.IterableDataset):
            raise TypeError(f"rows is a {type(rows).__name__}; expected a datasets.IterableDataset (streaming=True).")
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self._rows = undecoded(rows, image_column)
        self._image_column, self._label_column = image_column, label_column
        self._remap, self._num_labels, self._normalize = remap, num_labels, normalize
        self._split = _split_name(rows, None)
        self._skip_corrupt, self._shuffle_buffer, self._repeat = on_corrupt == "skip", shuffle_buffer, repeat
        self._node: tuple[int, int] | None = None
        self._stream: tuple[int | str, ...] | None = None
        self._epoch = in_shared_memory(torch.zeros((), dtype=torch.int64))  # seen by persistent workers

    def set_epoch(self, epoch: int) -> None:
        """A new order and new crops from the next iteration on. A view of ``with_stream`` is not affected."""
        self._epoch.fill_(epoch)

    def with_stream(self, *key: int | str, shuffle_buffer: int = 1000) -> "StreamingImageClassificationDataset":
        """One pass over the same images in an order and with crops of their own, drawn from (``seed``, ``*key``)."""
        view = copy.copy(self)
        view._stream, view._shuffle_buffer, view._repeat = key, shuffle_buffer, False
        return view

    @property
    def num_shards(self) -> int:
        """How many workers can read at once."""
        return self._rows.num_shards

    def split(self, rank: int, world_size: int) -> "StreamingImageClassificationDataset":
        """The part of one process: whole shards where their number divides by ``world_size``, else every n-th image."""
        view = copy.copy(self)
        view._node = (rank, world_size)
        return view

    def content_fingerprint(self) -> str:
        """A hash (16 hexadecimal digits) of the classes' names and of the first 64 rows: their files and their labels.

        A stream's other rows would have to be read once more; a change among them is not noticed.
        """
        first = told_when_broken(self._rows.take(FINGERPRINT_ROWS))
        rows = ((row[self._image_column], row[self._label_column]) for row in first)
        return rows_fingerprint(rows, "stream", class_names(self._rows, self._label_column))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        key = ("epoch", int(self._epoch)) if self._stream is None else ("stream", *self._stream)
        turn = 0
        while True:
            empty = True
            for item in self._one_pass((*key, turn)):
                empty = False
                yield item
            whole = torch.utils.data.get_worker_info() is None and self._node is None
            if empty and whole:
                raise DataError("The stream has no images. Choose another split, or extract archives first.")
            if empty or not self._repeat:  # a worker without a shard must not look for one for ever
                return
            turn += 1

    def _one_pass(self, key: tuple[int | str, ...]) -> Iterator[dict[str, Any]]:
        rows = self._rows
        if self._shuffle_buffer:
            rows = rows.shuffle(seed=seed_for(self.seed, *key), buffer_size=self._shuffle_buffer)
        if self._node is not None:
            rows = split_dataset_by_node(rows, *self._node)
        stream = "shuffled stream" if self._shuffle_buffer else "stream"
        of = f"of the {stream} of {self._split}" if self._split else f"of this {stream}"
        hint = "" if self._skip_corrupt else SKIP_HINT
        for position, row in enumerate(told_when_broken(rows)):
            where = f"Row {position} {of}"
            try:
                image = decoded_image(row[self._image_column], where, hint)
            except CorruptImageError as error:
                if not self._skip_corrupt:
                    raise
                logger.warning("%s It is left out.", error)
                continue
            label = _label(row[self._label_column], self._remap, self._num_labels, where)
            if self.augmentation is not None:
                generator = generator_for(self.seed, *key, content_key(row[self._image_column]))
                image = self.augmentation.apply(image, generator)
            yield _item(image, label, self.preprocessing, self._normalize, augmented=self.augmentation is not None)


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


def _split_name(rows: Any, split: str | None) -> str:
    """How errors call the split; "" where it has no name."""
    split = split or getattr(rows, "split", None)
    return f"split {str(split)!r}" if split else ""


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
