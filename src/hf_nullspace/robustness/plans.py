"""What a suite measures: named plans and plans of the user's own, in YAML."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from hf_nullspace.command_line import UsageError, read_yaml
from hf_nullspace.core.settings import fraction, nearest
from hf_nullspace.data.image_stream import Images, ImageStream
from hf_nullspace.robustness.attacks.auto import AutoAttack
from hf_nullspace.robustness.attacks.base import Attack
from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD
from hf_nullspace.robustness.attacks.patch_fool import PatchFool
from hf_nullspace.robustness.attacks.transfer import Transfer
from hf_nullspace.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from hf_nullspace.robustness.sets import SETS
from hf_nullspace.robustness.suite import Attacked, Clean, Condition, Corrupted

NAMED = ("quick", "standard", "paper")
BASE = "base"  # the user's own images: --dataset_name
OWN = "dataset:"  # another set of the user's own, by folder or Hub id
ATTACKS: dict[str, type[Attack]] = {c.__name__: c for c in (FGSM, PGD, MIM, CW, PatchFool, AutoAttack)}
GROUPS = {
    "imagenet-c": [name for name in SETS if name.startswith("imagenet-c/")],
    "cifar10-c": [f"cifar10-c/{c}/{s}" for c in CORRUPTIONS for s in SEVERITIES],
}


@dataclass(frozen=True)
class Planned:
    """One condition over one set, on at most ``limit`` evenly spaced images."""

    images: str
    condition: Condition
    limit: int | None = None

    @property
    def title(self) -> str:
        """The condition's name in results: with its set, unless that is the user's own."""
        if self.images == BASE:
            return str(self.condition)
        name = self.images.removeprefix(OWN)
        return name if isinstance(self.condition, Clean) else f"{name}: {self.condition}"


def load_plan(suite: str) -> list[Planned]:
    """The plan of ``suite``: "quick", "standard", "paper", or a YAML file.

    A plan has a list ``conditions``; an entry is ``clean``, or a mapping with ``attack`` (its settings, such as
    ``eps: 8/255``, and perhaps ``source``, the model that it is made on) or ``corruption`` and ``severity`` (one, a
    list, or ``all``), optionally ``set`` (default: the user's own images) or ``dataset`` (another folder or Hub id of
    theirs), and ``limit``. An entry with ``set`` alone measures that set as it is; ``set: imagenet-c`` and
    ``set: cifar10-c`` mean their 75 cells. Raises ``UsageError`` for anything else, naming the nearest valid word.
    """
    if suite in NAMED:
        content = yaml.safe_load(files("hf_nullspace.robustness").joinpath(f"suites/{suite}.yaml").read_bytes())
    elif Path(suite).is_file():
        content = read_yaml(Path(suite))
    else:
        raise UsageError(f"no suite {suite!r}: expected {', '.join(NAMED)}, or a YAML file")
    with errors_about(suite):
        if not isinstance(content, dict) or not isinstance(content.get("conditions"), list):
            raise ValueError("expected a list 'conditions'")
        check_keys(content, {"conditions", "limit"})
        plan = [one for entry in content["conditions"] for one in parse_entry(entry, content.get("limit"), suite)]
        titles = [planned.title for planned in plan]
        if repeated := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"given twice: {', '.join(repeated)}")
        if not plan:
            raise ValueError("the list 'conditions' is empty; expected at least one, such as clean")
    return plan


def parse_entry(entry: Any, limit: int | None, suite: str) -> list[Planned]:
    """What one entry of the list means; ``limit`` is the plan's, errors begin with ``suite``."""
    with errors_about(suite):
        if entry == "clean":
            entry = {"clean": True}
        if not isinstance(entry, dict):
            raise ValueError(f"{entry!r} is no condition; expected 'clean' or a mapping")
        entry = dict(entry)
        where, limit = entry.pop("set", BASE), entry.pop("limit", limit)
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"limit {limit!r}; expected a whole number of at least 1")
        valid = {BASE, *SETS, *GROUPS, *GROUPS["cifar10-c"]}
        if "dataset" in entry:
            where = f"{OWN}{entry.pop('dataset')}"
        elif not isinstance(where, str) or where not in valid:
            raise ValueError(f"unknown set {where!r}{nearest(where, valid)}")
        conditions: list[Condition] = [Clean()]
        if "attack" in entry:
            conditions = [Attacked(make_attack(entry.pop("attack"), entry))]
        elif "corruption" in entry:
            check_keys(entry, {"corruption", "severity"})
            names, levels = choices(entry["corruption"], CORRUPTIONS), choices(entry.get("severity", "all"), SEVERITIES)
            conditions = [Corrupted(name, severity) for name in names for severity in levels]
        else:
            check_keys(entry, {"clean"})
        return [Planned(name, condition, limit) for name in GROUPS.get(where, [where]) for condition in conditions]


@contextmanager
def errors_about(suite: str) -> Iterator[None]:
    """What is wrong inside becomes a ``UsageError`` that begins with the suite's name."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{suite}: {error}") from error


def check_keys(given: Mapping[str, Any], valid: Collection[str]) -> None:
    for key in given:
        if key not in valid:
            raise ValueError(f"unknown key {key!r}{nearest(key, valid)}")


def choices(value: Any, everything: Iterable[Any]) -> list[Any]:
    return list(everything) if value == "all" else value if isinstance(value, list) else [value]


def make_attack(name: Any, settings: Mapping[str, Any]) -> Attack:
    """An attack from its name and settings as YAML gives them; "8/255" is a number, ``source`` another model."""
    if "source" in settings:
        own = {key: value for key, value in settings.items() if key != "source"}
        return Transfer(make_attack(name, own), str(settings["source"]))
    if not isinstance(name, str) or name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}{nearest(name, ATTACKS)}")
    kinds = get_type_hints(ATTACKS[name])
    check_keys(settings, [field.name for field in dataclasses.fields(ATTACKS[name])])
    decimal = {key for key in settings if float in (kinds[key], *get_args(kinds[key])) and settings[key] is not None}
    return ATTACKS[name](**{key: fraction(value) if key in decimal else value for key, value in settings.items()})


def lacks(condition: Condition, images: Images) -> str | None:
    """What keeps a condition from being measured at all: an optional library that is not installed; None if nothing.

    Asked before anything is measured, so that a run does not stop in the middle.
    """
    try:
        if isinstance(condition, Corrupted):
            image = next(images.pairs())[0] if isinstance(images, ImageStream) else images.raw_image(0)
            corrupt(image, condition.corruption, condition.severity, seed=0, index=0)
        if isinstance(condition, Attacked):
            condition.attack.require()
    except ImportError as error:
        return str(error)
    return None
