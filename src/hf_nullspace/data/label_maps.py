"""The classes of a data set against those of a model's head: keep it, renumber the labels, or replace the head."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WNID = re.compile(r"n\d{8}")
# Enough of ImageNet-1k to know that a head has its order (sorted WordNet ids): first words of the names.
IMAGENET_ANCHORS = {
    0: "tench",
    1: "goldfish",
    207: "goldenretriever",
    407: "ambulance",
    817: "sportscar",
    999: "toilet",
}


@dataclass(frozen=True)
class LabelAlignment:
    """How the labels of a data set become the outputs of a model.

    ``remap[dataset_id]`` is the model's id, None where they are equal. ``new_head``: the classifier is replaced by one
    for ``id2label``. ``message`` is one line to show the user.
    """

    id2label: dict[int, str]
    label2id: dict[str, int]
    remap: tuple[int, ...] | None
    new_head: bool
    message: str

    @property
    def num_labels(self) -> int:
        return len(self.id2label)


def align_labels(class_names: Sequence[str] | None, config: Any, num_classes: int | None = None) -> LabelAlignment:
    """Compare the classes of the data with the head of the model with this ``config``.

    ``class_names`` are the names in the order of the data's labels, or None where the data has none; then
    ``num_classes``, where known, is their number. Names are compared without regard to case, spaces, underscores
    and hyphens; ``LABEL_0`` is no name.

    * The same names: the head is kept, in another order the labels are renumbered by name.
    * A part of the model's names: the head is kept, and the labels are renumbered to the model's.
    * No names on one side, the same number of classes: the head is kept; the message says that this was assumed.
    * ImageNet-1k as 1000 folders of WordNet ids, and a head in ImageNet order: kept.
    * Anything else: a new head.
    """
    model_names = _model_names(config)
    placeholders = names_of_classes(config) is None
    if class_names is None:
        return _without_names(model_names, num_classes)
    names = list(class_names)
    ours, theirs = [_plain(name) for name in names], [_plain(name) for name in model_names]
    if ours == theirs:
        return _aligned(model_names, f"The data has the model's {len(names)} classes in the model's order.")
    if placeholders and len(names) == len(model_names):
        return _aligned(
            names,
            f"The model's {len(names)} classes have no names; they are taken to be the data's, in the data's order.",
        )
    if _imagenet_by_wnid(names, theirs):
        return _aligned(model_names, "The data's 1000 WordNet ids, sorted, are the model's ImageNet-1k classes.")
    repeated = sorted({name for name in ours if theirs.count(name) > 1 or ours.count(name) > 1})
    if not placeholders and not repeated and set(ours) <= set(theirs):
        remap = tuple(theirs.index(name) for name in ours)
        message = f"The data has the model's {len(names)} classes in another order; its labels are renumbered by name."
        if len(ours) < len(theirs):
            message = (
                f"The data has {len(names)} of the model's {len(model_names)} classes; "
                "the head is kept and the labels are renumbered by name."
            )
        return _aligned(model_names, message, remap=None if remap == tuple(range(len(ours))) else remap)
    missing = [name for name, plain in zip(names, ours, strict=True) if plain not in set(theirs)]
    if placeholders:
        reason = f"the model has {len(model_names)} classes without names, the data has {len(names)}"
    elif missing:
        reason = f"{len(missing)} of the data's {len(names)} classes are not in the model ({_some(missing)})"
    else:
        reason = f"these names stand for more than one class: {_some(repeated)}"
    return _aligned(names, f"New classifier head for {len(names)} classes: {reason}.", new_head=True)


def names_of_classes(config: Any) -> list[str] | None:
    """The names of a model's classes, in its order; None if they are transformers' own, such as ``LABEL_0``."""
    names = _model_names(config)
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _model_names(config: Any) -> list[str]:
    return [str(config.id2label[index]) for index in range(len(config.id2label))]


def _without_names(model_names: list[str], num_classes: int | None) -> LabelAlignment:
    if num_classes is None or num_classes == len(model_names):
        count = "labels have no names" if num_classes is None else f"{num_classes} classes have no names"
        return _aligned(
            model_names,
            f"The data's {count}; they are taken to be the model's {len(model_names)} classes, in the model's order.",
        )
    return _aligned(
        [f"LABEL_{index}" for index in range(num_classes)],
        f"New classifier head for {num_classes} classes: the data's classes have no names, and the model has "
        f"{len(model_names)}.",
        new_head=True,
    )


def _aligned(
    names: list[str], message: str, *, remap: tuple[int, ...] | None = None, new_head: bool = False
) -> LabelAlignment:
    label2id = {name: index for index, name in enumerate(names)}
    return LabelAlignment(dict(enumerate(names)), label2id, remap, new_head, message)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold()) or name  # a name of nothing else, such as "-", stays what it is


def _imagenet_by_wnid(names: list[str], model_names: list[str]) -> bool:
    """1000 sorted WordNet ids, and a model with names in ImageNet's order (not every checkpoint has it)."""
    if len(names) != 1000 or len(model_names) != 1000 or names != sorted(names):
        return False
    in_order = all(model_names[index].startswith(name) for index, name in IMAGENET_ANCHORS.items())
    return in_order and all(WNID.fullmatch(name) for name in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
