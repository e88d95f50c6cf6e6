"""Pictures of results: bars per condition, accuracy against severity, accuracy against attack strength."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.text import short
from hf_nullspace.robustness.corruptions import SEVERITIES
from hf_nullspace.robustness.suite import ConditionResult

Results = Mapping[str, Sequence[ConditionResult]]  # checkpoint name -> its results, in the same order of conditions
MOST_BARS = 24  # conditions that one picture can show; corruption cells beyond it stand in the severity plot
IN_A_ROW = 12  # of them beside each other: a page is not wider


def plot_bars(results: Results, path: str | Path) -> Path:
    """Accuracy with its 95% interval per condition, a bar for each checkpoint; twelve conditions in a row."""
    first = next(iter(results.values()))
    shown = [i for i in range(len(first)) if len(first) <= MOST_BARS or cell(first[i]) is None][:MOST_BARS]
    rows = [part.tolist() for part in np.array_split(shown, max(1, -(-len(shown) // IN_A_ROW)))]
    figure, every_axes = accuracy_axes(max(6.0, 1.6 + len(rows[0]) * (0.5 + 0.25 * len(results))), len(rows))
    width = 0.8 / len(results)
    for axes, row in zip(every_axes, rows, strict=True):
        for place, (name, conditions) in enumerate(results.items()):
            heights, spread = percentages([conditions[i] for i in row])
            where = np.arange(len(row)) + (place - (len(results) - 1) / 2) * width
            axes.bar(where, heights, width, yerr=spread, capsize=2, label=name, error_kw={"linewidth": 0.8})
        names = [short(first[i].condition.removeprefix("generated ")).replace("_", " ") for i in row]
        axes.set_xticks(range(len(row)), names, rotation=30, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(rows[0]) - 0.4)
    if len(shown) < len(first):
        every_axes[0].set_title(f"{len(shown)} of {len(first)} conditions; the table has all", fontsize=9)
    return save(figure, every_axes[0], path, len(results))


def plot_severity(results: Results, path: str | Path) -> Path | None:
    """Accuracy against severity, averaged over the corruptions measured at all five; None where there are none."""
    whole = complete_corruptions(next(iter(results.values())))
    if not whole:
        return None
    figure, (axes,) = accuracy_axes(6.0)
    for name, conditions in results.items():
        cells = {cell(r): r.score.value for r in conditions}
        for kind, corruptions in whole.items():
            means = [100 * np.mean([cells[kind, corruption, s] for corruption in corruptions]) for s in SEVERITIES]
            axes.plot(SEVERITIES, means, marker="o", label=name if len(whole) == 1 else f"{name}, {kind}")
    axes.set_xticks(SEVERITIES)
    over = "; ".join(f"{len(corruptions)} corruptions, {kind}" for kind, corruptions in whole.items())
    axes.set_xlabel(f"severity (mean over {over})")
    return save(figure, axes, path, len(results) * len(whole))


def plot_strength(results: Results, path: str | Path) -> Path | None:
    """Accuracy against eps (x 255) for every attack measured at several radii; None where there is none.

    Radius 0 is the condition "clean" where that was measured.
    """
    curves: dict[tuple[str, str], list[tuple[float, ConditionResult]]] = defaultdict(list)
    for name, conditions in results.items():
        for result in conditions:
            settings = result.protocol.get("settings", {})
            if "eps" in settings and settings.get("norm", "linf") == "linf" and settings["eps"] is not None:
                curves[name, result.protocol["attack"]].append((255 * settings["eps"], result))
    curves = {key: sorted(points, key=lambda p: p[0]) for key, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    for (name, _), points in curves.items():
        points[:0] = [(0.0, result) for result in results[name] if result.condition == "clean"]
    figure, (axes,) = accuracy_axes(6.0)
    styles = dict(zip(sorted({attack for _, attack in curves}), ("-", "--", ":", "-."), strict=False))
    for (name, attack), points in curves.items():
        heights, spread = percentages([result for _, result in points])
        colour = f"C{list(results).index(name)}"
        axes.errorbar(
            [eps for eps, _ in points], heights, yerr=spread, marker="o", capsize=2,
            label=f"{name}, {attack}", color=colour, linestyle=styles.get(attack, "-"),
        )  # fmt: skip
    axes.set_xlabel("radius eps x 255 (L-inf, pixels in [0, 1])")
    return save(figure, axes, path, len(curves))


KINDS = {"generated ": "generated", "imagenet-c/": "ImageNet-C", "cifar10-c/": "CIFAR-10-C"}
CELL = re.compile(rf"({'|'.join(KINDS)})(\w+)[ /]([1-5])")


def cell(result: ConditionResult) -> tuple[str, str, int] | None:
    """(kind, corruption, severity) of a corruption cell, generated or published; None for any other condition."""
    found = CELL.fullmatch(result.condition)
    return None if found is None else (KINDS[found[1]], found[2], int(found[3]))


def complete_corruptions(conditions: Sequence[ConditionResult]) -> dict[str, list[str]]:
    """Kind -> the corruptions that were measured at all five severities."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for kind, corruption, severity in filter(None, map(cell, conditions)):
        found[kind, corruption].add(severity)
    whole: dict[str, list[str]] = defaultdict(list)
    for (kind, corruption), severities in found.items():
        if severities == set(SEVERITIES):
            whole[kind].append(corruption)
    return whole


def percentages(results: Sequence[ConditionResult]) -> tuple[np.ndarray, np.ndarray]:
    scores = [result.score for result in results]
    spread = [[100 * (s.value - s.low) for s in scores], [100 * (s.high - s.value) for s in scores]]
    return np.array([100 * s.value for s in scores]), np.maximum(np.array(spread), 0)


def accuracy_axes(width: float, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure, and the axes of its rows."""
    figure, grid = canvas(width, 1.5 + 3.0 * rows, rows)
    for axes in grid[:, 0]:
        axes.set(ylim=(0, 100), ylabel="accuracy in %")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure, list(grid[:, 0])


def save(figure: Any, axes: Any, path: str | Path, entries: int) -> Path:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(entries, 3), frameon=False, fontsize=9)
    return save_png(figure, path, dpi=100)
