"""Which class is which: ImageNet's WordNet ids, the 200-class subsets of A and R, and the order of a model's logits.

A wrong mapping gives 0.08% instead of 20%, so everything goes by WordNet id (wnid) or name, never by position alone.
The lists are data: all wnids in ImageNet's order (sorted), the subsets of the authors of A and R, ILSVRC2012's names.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files

SPACES = ("imagenet-1k", "imagenet-a", "imagenet-r")


class LabelError(ValueError):
    """Labels that do not mean what was expected; the message says which."""


@lru_cache
def wnids(space: str = "imagenet-1k") -> tuple[str, ...]:
    """The wnids of a label space, sorted: 1,000 for "imagenet-1k", 200 for "imagenet-a" and "imagenet-r"."""
    if space not in SPACES:
        raise LabelError(f"unknown label space {space!r}; expected one of {', '.join(SPACES)}")
    return tuple(json.loads(files("hf_nullspace.robustness").joinpath("data/imagenet_wnids.json").read_text())[space])


@lru_cache
def class_names() -> dict[str, str]:
    """ILSVRC2012's name of every wnid, such as "tench, Tinca tinca"."""
    return dict(json.loads(files("hf_nullspace.robustness").joinpath("data/imagenet_names.json").read_text()))


@lru_cache
def class_indices() -> dict[str, int]:
    """wnid -> its index among ImageNet's 1,000 classes."""
    return {wnid: index for index, wnid in enumerate(wnids())}


def indices(space: str) -> list[int]:
    """The classes of a space among ImageNet's 1,000."""
    return [class_indices()[wnid] for wnid in wnids(space)]


def check_wnids(found: Iterable[str], space: str, where: str) -> None:
    """Raise ``LabelError`` unless ``found`` are wnids of ``space``; says which do not belong."""
    wrong = sorted(set(found) - set(wnids(space)))
    if wrong:
        shown = ", ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        of = f"{space} ({len(wnids(space))} classes)"
        raise LabelError(
            f"{where}: {shown} do not belong to {of}. Point to the folder with this set's wnids as folders"
        )


def imagenet_columns(id2label: Mapping[int, str]) -> list[int]:
    """For each of ImageNet's 1,000 classes in order, the index of the model's logit, by wnid or by name.

    ``id2label`` is a checkpoint's; labels may be wnids, ILSVRC2012 names, or their first words. Classes of the model
    beyond ImageNet's are left out. Raises ``LabelError`` when a class is not found or names are missing ("LABEL_0").
    """
    known = names_to_wnids()
    of_wnid: dict[str, list[int]] = defaultdict(list)
    for index in sorted(id2label):
        for wnid in known.get(normal(id2label[index]), ()):
            of_wnid[wnid].append(index)
    columns, missing = [], []
    for wnid in wnids():
        candidates, twins = of_wnid.get(wnid, []), known[normal(class_names()[wnid])]
        if len(candidates) == 1:
            columns.append(candidates[0])
        elif len(candidates) == len(twins):  # "crane" the bird and "crane" the machine: in the order of their wnids
            columns.append(candidates[twins.index(wnid)])
        else:
            missing.append(f"{wnid} ({class_names()[wnid]})")
    if missing:
        raise LabelError(
            f"the model's id2label does not name {len(missing)} of ImageNet's 1,000 classes, first {missing[0]}; its "
            f"first labels are {[id2label[i] for i in sorted(id2label)[:3]]}. If its logits are in ImageNet's order "
            "(sorted wnids), say so: label_order='imagenet'"
        )
    twice = [index for index, count in Counter(columns).items() if count > 1]
    if twice:
        raise LabelError(f"several ImageNet classes would share the logits {twice[:5]} of the model")
    return columns


@lru_cache
def names_to_wnids() -> dict[str, tuple[str, ...]]:
    """Normalised wnid, full name, and (where only one class has it) first words -> the wnids they mean."""
    full: dict[str, list[str]] = defaultdict(list)
    short: dict[str, list[str]] = defaultdict(list)
    for wnid, name in class_names().items():
        full[wnid].append(wnid)
        full[normal(name)].append(wnid)
        short[normal(name.split(",")[0])].append(wnid)
    unique = {name: found for name, found in short.items() if len(found) == 1 and name not in full}
    return {name: tuple(found) for name, found in (unique | full).items()}


def normal(label: str) -> str:
    return " ".join(label.replace("_", " ").split())  # case matters: a Cardigan is a dog, a cardigan is not


def imagenet_labels(names: Sequence[str], where: str) -> list[int]:
    """ImageNet's class index for each of a data set's class names (wnids or names); for sets from the Hub."""
    known, place = names_to_wnids(), class_indices()
    wrong = [name for name in names if len(known.get(normal(name), ())) != 1]
    ambiguous = [name for name in wrong if normal(name) in known]
    if set(wrong) - set(ambiguous):
        shown = ", ".join(repr(name) for name in wrong[:5])
        raise LabelError(
            f"{where}: {shown} are neither wnids nor ILSVRC2012 names; {len(wrong)} of {len(names)} unknown"
        )
    if ambiguous and (len(names) != len(wnids()) or len(ambiguous) != len(known[normal(ambiguous[0])])):
        raise LabelError(f"{where}: the names {sorted(set(ambiguous))} mean several classes; name them by wnid")
    twins = {name: iter(known[normal(name)]) for name in set(ambiguous)}
    return [place[next(twins[name]) if name in twins else known[normal(name)][0]] for name in names]
