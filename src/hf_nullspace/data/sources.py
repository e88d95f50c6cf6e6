"""Where images come from: the built-in digits, a folder, or the Hub; always the columns ``image`` and ``label``."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage

from hf_nullspace.data.columns import (
    check_labels,
    find_columns,
    is_text,
    labels_of,
    standard_columns,
    text_classes,
)
from hf_nullspace.data.image_files import DataError, check_names, features_of

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLIT_NAMES = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TABLE_ENDINGS = frozenset({".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar"})  # tar: webdataset
ARCHIVE_ENDINGS = frozenset({".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})
STREAM_SHARDS = 64  # a local set as a stream: enough for 64 workers, few enough to shuffle within each


def load_image_dataset(
    name_or_path: str | os.PathLike[str],
    split: str = "train",
    *,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """One split of an image classification set with the columns ``image`` (Image) and ``label``.

    ``name_or_path`` is ``"digits"`` (built in: scikit-learn's 1,797 handwritten digits), a folder, or a Hub id. A
    folder holds class folders of images, with or without ``train/`` and ``test/`` above them; or parquet (also csv,
    json, webdataset tar) files; or what ``save_to_disk`` wrote. The label is a ClassLabel where the classes have
    names. Text labels are numbered in sorted order over all splits; a stream of them needs ``class_names``.

    Raises ``DataError`` (one line for a terminal) when there is no such set, split or column, the Hub cannot be
    reached, the split is empty, or a label is missing or out of range (in a stream: once the row comes).
    """
    name = os.fspath(name_or_path)
    rows = _open(name, split, streaming, config_name, revision)
    features = features_of(rows)
    column = find_columns(features, image_column, label_column)[1]
    if class_names is None and not streaming and is_text(features[column]):
        class_names = text_classes(_open(name, None, streaming, config_name, revision), column)
    rows = standard_columns(rows, image_column, label_column, class_names)
    if isinstance(rows, datasets.Dataset):
        _check(rows, f"split {split!r} of {name}")
    return rows


def split_names(
    name_or_path: str | os.PathLike[str],
    *,
    streaming: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
) -> list[str]:
    """The splits of a set; the arguments, and what is raised, are those of :func:`load_image_dataset`."""
    return list(_open(os.fspath(name_or_path), None, streaming, config_name, revision))


def _open(name: str, split: str | None, streaming: bool, config_name: str | None, revision: str | None) -> Any:
    """One split as it lies there; all splits in a dict for None."""
    folder = Path(name).expanduser()
    if name == "digits":
        return _choose(digits(), split, name, streaming)
    if folder.is_dir():
        return _open_folder(folder, split, streaming, config_name)
    if folder.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        came = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{name!r} {came}; expected a folder of images or parquet files, a Hub data set, or 'digits'.")
    return _through_datasets(name, split, streaming, config_name, revision)


def _check(rows: datasets.Dataset, where: str) -> None:
    if len(rows) == 0:
        raise DataError(f"There is no image in {where}. Choose another split, or extract archives first.")
    label = rows.features["label"]
    check_labels(labels_of(rows, where), label.num_classes if isinstance(label, ClassLabel) else None, where)


def digits() -> datasets.DatasetDict:
    """Scikit-learn's handwritten digits as 8x8 RGB images, 80% train and 20% test of every class, always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "The built-in digits come with scikit-learn, which is not installed: pip install 'hf-nullspace[demo]'."
        ) from error
    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    order = np.random.default_rng(0).permutation(len(grey))
    in_test = np.zeros(len(grey), dtype=bool)
    for digit in range(10):
        of_digit = order[bunch.target[order] == digit]
        in_test[of_digit[: round(0.2 * len(of_digit))]] = True
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    splits = datasets.DatasetDict()
    for split, chosen in (("train", ~in_test), ("test", in_test)):
        images = [PILImage.fromarray(image).convert("RGB") for image in grey[chosen]]
        columns = {"image": images, "label": bunch.target[chosen].tolist()}
        splits[split] = datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
    return splits


def _choose(splits: Mapping[str, datasets.Dataset], split: str | None, where: str, streaming: bool) -> Any:
    if split is None:
        return splits
    if split not in splits:
        raise DataError(f"{where} has no split {split!r}; it has {', '.join(map(repr, splits))}.")
    rows = splits[split]
    if len(rows) == 0:
        raise DataError(f"There is no image in split {split!r} of {where}. Choose another split.")
    return rows.to_iterable_dataset(num_shards=min(STREAM_SHARDS, len(rows))) if streaming else rows


def _open_folder(folder: Path, split: str | None, streaming: bool, config_name: str | None) -> Any:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _choose(_saved(folder), split, str(folder), streaming)
    images, others = _files(folder)
    if images and not any(Path(name).stem == "metadata" for name in others):
        return _choose(_class_folders(folder, images, split), split, str(folder), streaming)
    endings = {Path(name).suffix.lower() for name in others}
    if images or endings & TABLE_ENDINGS:
        return _through_datasets(str(folder), split, streaming, config_name, None)
    if endings & ARCHIVE_ENDINGS:
        raise DataError(
            f"{folder} holds archives ({', '.join(sorted(endings & ARCHIVE_ENDINGS))}): extract them first."
        )
    raise DataError(
        f"{folder} holds neither images nor parquet files (found: {', '.join(sorted(endings)) or 'nothing'})."
    )


def _saved(folder: Path) -> Mapping[str, datasets.Dataset]:
    try:
        saved = datasets.load_from_disk(str(folder))
    except IndexError as error:  # how `datasets` fails on a split without rows
        raise DataError(f"Cannot read {folder}, a save_to_disk folder: a split has no rows. Save it again.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {folder}, a save_to_disk folder: {_reason(error)}.") from error
    return saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}


def _files(folder: Path) -> tuple[dict[tuple[str, ...], list[str]], list[str]]:
    """The image files by the folders (below ``folder``) that they lie in, and the names of the other files."""
    images, others = {}, []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in names if not name.startswith("."))  # "._x.jpg" is no image
        here = [name for name in visible if Path(name).suffix.lower() in IMAGE_ENDINGS]
        if here:
            images[Path(directory).relative_to(folder).parts] = here
        others += [name for name in visible if name not in set(here)]
    return images, others


def _class_folders(
    folder: Path, images: Mapping[tuple[str, ...], list[str]], split: str | None
) -> dict[str, datasets.Dataset]:
    """``folder/class/x.png`` (one split, "train") or ``folder/split/class/x.png``.

    Not through the `imagefolder` builder: that also takes splits from parts of file and class names ("cat/test_1.jpg",
    a class "train"), and drops all labels, with no word, where the depths differ.
    """
    by_split = all(parts and parts[0].lower() in SPLIT_NAMES for parts in images)
    depth = 2 if by_split else 1
    for parts in images:
        if len(parts) != depth:
            raise DataError(
                f"{folder.joinpath(*parts)} holds images, but {folder} "
                f"{'has split folders, so expected split/class/image' if by_split else 'is expected as class/image'}. "
                "Name the folder with one subfolder per class."
            )
    class_folders = {parts[-1] for parts in images}
    # Classes "0" to "999" in the order of their numbers: as text, "10" would come before "2".
    numbers = all(name.isdecimal() for name in class_folders)
    names = sorted(class_folders, key=int) if numbers else sorted(class_folders)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    label_ids = {name: index for index, name in enumerate(names)}
    columns: dict[str, dict[str, list[Any]]] = {}
    sources: dict[str, str] = {}
    for parts, files in images.items():
        into = SPLIT_NAMES[parts[0].lower()] if by_split else "train"
        if by_split and sources.setdefault(into, parts[0]) != parts[0]:
            raise DataError(f"{folder} has two folders for one split: {sources[into]!r} and {parts[0]!r}. Rename one.")
        column = columns.setdefault(into, {"image": [], "label": []})
        paths = [str(folder.joinpath(*parts, name)) for name in files]
        check_names(paths)
        column["image"] += paths
        column["label"] += [label_ids[parts[-1]]] * len(files)
    return {
        into: datasets.Dataset.from_dict(column, features=features, split=datasets.NamedSplit(into))
        for into, column in columns.items()
        if split in (None, into) or split not in columns
    }


def _through_datasets(
    name: str, split: str | None, streaming: bool, config_name: str | None, revision: str | None
) -> Any:
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"There is no data set {name!r} on the Hub that you may read, and no local folder of that name. Check the "
            "spelling; for a private or gated one, log in with `hf auth login`."
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"The Hub cannot be reached for the data set {name!r}, it is not in the cache, and there is no local "
            f"folder of that name ({_reason(error)}). Connect, unset HF_HUB_OFFLINE, or pass a local folder."
        ) from error
    except Exception as error:  # many libraries speak here; each reason becomes one line
        raise DataError(f"Cannot load the data set {name!r}, split {split!r}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """One line; the cause where `datasets` only says that something went wrong."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if "BatchSize must be greater than 0" in str(error):  # how `datasets` fails on a parquet file without rows
        return "a parquet file has no rows; remove it or choose another split"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
