"""What the columns of a data set mean: which holds the image, which the label, and what the labels are.

``standard_columns`` turns any data set into two columns, ``image`` and ``label``, with whole-number labels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features, Image, List, Value

from hf_nullspace.data.image_files import DataError, chosen_columns, features_of, on_tables

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")  # the file endings: webdataset
MAX_UNNAMED_CLASSES = 100_000
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_label", "target", "cls")


def find_columns(
    features: Features, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """The image and the label column: as named, else by feature type (Image, ClassLabel), else by the usual names.

    Raises ``DataError`` with all columns when a name is not there, and when none or several would do.
    """
    image = _find(features, "image", image_column, Image, IMAGE_NAMES)
    label = _find(features, "label", label_column, ClassLabel, LABEL_NAMES)
    return image, label


def _find(features: Features, role: str, named: str | None, feature_type: type, usual: Sequence[str]) -> str:
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if named is not None:
        if named not in features:
            raise DataError(f"There is no column {named!r}; {role}_column must be one of: {columns}.")
        return named
    typed = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    candidates = typed or [name for name in features if name.lower() in usual]
    if len(candidates) > 1:  # an image and its mask; fine and coarse labels
        candidates = [name for name in candidates if name.lower() in usual] or candidates
    if len(candidates) == 1:
        return candidates[0]
    problem = f"Several columns could be the {role}: {candidates}" if candidates else f"No column looks like the {role}"
    raise DataError(f"{problem}. Name it with {role}_column; the columns are: {columns}.")


def _type_name(feature: object) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def standard_columns(
    rows: Any,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Any:
    """The same rows with the columns ``image`` (Image) and ``label`` (ClassLabel where there are names, else integers).

    ``class_names`` numbers text labels (required for them), and names plain integer labels.
    """
    features = features_of(rows)
    image_column, label_column = find_columns(features, image_column, label_column)
    label = features[label_column]
    holds, name_another = f"Column {label_column!r} holds", "supported; name another column with label_column."
    if not isinstance(label, (ClassLabel, Value)):
        raise DataError(
            f"{holds} {_type_name(label)}, expected one class per image. Multi-label sets are not {name_another}"
        )
    if isinstance(label, Value) and not (is_text(label) or "int" in label.dtype or label.dtype == "bool"):
        raise DataError(f"{holds} {label.dtype}, expected classes (integers or text). Regression is not {name_another}")
    if is_text(label) and class_names is None:
        raise DataError(
            f"{holds} text labels, and a stream cannot be sorted before it is read. "
            "Pass class_names, or load without streaming."
        )
    if isinstance(label, ClassLabel) and class_names is not None and list(class_names) != label.names:
        raise DataError(
            f"Column {label_column!r} has its own class names {_some(label.names)}, not the class_names that were "
            f"passed, {_some(class_names)}. Leave class_names out; labels are matched to a model by name."
        )
    if image_column == label_column or not _may_be_image(features[image_column]):
        raise DataError(
            f"Column {image_column!r} holds {_type_name(features[image_column])}, expected images (or their bytes or "
            "the paths of files), and the labels in another column. Name the right one with image_column."
        )
    rows = chosen_columns(rows, {image_column: "image", label_column: "label"})
    if isinstance(label, Value) and class_names is not None:
        rows = _with_class_label(rows, label_column, class_names, is_text(label))
    return rows if isinstance(features[image_column], Image) else rows.cast_column("image", Image())


def _may_be_image(feature: object) -> bool:
    """What `datasets` can take for an image: a path, bytes, both, or nested lists of pixels."""
    if isinstance(feature, Value):
        return "string" in feature.dtype or "binary" in feature.dtype
    return isinstance(feature, (Image, dict, List, datasets.Array2D, datasets.Array3D))


def is_text(feature: object) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def text_classes(splits: Mapping[str, datasets.Dataset], column: str) -> list[str]:
    """The distinct text labels of all splits, sorted: a class that one split lacks must not shift the others."""
    return sorted({name for rows in splits.values() for name in rows.unique(column)} - {None})


def _with_class_label(rows: Any, column: str, names: Sequence[str], text: bool) -> Any:
    feature = ClassLabel(names=list(names))
    ids = {name: number for number, name in enumerate(names)} if text else None
    if isinstance(rows, datasets.IterableDataset):
        features = Features({**rows.features, "label": feature})
        return on_tables(rows, partial(_numbered, column=column, ids=ids), features)
    # Not `map` or `cast`: both would write all images to the cache once more.
    numbers = _numbers(rows["label"], 0, column, ids)
    return rows.remove_columns(["label"]).add_column("label", numbers, feature=feature)


def _numbered(table: pa.Table, places: list[int], column: str, ids: Mapping[str, int] | None) -> pa.Table:
    numbers = _numbers(table["label"].to_pylist(), places[0], column, ids)
    return pa.table({"image": table["image"], "label": pa.array(numbers, pa.int64())})


def _numbers(labels: Sequence[Any], first: int, column: str, ids: Mapping[str, int] | None) -> list[int]:
    """Labels as numbers, text labels by ``ids``; ``first`` is the row of the first."""
    for row, label in enumerate(labels, first):
        if label is None:
            raise DataError(_label_problem(None, None, f"Row {row} of column {column!r}"))
        if ids is not None and label not in ids:
            raise DataError(f"Row {row} has label {label!r}, which is not one of the class names {_some([*ids])}.")
    return [int(label) if ids is None else ids[label] for label in labels]


def _some(names: Sequence[str]) -> str:
    return f"[{', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}]"


def class_names(rows: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    """The names of the classes in the order of their numbers, or None where the data has no names."""
    feature = (rows.features or {}).get("label")
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def num_classes(rows: datasets.Dataset | datasets.IterableDataset) -> int | None:
    """How many classes there are: the names, else the largest label + 1; None for a stream without names.

    Raises ``DataError`` for a label without a name above 100,000: a head of that many classes is a mistake.
    """
    names = class_names(rows)
    if names is not None:
        return len(names)
    if not isinstance(rows, datasets.Dataset):
        return None
    labels = labels_of(rows)
    largest = int(labels.argmax())
    if labels[largest] >= MAX_UNNAMED_CLASSES:
        raise DataError(
            f"Row {largest} has label {labels[largest]}, and as the labels have no names there would be a class for "
            f"every number up to it, with {len(np.unique(labels))} labels in use; expected less than "
            f"{MAX_UNNAMED_CLASSES}. Check label_column, number the classes from 0, or name them (a ClassLabel column)."
        )
    return int(labels[largest]) + 1


def labels_of(rows: datasets.Dataset, where: str = "the data") -> np.ndarray:
    """All labels, int64, without decoding an image; ``DataError`` where a row has none."""
    labels = rows.select_columns(["label"]).with_format("arrow")[:]["label"]
    if labels.null_count:
        row = int(np.flatnonzero(labels.is_null().to_numpy())[0])
        raise DataError(_label_problem(None, None, f"Row {row} of {where}", labels.null_count))
    return labels.to_numpy().astype(np.int64)


def check_labels(labels: np.ndarray, num_classes: int | None, where: str = "the data") -> None:
    """``DataError`` unless every label is in [0, num_classes); with None, unless none is negative."""
    wrong = (labels < 0) | (labels >= num_classes) if num_classes is not None else labels < 0
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(_label_problem(int(labels[row]), num_classes, f"Row {row} of {where}", int(wrong.sum())))


def check_label(label: int | None, num_classes: int | None, row: str) -> int:
    """The label as a number; ``DataError`` for none and for one out of range."""
    if label is None or label < 0 or (num_classes is not None and label >= num_classes):
        raise DataError(_label_problem(label, num_classes, row))
    return int(label)


def _label_problem(label: int | None, num_classes: int | None, row: str, count: int = 1) -> str:
    more = f" ({count} such rows)" if count > 1 else ""
    if label is None:
        return f"{row} has no label{more}. Remove such rows, or use a labelled split."
    expected = f"0 to {num_classes - 1}" if num_classes is not None else "0 or more"
    if label == -1:
        hint = "-1 marks unlabelled images: use a labelled split, for example 'validation'"
    else:
        hint = "Check label_column, and that model and data have the same classes"
    return f"{row} has label {label}, expected {expected}{more}. {hint}."
