"""Images as data sets hold them: encoded, as bytes or as the path of a file."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import numpy as np
from PIL import Image

from hf_nullspace.models.preprocessing import rgb_image

FINGERPRINT_ROWS = 64


class DataError(ValueError):
    """The data cannot be used as asked. The message is one line for a terminal: what came, what was expected, what
    to do."""


class CorruptImageError(DataError):
    """An image that cannot be decoded; the message names row and file."""


def undecoded(rows: Any, column: str) -> Any:
    """The same rows with the images of ``column`` as bytes and path: so we decode, and can say which row is broken.

    A stream must come here before anything maps or renames its columns: `datasets` decodes for that, and what it then
    has as a PIL image it encodes once more, a JPEG with a loss (datasets 5.2).
    """
    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return rows
    if not isinstance((rows.features or {}).get(column), datasets.Image):
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.decode(False)  # takes the threads away as well that decode what comes from the Hub
    return rows.cast_column(column, datasets.Image(decode=False))


def decoded_image(value: Any, where: str) -> Image.Image:
    if isinstance(value, str):
        value = {"bytes": None, "path": value}
    path = value.get("path") if isinstance(value, Mapping) else None
    named = f"{where} ({path})" if path else where
    if value is None or (isinstance(value, Mapping) and value.get("bytes") is None and not path):
        raise CorruptImageError(f"{named} has no image. Remove the row, or pass on_corrupt='skip'.")
    try:
        if isinstance(value, np.ndarray):
            return rgb_image(Image.fromarray(value))
        if isinstance(value, Image.Image):  # decode_example of datasets 4 does not take it
            return rgb_image(value)
        if path and value.get("bytes") is None and "://" not in path:
            # Read here: decode_example leaves a local file open when it cannot be decoded.
            value = {"bytes": Path(path).read_bytes(), "path": path}
        return rgb_image(datasets.Image().decode_example(value))
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise CorruptImageError(
            f"{named} cannot be decoded: {type(error).__name__}: {error}. "
            "Replace or remove the file, or pass on_corrupt='skip'."
        ) from error


def content_key(value: Any) -> str:
    """What the image is, wherever it lies: a digest of the file, or its name and folder when it is only a path."""
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return hashlib.sha256(value["bytes"]).hexdigest()
    if isinstance(value, (str, Mapping)):
        path = value if isinstance(value, str) else value["path"]
        return "/".join(PurePosixPath(path.replace("\\", "/")).parts[-2:])
    return hashlib.sha256(np.asarray(value).tobytes()).hexdigest()


def rows_fingerprint(rows: Iterable[tuple[Any, Any]], *described: Any) -> str:
    """A hash (16 hexadecimal digits) of what ``described`` says and of images with their labels, in their order.

    An image counts with every byte of its file, not with its name; one that cannot be read counts as that.
    """
    digest = hashlib.sha256(repr(described).encode())
    for image, label in rows:
        digest.update(f"{label} {_content_hash(image)}".encode())
    return digest.hexdigest()[:16]


def _content_hash(image: Any) -> str:
    if isinstance(image, str):
        image = {"bytes": None, "path": image}
    if image is None or (isinstance(image, Mapping) and image.get("bytes") is None and not image.get("path")):
        return "none"
    if not isinstance(image, Mapping):  # a PIL image or an array
        array = np.asarray(image)
        return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    try:
        return hashlib.sha256(encoded_bytes(image)).hexdigest()
    except OSError as error:
        return f"unreadable: {type(error).__name__}"


def encoded_bytes(image: Mapping[str, Any]) -> bytes:
    """The bytes of ``{"bytes": ..., "path": ...}``, read from the path, local or remote, where it has none itself.

    Raises ``OSError`` where the file cannot be read.
    """
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    path = str(image["path"])
    if "://" not in path:
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        content: bytes = file.read()
    return content
