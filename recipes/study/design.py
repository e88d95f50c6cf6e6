"""What a study compares: arms, seeds, learning rates, conditions, and which images may be looked at when."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from hf_nullspace.command_line import UsageError
from hf_nullspace.robustness.plans import BASE, Planned, parse_entry
from hf_nullspace.robustness.suite import Clean, Corrupted
from study.arguments import CompareArguments

CELLS = "cells"
"""In an average: the mean over all generated corruption cells of the study."""
BEFORE = "before"
"""The checkpoint that every run starts from, measured like an arm."""
CLEAN = str(Clean())
_OWN_KEYS = ("seeds", "learning_rate_of")
_DATA_KEYS = ("crop_scale", "horizontal_flip", "augmentation")


@dataclass(frozen=True)
class Slice:
    """A part of the test images, ``first`` <= place < ``stop``; "selection" or "report"."""

    name: str
    first: int
    stop: int

    def places(self, limit: int | None) -> tuple[int, ...]:
        """At most ``limit`` evenly spaced places."""
        size = self.stop - self.first
        count = size if limit is None else min(limit, size)
        return tuple(sorted({self.first + round(place) for place in np.linspace(0, size - 1, count)}))


@dataclass(frozen=True)
class Arm:
    """An objective with its settings (fields of NullspaceConfig), and the seeds it is trained with."""

    name: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    """How its training images are augmented, where that differs from the study's (fields of DataArguments)."""
    seeds: tuple[int, ...]
    learning_rate_of: str | None = None
    """Takes the learning rate that was chosen for another arm instead of one of its own."""


@dataclass(frozen=True)
class Choice:
    """What is chosen for an arm: the learning rate, and the share of the way from the checkpoint to its weights."""

    learning_rate: float
    alpha: float = 1.0

    def __str__(self) -> str:
        return f"{self.learning_rate:g}" + ("" if self.alpha == 1 else f", alpha {self.alpha:g}")


@dataclass(frozen=True)
class Run:
    """One model: an arm, what was chosen for it, a seed. Or, without a choice, the checkpoint before.

    With ``alpha`` below 1 it is the average of the checkpoint and of the weights of ``trained``.
    """

    arm: str
    choice: Choice | None = None
    seed: int | None = None

    @property
    def trained(self) -> "Run":
        """The run with the fine-tuned weights as they are."""
        return self if self.choice is None else replace(self, choice=replace(self.choice, alpha=1.0))

    @property
    def folder(self) -> str:
        """Where it lies, below the study's folder."""
        if self.choice is None:
            return f"runs/{slug(self.arm)}"
        folder = f"runs/{slug(self.arm)}/lr-{self.choice.learning_rate:g}/seed-{self.seed}"
        return folder if self.choice.alpha == 1 else f"{folder}/alpha-{self.choice.alpha:g}"

    def __str__(self) -> str:
        return self.arm if self.choice is None else f"{self.arm}, lr {self.choice}, seed {self.seed}"


@dataclass(frozen=True)
class Measurement:
    """One condition of a run on a slice of the test images."""

    run: Run
    planned: Planned
    slice: Slice

    def __str__(self) -> str:
        return f"measure {self.run}: {self.planned.title} ({self.slice.name})"

    @property
    def places(self) -> tuple[int, ...]:
        """The test images that it looks at."""
        return self.slice.places(self.planned.limit)


@dataclass(frozen=True)
class Study:
    """The whole design; :func:`make_study` checks it."""

    arms: Mapping[str, Arm]
    control: str
    choices: tuple[Choice, ...]
    """The grid of every arm: each learning rate with each alpha."""
    keep_clean: float | None
    """Of the grid only what loses at most so many points of clean accuracy on the selection images may be chosen."""
    plan: tuple[Planned, ...]
    average: Mapping[str, float]
    """Condition -> weight, of the number that the grid is chosen by and the study is judged by."""
    groups: Mapping[str, Mapping[str, float]]
    """What the table shows: name -> condition -> weight; the average, every attack, the mean of the cells."""
    condition_seeds: Mapping[str, tuple[int, ...]]
    """Condition -> the seeds of the runs it is measured on, for conditions too expensive to measure on all seeds."""
    report: Slice
    selection: Slice | None
    selection_limit: int | None
    seed: int
    """Of corruptions and random starts."""

    def measurements(self, run: Run) -> list[Measurement]:
        """What a run is measured on for the report; the checkpoint before on everything."""
        return [
            Measurement(run, planned, self.report)
            for planned in self.plan
            if run.seed is None or run.seed in self.condition_seeds.get(planned.title, (run.seed,))
        ]

    def selecting(self) -> list[Arm]:
        """The arms that choose for themselves."""
        return [arm for arm in self.arms.values() if arm.learning_rate_of is None]

    def selection_runs(self) -> list[Run]:
        """The grid of every arm that chooses, with the arm's first seed; none if there is nothing to choose.

        The checkpoint is the first if its clean accuracy is to be kept.
        """
        if self.selection is None:
            return []
        before = [] if self.keep_clean is None else [Run(BEFORE)]
        return before + [Run(arm.name, choice, arm.seeds[0]) for arm in self.selecting() for choice in self.choices]

    def selection_measurements(self, run: Run) -> list[Measurement]:
        """The conditions of the average, all on the same images: ``selection_limit`` of them, or the whole slice."""
        assert self.selection is not None
        plan = [Planned(BASE, p.condition, self.selection_limit) for p in self.plan if p.title in self.average]
        return [Measurement(run, planned, self.selection) for planned in plan]

    def report_runs(self, chosen: Mapping[str, Choice]) -> list[Run]:
        """The checkpoint before, and every arm with every seed, with what was chosen for it.

        Seed by seed, so that a study that is stopped has all arms with some seeds.
        """
        return [Run(BEFORE)] + [
            Run(arm.name, chosen[arm.learning_rate_of or arm.name], seed)
            for seed in self.arms[self.control].seeds
            for arm in self.arms.values()
            if seed in arm.seeds
        ]

    def chosen(
        self, averages: Mapping[str, Mapping[Choice, float]], lost: Mapping[str, Mapping[Choice, float]]
    ) -> dict[str, Choice]:
        """The choice of each arm with the best average; of equals the first.

        ``lost`` are points of clean accuracy, arm -> choice. If all of an arm lose more than ``keep_clean``, it is the
        one that loses least.
        """
        if self.selection is None:
            return {arm.name: self.choices[0] for arm in self.selecting()}
        found = {}
        for arm in self.selecting():
            allowed = list(self.choices)
            if self.keep_clean is not None:
                most = max(self.keep_clean, min(lost[arm.name].values()))
                allowed = [choice for choice in allowed if lost[arm.name][choice] <= most]
            found[arm.name] = max(allowed, key=averages[arm.name].__getitem__)
        return found


def make_study(args: CompareArguments) -> Study:
    """The design that the options say.

    Raises:
        UsageError: if something is unknown or contradicts something else.
    """
    content = mapping_of("arms", args.arms)
    if not content or not args.seeds or not args.learning_rates or not args.alphas:
        raise UsageError("a study needs arms, seeds, learning_rates and alphas: at least one of each")
    choices = tuple(Choice(rate, alpha) for rate in args.learning_rates for alpha in args.alphas)
    arms = {name: _arm(name, entry or {}, tuple(args.seeds)) for name, entry in content.items()}
    choosing = {name for name, arm in arms.items() if arm.learning_rate_of is None}
    if args.control not in choosing:
        raise UsageError(f"control={args.control!r}: expected an arm that chooses its learning rate, of {list(arms)}")
    for arm in arms.values():
        if arm.learning_rate_of not in {None, *choosing}:
            raise UsageError(f"arm {arm.name!r}: learning_rate_of={arm.learning_rate_of!r} is no arm that chooses one")
        if not set(arm.seeds) <= set(arms[args.control].seeds):
            raise UsageError(f"arm {arm.name!r}: seeds {arm.seeds}; differences need the seeds of the control as well")
    if BEFORE in arms or len({slug(name) for name in arms}) < len(arms):
        raise UsageError(f"arms {list(arms)}: two share a folder's name, or one is called {BEFORE!r}")
    plan, condition_seeds = _plan(args.conditions, args.limit)
    titles = [planned.title for planned in plan]
    cells = [planned.title for planned in plan if isinstance(planned.condition, Corrupted)]
    if not titles or len(set(titles)) < len(titles) or any(planned.images != BASE for planned in plan):
        raise UsageError(f"conditions {titles}: expected some, each once, all on the test images of the study")
    if args.selection is None and len(choices) > 1:
        grid = f"learning_rates {list(args.learning_rates)}, alphas {list(args.alphas)}"
        raise UsageError(f"{grid}: choosing one needs a selection slice")
    report = _slice("report", args.report)
    selection = None if args.selection is None else _slice("selection", args.selection)
    if selection is not None and report.first < selection.stop and selection.first < report.stop:
        raise UsageError(f"report {args.report} and selection {args.selection} share images; expected different ones")
    weights = _weights(args.average, titles, cells)
    if limited := weights.keys() & condition_seeds.keys():
        raise UsageError(f"{', '.join(sorted(limited))}: in the average, so it is measured on every seed")
    if args.keep_clean is not None and (CLEAN not in weights or selection is None):
        raise UsageError(f"keep_clean={args.keep_clean}: expected a selection slice, and {CLEAN!r} in the average")
    if wrong := {seed for chosen in condition_seeds.values() for seed in chosen} - set(arms[args.control].seeds):
        raise UsageError(f"conditions with seeds {sorted(wrong)}, which the control {args.control!r} does not have")
    groups = {"average": weights} | {title: {title: 1.0} for title in titles if title not in cells}
    if cells:
        groups["mean of the cells"] = dict.fromkeys(cells, 1 / len(cells))
    return Study(
        arms,
        args.control,
        choices,
        args.keep_clean,
        plan,
        weights,
        groups,
        condition_seeds,
        report,
        selection,
        args.selection_limit,
        args.eval_seed,
    )


def mapping_of(name: str, value: str | Mapping[str, Any]) -> dict[str, Any]:
    """A mapping, or JSON of one; anything else is a UsageError."""
    try:
        content = json.loads(value) if isinstance(value, str) else dict(value)
    except ValueError as error:
        raise UsageError(f"{name}: {value!r} is no JSON ({error}); expected a mapping in YAML or JSON") from error
    if not isinstance(content, dict):
        raise UsageError(f"{name}: {value!r}; expected a mapping in YAML or JSON")
    return content


def _plan(conditions: Iterable[str], limit: int | None) -> tuple[tuple[Planned, ...], dict[str, tuple[int, ...]]]:
    """The conditions, and the seeds of those that name some."""
    plan: list[Planned] = []
    seeds: dict[str, tuple[int, ...]] = {}
    for text in conditions:
        try:
            entry = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"conditions: {text!r} is no YAML: {error}") from error
        own = entry.pop("seeds", None) if isinstance(entry, dict) else None
        found = parse_entry(entry, limit, "conditions")
        plan += found
        if own is not None:
            if not isinstance(own, list) or not own or not all(isinstance(seed, int) for seed in own):
                raise UsageError(f"conditions: {text}: seeds: {own!r}; expected a list of seeds")
            seeds |= {planned.title: tuple(own) for planned in found}
    return tuple(plan), seeds


def _arm(name: str, entry: Mapping[str, Any], seeds: tuple[int, ...]) -> Arm:
    if not isinstance(entry, Mapping):
        raise UsageError(f"arm {name!r}: {entry!r}; expected a mapping with an objective")
    settings = {key: value for key, value in entry.items() if key not in _OWN_KEYS + _DATA_KEYS}
    data = {key: entry[key] for key in _DATA_KEYS if key in entry}
    if "objective" not in settings or "learning_rate" in settings or "seed" in settings:
        raise UsageError(f"arm {name!r}: {dict(entry)}: expected an objective, and neither learning_rate nor seed")
    return Arm(name, settings, data, tuple(entry.get("seeds", seeds)), entry.get("learning_rate_of"))


def _weights(average: Sequence[str], titles: Sequence[str], cells: Sequence[str]) -> dict[str, float]:
    """Condition -> its weight in the average; equal weights of the entries."""
    weights: dict[str, float] = {}
    for entry in average:
        exact, beginning = ([t for t in titles if t == entry], [t for t in titles if t.startswith(entry)])
        found = cells if entry == CELLS else exact or beginning
        if not found or (entry != CELLS and len(found) > 1):
            raise UsageError(f"average: {entry!r} is {len(found)} of the conditions {titles}; expected 1, or {CELLS!r}")
        for title in found:
            weights[title] = weights.get(title, 0.0) + 1 / len(average) / len(found)
    if not weights:
        raise UsageError("average: expected conditions of the study; learning rates are chosen by it")
    return weights


def _slice(name: str, text: str) -> Slice:
    match = re.fullmatch(r"(\d+):(\d+)", str(text))
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"{name}: {text!r}; expected places among the test images, such as 0:8000")
    return Slice(name, int(match[1]), int(match[2]))


def slug(name: str) -> str:
    """A name as a folder's: letters, digits, dots, dashes."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-")
