"""The same images, labels and items as :mod:`~hf_nullspace.data.image_set`, from a stream."""

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from hf_nullspace.data.augmentation import seed_for
from hf_nullspace.data.columns import class_names
from hf_nullspace.data.fingerprints import content_key, rows_fingerprint
from hf_nullspace.data.image_files import CorruptImageError, DataError, decoded_image, readable_stream
from hf_nullspace.data.image_set import FINGERPRINT_ROWS, ImageSet, LabelledImages

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class ImageStream(LabelledImages, torch.utils.data.IterableDataset[dict[str, Any]]):
    """The same items from a `datasets.IterableDataset`: nothing is downloaded beforehand, and there is no length.

    An image's augmentation depends on (``seed``, epoch, the bytes of its file), because a stream has no row numbers; so
    it does not depend on workers, processes or order. The order depends on ``seed``, the epoch and how the shards fall
    on processes and workers: keep these numbers when resuming. With mixup and CutMix an image is joined with the one
    before it in this order, the first of a pass with itself.

    Args:
        shuffle_buffer: so many images are held (encoded) to draw the next from; 0 keeps the order.
        repeat: start over for ever, in a new order: a Trainer then sees one epoch of ``max_steps``, and a resumed run
            skips to the right place (otherwise it counts batches from the start of a stream that has ended by then).
        expected: the published number of images.

    Iterating raises ``DataError`` for an empty stream, a label out of range, a broken connection.
    """

    _: KW_ONLY
    shuffle_buffer: int = 0
    repeat: bool = False
    expected: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rows, datasets.IterableDataset):
            raise TypeError(
                f"rows is a {type(self.rows).__name__}; expected a datasets.IterableDataset (streaming=True)."
            )
        super().__post_init__()
        self._node: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        key, turn = self._randomness(), 0
        while True:
            empty = True
            for item in self._one_pass((*key, turn)):
                empty = False
                yield item
            whole = torch.utils.data.get_worker_info() is None and self._node is None
            if empty and whole:
                raise DataError("The stream has no images. Choose another split, or extract archives first.")
            if empty or not self.repeat:  # a worker without a shard must not look for one for ever
                return
            turn += 1

    def pairs(self) -> Iterator[tuple[Image.Image, int]]:
        """Every image once, in order, at its own size and not augmented, with its label as the model numbers it."""
        return ((image, label) for _, image, label in self._decoded(self.rows, "stream"))

    def with_key(self, *key: int | str, shuffle_buffer: int = 1000) -> "ImageStream":
        """One pass over the same images in an order and with crops of their own, drawn from (``seed``, ``*key``)."""
        view = copy.copy(self)
        view._key, view.shuffle_buffer, view.repeat = key, shuffle_buffer, False
        return view

    def of_process(self, rank: int, world_size: int) -> "ImageStream":
        """The part of one process: whole shards where their number divides by ``world_size``, else every n-th image."""
        view = copy.copy(self)
        view._node = (rank, world_size)
        return view

    @property
    def num_shards(self) -> int:
        """How many workers can read at once."""
        return int(self.rows.num_shards)

    def content_fingerprint(self) -> str:
        """A hash (16 hexadecimal digits) of the classes' names and of the first 64 rows: their files and their labels.

        A stream's other rows would have to be read once more; a change among them is not noticed.
        """
        return rows_fingerprint(readable_stream(self.rows.take(FINGERPRINT_ROWS)), "stream", class_names(self.rows))

    def _one_pass(self, key: tuple[int | str, ...]) -> Iterator[dict[str, Any]]:
        rows, kind = self.rows, "stream"
        if self.shuffle_buffer:
            rows = rows.shuffle(seed=seed_for(self.seed, *key), buffer_size=self.shuffle_buffer)
            kind = "shuffled stream"
        if self._node is not None:
            rows = split_dataset_by_node(rows, *self._node)
        before: dict[str, Any] | None = None
        for row, image, label in self._decoded(rows, kind):
            own = (*key, content_key(row["image"]))
            item = self._item(image, label, *own)
            yield self._mixed(item, before or item, *own) if self._mixes else item
            before = item

    def _decoded(self, rows: Any, kind: str) -> Iterator[tuple[Mapping[str, Any], Image.Image, int]]:
        for position, row in enumerate(readable_stream(rows)):
            where = f"Row {position} of the {kind} of {self.called}"
            try:
                image = decoded_image(row["image"], where, self._hint)
            except CorruptImageError as error:
                if self.on_corrupt != "skip":
                    raise
                logger.warning("%s It is left out.", error)
                continue
            yield row, image, self.class_of(row["label"], where)


Images = ImageSet | ImageStream
