"""What a suite measures: named plans and plans of the user's own, in YAML."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hf_nullspace.command_line import UsageError, read_yaml
from hf_nullspace.data.image_stream import Images, ImageStream
from hf_nullspace.robustness.attacks.auto import AutoAttack
from hf_nullspace.robustness.attacks.base import Attack
from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD
from hf_nullspace.robustness.attacks.patch_fool import PatchFool
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


class PlanError(ValueError):
    """A plan that cannot be understood; the message names the entry."""


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

    A plan has a list ``conditions``; an entry is ``clean``, or a mapping with ``attack`` (and its settings, such as
    ``eps: 8/255``) or ``corruption`` and ``severity`` (one, a list, or ``all``), optionally ``set`` (default: the
    user's own images) or ``dataset`` (another folder or Hub id of theirs), and ``limit``. An entry with ``set`` alone
    measures that set as it is; ``set: imagenet-c`` and ``set: cifar10-c`` mean their 75 cells. Raises ``PlanError``
    for anything else, naming the nearest valid word.
    """
    if suite in NAMED:
        content = yaml.safe_load(files("hf_nullspace.robustness").joinpath(f"suites/{suite}.yaml").read_bytes())
    elif Path(suite).is_file():
        try:
            content = read_yaml(Path(suite))
        except UsageError as error:
            raise PlanError(str(error)) from error
    else:
        raise PlanError(f"no suite {suite!r}: expected {', '.join(NAMED)}, or a YAML file")
    if not isinstance(content, dict) or not isinstance(content.get("conditions"), list):
        raise PlanError(f"{suite}: expected a list 'conditions'")
    known({"conditions", "limit"}, content, suite)
    plan = [planned for entry in content["conditions"] for planned in parse_entry(entry, content.get("limit"), suite)]
    titles = [planned.title for planned in plan]
    if repeated := sorted({title for title in titles if titles.count(title) > 1}):
        raise PlanError(f"{suite}: given twice: {', '.join(repeated)}")
    if not plan:
        raise PlanError(f"{suite}: the list 'conditions' is empty; expected at least one, such as clean")
    return plan


def parse_entry(entry: Any, limit: int | None, suite: str) -> list[Planned]:
    if entry == "clean":
        entry = {"clean": True}
    if not isinstance(entry, dict):
        raise PlanError(f"{suite}: {entry!r} is no condition; expected 'clean' or a mapping")
    entry = dict(entry)
    where, limit = entry.pop("set", BASE), entry.pop("limit", limit)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise PlanError(f"{suite}: limit {limit!r}; expected a whole number of at least 1")
    valid = {BASE, *SETS, *GROUPS, *GROUPS["cifar10-c"]}
    if "dataset" in entry:
        where = f"{OWN}{entry.pop('dataset')}"
    elif not isinstance(where, str) or where not in valid:
        raise PlanError(f"{suite}: unknown set {where!r}{nearest(where, valid)}")
    if "attack" in entry:
        conditions: list[Condition] = [Attacked(make_attack(entry.pop("attack"), entry, suite))]
    elif "corruption" in entry:
        known({"corruption", "severity"}, entry, suite)
        names, levels = choices(entry["corruption"], CORRUPTIONS), choices(entry.get("severity", "all"), SEVERITIES)
        try:
            conditions = [Corrupted(name, severity) for name in names for severity in levels]
        except ValueError as error:
            raise PlanError(f"{suite}: {error}") from error
    else:
        known({"clean"}, entry, suite)
        conditions = [Clean()]
    return [Planned(name, condition, limit) for name in GROUPS.get(where, [where]) for condition in conditions]


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


def choices(value: Any, everything: Any) -> list[Any]:
    return list(everything) if value == "all" else value if isinstance(value, list) else [value]


def make_attack(name: str, settings: Mapping[str, Any], suite: str) -> Attack:
    """An attack from its name and settings as YAML gives them; "8/255" is a number."""
    if not isinstance(name, str) or name not in ATTACKS:
        raise PlanError(f"{suite}: unknown attack {name!r}{nearest(name, ATTACKS)}")
    attack = ATTACKS[name]
    declared = {field.name: field.type for field in dataclasses.fields(attack)}  # type: ignore[arg-type]
    fields = {key: kind.__name__ if isinstance(kind, type) else str(kind) for key, kind in declared.items()}
    known(set(fields), settings, f"{suite}: {name}")
    values = {key: number(value) if "float" in fields[key] else value for key, value in settings.items()}
    for key, value in values.items():
        kind, _, optional = fields[key].partition(" | ")
        wanted = {"int": (int, "a whole number"), "bool": (bool, "true or false"), "str": (str, "a word")}.get(kind)
        if wanted is not None and type(value) is not wanted[0] and not (optional and value is None):
            raise PlanError(f"{suite}: {name}: {key} {value!r}; expected {wanted[1]}")
    try:
        return attack(**values)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{suite}: {error}") from error


def number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        top, _, bottom = str(value).partition("/")
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise PlanError(f"{value!r} is no number; write 0.03 or 8/255") from error


def known(valid: set[str], given: Mapping[str, Any], where: str) -> None:
    for key in given:
        if key not in valid:
            raise PlanError(f"{where}: unknown key {key!r}{nearest(key, valid)}")


def nearest(word: Any, valid: Any) -> str:
    near = difflib.get_close_matches(str(word), [str(v) for v in valid], n=1)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(sorted(map(str, valid))[:12])}"
