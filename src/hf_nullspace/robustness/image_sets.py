"""Images with labels and one preprocessing: on demand, as a stream, a part of a set, or kept in memory."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_nullspace.models.image_files import decoded_image, told_when_broken, undecoded
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.label_spaces import LabelError


class ImageSet:
    """Images with labels and one preprocessing; what ``suite.evaluate`` takes.

    ``rows`` is a `datasets.Dataset` with ``image`` and ``label``; ``labels[row["label"]]`` is the class among all that
    the model knows, ``subset`` the classes among which the answer is looked for. ``ready``: the images have the input's
    size already, and one that has not is an error. ``origin`` says where on the Hub they come from.
    """

    origin = ""

    def __init__(
        self,
        name: str,
        rows: Any,
        preprocessing: Preprocessing,
        *,
        labels: Sequence[int] | None = None,
        subset: Sequence[int] | None = None,
        note: str = "",
        ready: bool = False,
    ):
        self.name, self.rows, self.preprocessing = name, undecoded(rows, "image"), preprocessing
        self.labels, self.subset, self.note, self.ready = labels, subset, note, ready
        # Asking a row for its label would decode its image; so the column is read once.
        self.row_labels = rows["label"][:] if isinstance(rows, datasets.Dataset) else None

    def __len__(self) -> int:
        return len(self.rows)

    def raw_image(self, index: int) -> Image.Image:
        """Raises ``CorruptImageError``, with the set, the row and the file, where it cannot be decoded."""
        return decoded_image(self.rows[index]["image"], f"{self.name}: row {index}")

    def label(self, index: int) -> int:
        return self.class_of(self.rows[index]["label"] if self.row_labels is None else self.row_labels[index], index)

    def class_of(self, label: int | None, index: int) -> int:
        """The class of row ``index``; raises ``LabelError`` for no label, a negative one and one without a class."""
        known = None if self.labels is None else len(self.labels)
        if label is None or label < 0 or (known is not None and label >= known):
            expected = "0 or more" if known is None else f"0 to {known - 1}"
            raise LabelError(
                f"{self.name}: row {index} has label {label}, expected {expected}. Use a split with labels (-1 is none)"
            )
        return int(label) if self.labels is None else self.labels[label]

    def pixels_from_image(self, image: Image.Image) -> Tensor:
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
        described = {"set": self.name, "resize": resize, "input": f"{p.size[0]}x{p.size[1]}"}
        return described | {key: text for key, text in (("from", self.origin), ("note", self.note)) if text}


class ImageStream(ImageSet):
    """The same from a `datasets.IterableDataset`: no length, read once per condition, nothing downloaded beforehand."""

    expected = 0  # the published number of images, for the progress bar
    source: datasets.Dataset | str | None = None  # the rows that are streamed, or the commit that they come from

    def __len__(self) -> int:
        raise TypeError(f"{self.name} is a stream; it has no length before it was read")

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for index, row in enumerate(told_when_broken(self.rows)):
            image = decoded_image(row["image"], f"{self.name}: row {index} of the stream")
            yield image, self.class_of(row["label"], index)


class ArrayRows:
    """Rows of a uint8 array (n, H, W, 3) that may lie on disk."""

    def __init__(self, images: Any, labels: Any):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(np.asarray(self.images[index])), "label": int(self.labels[index])}


class Part:
    """At most ``limit`` evenly spaced images of a set; the protocol of its results says so."""

    def __init__(self, images: Any, limit: int):
        self.images = images
        self.places = sorted({round(place) for place in np.linspace(0, len(images) - 1, min(limit, len(images)))})
        self.subset = getattr(images, "subset", None)

    def __len__(self) -> int:
        return len(self.places)

    def raw_image(self, index: int) -> Image.Image:
        image: Image.Image = self.images.raw_image(self.places[index])
        return image

    def label(self, index: int) -> int:
        return int(self.images.label(self.places[index]))

    def pixels_from_image(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.images.pixels_from_image(image)
        return pixels

    def protocol(self) -> dict[str, Any]:
        described = dict(self.images.protocol()) if hasattr(self.images, "protocol") else {}
        notes = [described["note"]] if "note" in described else []
        return described | {"note": "; ".join([*notes, f"{len(self)} of {len(self.images)} images, evenly spaced"])}


class InMemory:
    """A set whose pixels were prepared once and stay in memory as 8-bit numbers (a quarter of float32).

    Conditions that do not corrupt the images take their batches from there; pixels that were 8-bit stay what they were.
    Raises ``ValueError`` where they were not (a ``pixels_from_image`` that computes in between).
    """

    def __init__(self, images: Any):
        self.images, self.subset = images, getattr(images, "subset", None)
        self.places = getattr(images, "places", None)
        rows = []
        for index in range(len(images)):
            pixels = images.pixels_from_image(images.raw_image(index))
            rows.append((pixels * 255).round().to(torch.uint8))
            if not torch.equal(rows[-1] / 255, pixels):
                raise ValueError(f"image {index} has pixels between the 8-bit levels; it cannot be kept in 8 bits")
        self.pixels = torch.stack(rows)
        self.labels = torch.tensor([images.label(index) for index in range(len(images))])

    def __len__(self) -> int:
        return len(self.images)

    def raw_image(self, index: int) -> Image.Image:
        image: Image.Image = self.images.raw_image(index)
        return image

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def pixels_from_image(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.images.pixels_from_image(image)
        return pixels

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """8-bit pixels (B, C, H, W) and labels (B,) of these images."""
        where = torch.as_tensor(indices)
        return self.pixels[where], self.labels[where]

    def protocol(self) -> dict[str, Any]:
        return dict(self.images.protocol()) if hasattr(self.images, "protocol") else {}


def content_digest(images: Any) -> str:
    """A hash that tells a set from one with other files, without decoding any.

    It covers every byte of a set that sits in Arrow or an array, the sizes of image files that lie on disk, and the
    commit of a stream from the Hub; "" for images of another kind.
    """
    rows, digest = _rows_of(images), hashlib.sha256()
    if isinstance(rows, str):
        return rows
    if isinstance(rows, ArrayRows):
        digest.update(np.ascontiguousarray(rows.images).data)
    elif isinstance(rows, datasets.Dataset):
        for chunk in rows.data.column("image").chunks:
            for content, path in zip(chunk.field("bytes"), chunk.field("path"), strict=True):
                if not content.is_valid and not path.is_valid:
                    digest.update(b"no image")  # an error once its row is read
                    continue
                size = len(content.as_buffer()) if content.is_valid else Path(path.as_py()).stat().st_size
                digest.update(size.to_bytes(8, "little"))
                if content.is_valid:
                    digest.update(content.as_buffer())
    else:
        return ""
    return digest.hexdigest()


def modification_stamp(images: Any) -> str:
    """A hash of when each image file of a set was last written; "" where its images are no files on disk.

    It notices a file that was replaced by one of the same size, and changes when a set is copied: something for the
    records of a run on this machine, not a property of the set.
    """
    rows, digest = _rows_of(images), hashlib.sha256()
    if not isinstance(rows, datasets.Dataset):
        return ""
    for chunk in rows.data.column("image").chunks:
        for content, path in zip(chunk.field("bytes"), chunk.field("path"), strict=True):
            if path.is_valid and not content.is_valid:
                digest.update(Path(path.as_py()).stat().st_mtime_ns.to_bytes(16, "little"))
    return digest.hexdigest()


def _rows_of(images: Any) -> Any:
    """What a set, a part of one, one in memory or a stream is made of."""
    while not hasattr(images, "rows") and hasattr(images, "images"):
        images = images.images
    return getattr(images, "source", None) or getattr(images, "rows", None)
