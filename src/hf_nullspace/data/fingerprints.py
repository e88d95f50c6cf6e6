"""What images are, by the bytes of their files, wherever they lie and whatever they are called."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np

from hf_nullspace.data.image_files import encoded_bytes, without_image


def content_key(value: Any) -> str:
    """What the image of a row is: a digest of the file, or its name and folder when it is only a path."""
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return hashlib.sha256(value["bytes"]).hexdigest()
    if isinstance(value, (str, Mapping)):
        path = value if isinstance(value, str) else value["path"]
        return "/".join(PurePosixPath(path.replace("\\", "/")).parts[-2:])
    return hashlib.sha256(np.asarray(value).tobytes()).hexdigest()


def rows_fingerprint(rows: Iterable[Mapping[str, Any]], *described: Any) -> str:
    """A hash (16 hexadecimal digits) of what ``described`` says and of images with their labels, in their order.

    An image counts with every byte of its file, not with its name; one that cannot be read counts as that.
    """
    digest = hashlib.sha256(repr(described).encode())
    for row in rows:
        digest.update(f"{row['label']} {_content_hash(row['image'])}".encode())
    return digest.hexdigest()[:16]


def _content_hash(image: Any) -> str:
    if without_image(image):
        return "none"
    if isinstance(image, str):
        image = {"bytes": None, "path": image}
    if not isinstance(image, Mapping):  # a PIL image or an array
        array = np.asarray(image)
        return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    try:
        return hashlib.sha256(encoded_bytes(image)).hexdigest()
    except OSError as error:
        return f"unreadable: {type(error).__name__}"


def table_digest(rows: datasets.Dataset) -> str:
    """A hash of every byte of the images inside a table, and of the sizes of those that are files on disk."""
    digest = hashlib.sha256()
    for content, path in _images(rows):
        if not content.is_valid and not path.is_valid:
            digest.update(b"no image")  # an error once its row is read
            continue
        size = len(content.as_buffer()) if content.is_valid else Path(path.as_py()).stat().st_size
        digest.update(size.to_bytes(8, "little"))
        if content.is_valid:
            digest.update(content.as_buffer())
    return digest.hexdigest()


def table_stamp(rows: datasets.Dataset) -> str:
    """A hash of when the images that are files on disk were last written."""
    digest = hashlib.sha256()
    for content, path in _images(rows):
        if path.is_valid and not content.is_valid:
            digest.update(Path(path.as_py()).stat().st_mtime_ns.to_bytes(16, "little"))
    return digest.hexdigest()


def _images(rows: datasets.Dataset) -> Iterator[tuple[Any, Any]]:
    """The scalars (bytes, path) of the whole table, also where ``rows`` are a selection of it."""
    for chunk in rows.data.column("image").chunks:
        yield from zip(chunk.field("bytes"), chunk.field("path"), strict=True)
