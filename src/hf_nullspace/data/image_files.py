"""Images as data sets hold them: encoded, as bytes or as the path of a file."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch
from datasets import Features
from PIL import Image

from hf_nullspace.models.preprocessing import rgb_image

STREAM_BATCH = 16  # rows of a stream that are one table


class DataError(ValueError):
    """The data cannot be used as asked. The message is one line for a terminal: what came, what was expected, what
    to do."""


class CorruptImageError(DataError):
    """An image that cannot be decoded; the message names row, split and file, where they are known."""


def undecoded(rows: Any) -> Any:
    """The same rows with images as bytes and path: so we decode, and can say which row is broken."""
    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return rows
    images = [name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
    if images and isinstance(rows, datasets.IterableDataset):
        return rows.decode(False)  # takes the threads away as well that decode what comes from the Hub
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def on_tables(
    rows: datasets.IterableDataset, change: Callable[[pa.Table, list[int]], pa.Table], features: Features
) -> datasets.IterableDataset:
    """A stream with ``change`` made to Arrow tables of a few rows and their numbers: images stay the bytes they are.

    `rename_columns` and a `map` of rows shuffle in another order afterwards (datasets 5.2). ``change`` must pickle.
    """
    tables = undecoded(rows).with_format("arrow").map(change, with_indices=True, batched=True, batch_size=STREAM_BATCH)
    return tables.with_format(None).cast(features)


def chosen_columns(rows: Any, names: Mapping[str, str]) -> Any:
    """The columns of a `datasets` set or stream that are keys of ``names``, under their new names."""
    if isinstance(rows, datasets.IterableDataset):
        known = features_of(rows)
        return on_tables(rows, partial(_chosen, names=names), Features({new: known[old] for old, new in names.items()}))
    rows = rows.select_columns(list(names))
    renamed = {old: new for old, new in names.items() if old != new}
    return rows.rename_columns(renamed) if renamed else rows


def _chosen(table: pa.Table, places: list[int], names: Mapping[str, str]) -> pa.Table:
    return pa.table({new: table[old] for old, new in names.items()})


def features_of(rows: datasets.Dataset | datasets.IterableDataset) -> Features:
    """The features, also of json and csv streams, which know them only after their first rows."""
    return rows.features if rows.features is not None else rows._resolve_features().features


def without_image(value: Any) -> bool:
    """Whether a row has neither bytes nor a path."""
    return value is None or (isinstance(value, Mapping) and value.get("bytes") is None and not value.get("path"))


def decoded_image(value: Any, where: str, hint: str = "") -> Image.Image:
    """The RGB image of a row: of a PIL image, a uint8 array (H, W, 3), a path, or ``{"bytes": ..., "path": ...}``.

    ``where`` names the row in errors, ``hint`` says there what else can be done. More pixels than Pillow warns of
    (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million) are refused: one such image takes minutes and gigabytes.

    Raises ``CorruptImageError`` where there is no image or it cannot be decoded, ``DataError`` where a remote file
    cannot be read.
    """
    if isinstance(value, str):
        value = {"bytes": None, "path": value}
    path = value.get("path") if isinstance(value, Mapping) else None
    named = f"{where} ({path})" if path else where
    if without_image(value):
        raise CorruptImageError(f"{named} has no image. Remove the row{hint}.")
    try:
        content = encoded_bytes(value) if isinstance(value, Mapping) else None
    except Exception as error:
        message = f"{named} cannot be read: {_line(error)}."
        if "://" in str(path):  # no fault of the file's
            raise DataError(f"{message} Check the connection, and start again.") from error
        raise CorruptImageError(f"{message} Replace or remove the file{hint}.") from error
    try:
        if isinstance(value, np.ndarray):
            return rgb_image(Image.fromarray(value))
        if content is None:  # decode_example of datasets 4 does not take a PIL image
            return rgb_image(value)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return rgb_image(datasets.Image().decode_example({"bytes": content, "path": None}))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        size = str(error).partition(", could be")[0]
        raise CorruptImageError(f"{named} is too large: {size}. Resize or remove it{hint}.") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        message = f"{named} cannot be decoded: {_line(error)}. Replace or remove the file{hint}."
        raise CorruptImageError(message) from error


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


def check_names(paths: Iterable[str]) -> None:
    """``DataError`` for a path that is no UTF-8: Arrow, and so `datasets`, cannot hold it."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            shown = path.encode("utf-8", "backslashreplace").decode()
            raise DataError(f"{shown}: the name of this file or folder is no UTF-8. Rename it.") from error


def readable_stream(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows of a stream; what breaks it is a ``DataError`` of one line."""
    position = 0
    try:
        for row in rows:
            yield row
            position += 1
    except DataError:
        raise
    except Exception as error:  # the network, the file system and the parsers of several libraries
        raise DataError(
            f"The stream broke after {position} rows: {_line(error)}. "
            "Check the connection and resume from the last checkpoint."
        ) from error


def in_shared_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where workers see its changes. Raises DataError if there is no room."""
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        raise DataError(f"no room in shared memory; make /dev/shm larger ({error})") from error


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or ["no message"])[0].partition(" <_io.BytesIO")[0]  # Pillow's words
    return f"{type(error).__name__}: {text}"
