"""A finished study as JSON, Markdown and pictures. The JSON holds everything, the rest is computed from it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.files import write_json, write_text
from hf_nullspace.core.text import cell, escape, short, with_interval
from hf_nullspace.core.text import table as markdown_table
from study.analysis import Results, differences, table
from study.design import BEFORE, Choice


def complete(content: dict[str, Any], *, resamples: int = 2000) -> dict[str, Any]:
    """``content`` (study, selection, power, runs) with its table, its paired differences and its costs.

    ``between_arms`` has the average's differences of every two arms.
    """
    results, study = Results(content), content["study"]
    arms, groups = list(results.correct), study["groups"]
    each = {title: {title: 1.0} for title in study["conditions"]}

    def against(reference: str, groups: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, list[float]]]:
        pairs = [(arm, reference) for arm in arms if arm != reference]
        return {arm: found for (arm, _), found in differences(results, groups, pairs, resamples=resamples).items()}

    average = {"average": groups["average"]}
    between = differences(results, average, list(permutations(arms, 2)), resamples=resamples)
    return content | {
        "table": table(results, groups),
        "differences": against(study["control"], groups | each),
        "against_before": against(BEFORE, groups),
        "between_arms": {
            arm: {other: found["average"] for (one, other), found in between.items() if one == arm and found}
            for arm in arms
        },
        "cost": costs(content["runs"]),
        "resamples": resamples,
    }


def costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Arm -> passes in forward-equivalents per run, those of its noises and attacks, seconds; means over the seeds."""
    found: dict[str, dict[str, float]] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs if run["cost"] is not None):
        mine = [run["cost"] for run in runs if run["arm"] == arm]
        passes = {"forward_equivalents": [cost["forward_equivalents"] for cost in mine]}
        for stage in ("training", "attack", "noise"):
            passes[stage] = [cost["stages"][stage]["forward_equivalents"] for cost in mine]
        found[arm] = {name: float(np.mean(values)) for name, values in passes.items()}
        found[arm]["seconds"] = round(float(np.mean([cost["seconds"] for cost in mine])), 1)
    return found


def write_study(content: Mapping[str, Any], folder: Path | str) -> dict[str, Path]:
    """Write ``results.json``, ``results.md``, ``cost.png`` and ``conditions.png`` into ``folder``."""
    folder = Path(folder)
    return {
        "json": write_json(folder / "results.json", dict(content)),
        "md": write_text(folder / "results.md", markdown(content)),
        "cost": plot_cost(content, folder / "cost.png"),
        "conditions": plot_conditions(content, folder / "conditions.png"),
    }


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of a study, to be read."""
    groups, control = list(content["study"]["groups"]), content["study"]["control"]
    arms, between = list(content["table"]), content["between_arms"]
    seeds = Counter(run["arm"] for run in content["runs"])
    rates = {run["arm"]: Choice(run["learning_rate"], run.get("alpha", 1.0)) for run in content["runs"]}
    lines = []

    def add(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = markdown_table([cell(text) for text in head], [[cell(text) for text in row] for row in rows])
        lines.extend([title, "", *table, ""])

    add(
        "Accuracy in %, mean over the seeds ± their standard deviation.",
        ["arm", "seeds", *map(short, groups)],
        ([arm, str(seeds[arm]), *(spread(entry.get(g)) for g in groups)] for arm, entry in content["table"].items()),
    )
    add(
        f"Paired differences to {escape(control)} in points, with 95% intervals over images.",
        ["arm", *map(short, groups)],
        ([arm, *(_interval(entry.get(g)) for g in groups)] for arm, entry in content["differences"].items()),
    )
    add(
        "The same for the average, between every two arms: the row's minus the column's.",
        ["", *arms],
        ([arm, *(_interval(between[arm].get(other)) for other in arms)] for arm in arms),
    )
    kinds = ("forward_equivalents", "training", "attack", "noise", "seconds")
    add(
        "Cost of one run, in forward passes of one image (a backward pass to the parameters is two).",
        ["arm", "learning rate", "all", "training steps", "attacks", "noises", "seconds"],
        ([a, str(rates[a]), *(f"{cost[kind]:,.0f}" for kind in kinds)] for a, cost in content["cost"].items()),
    )
    if content["power"] is not None:
        average = content["power"]["average"]
        lines.append(
            f"Written down before: one seed on {content['power']['report_images']} images sees a difference of the "
            f"average from {average['smallest']:.2f} points on ({average['smallest_with_80_percent_power']:.2f} in "
            "four studies of five).\n"
        )
    return "\n".join(lines)


def spread(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['mean']:.2f}" if entry["spread"] is None else f"{entry['mean']:.2f} ± {entry['spread']:.2f}"


def _interval(entry: Sequence[float] | None) -> str:
    return "" if entry is None else with_interval(*entry)


def plot_cost(content: Mapping[str, Any], path: Path) -> Path:
    """Difference of the average to the control, with its interval, against the cost of a run."""
    control = content["study"]["control"]
    figure, ((axes,),) = canvas(8.5, 4.2)
    sizes = []
    for place, arm in enumerate(content["table"]):
        own = (0.0, 0.0, 0.0) if arm == control else content["differences"][arm].get("average")
        if own is None or arm not in content["cost"]:
            continue
        value, low, high = own
        sizes += [abs(value)] if arm != control else []
        error = [[value - low], [high - value]]
        style = {"fmt": "os"[place // 10 % 2], "color": _color(place), "capsize": 3, "label": arm}
        axes.errorbar(content["cost"][arm]["forward_equivalents"], value, yerr=error, **style)
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="cost of a run (forward passes of one image)")
    axes.set_ylabel(f"average - {control} (points)")
    if difference_scale(sizes) == "symlog":
        axes.set_yscale("symlog", linthresh=1.0, linscale=1.5)
        axes.autoscale_view()
        bottom, top = axes.get_ylim()
        ticks = [sign * size for sign in (-1, 1) for size in (0.5, 1, 2, 5, 10, 20, 50)]
        axes.set_yticks([tick for tick in [0, *ticks] if bottom <= tick <= top])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_yticks([], minor=True)
        axes.set_ylabel(f"average - {control} (points; logarithmic beyond 1)")
    figure.legend(loc="outside right upper", fontsize="x-small")
    return save_png(figure, path)


def difference_scale(sizes: Sequence[float]) -> str:
    """Matplotlib's scale for differences of these absolute values: "symlog" if one is over ten times their median."""
    return "symlog" if sizes and max(sizes) > 10 * float(np.median(sizes)) else "linear"


def plot_conditions(content: Mapping[str, Any], path: Path) -> Path:
    """Accuracy per group of conditions, a bar for each arm with the spread over its seeds; five groups in a row."""
    groups, arms = list(content["study"]["groups"]), list(content["table"])
    rows = [groups[first : first + 5] for first in range(0, len(groups), 5)]
    figure, every_axes = canvas(9.0, 1.2 + 2.6 * len(rows), len(rows))
    width = 0.85 / len(arms)
    for axes, row in zip(every_axes[:, 0], rows, strict=True):
        for place, arm in enumerate(arms):
            entries = [content["table"][arm].get(group, {"mean": np.nan, "spread": None}) for group in row]
            where = np.arange(len(row)) + (place - (len(arms) - 1) / 2) * width
            means, errors = ([entry["mean"] for entry in entries], [entry["spread"] or 0.0 for entry in entries])
            axes.bar(where, means, width, yerr=errors, label=arm, color=_color(place), error_kw={"linewidth": 0.7})
        axes.set_xticks(range(len(row)), [short(group) for group in row], fontsize=8)
        axes.set(ylabel="accuracy (%)", xlim=(-0.5, 4.5))
    figure.legend(
        *every_axes[0, 0].get_legend_handles_labels(), loc="outside upper center", fontsize="x-small", ncols=4
    )
    return save_png(figure, path)


def _color(place: int) -> tuple[float, ...]:
    """The first ten are those of every plot, the next ten lighter."""
    from matplotlib import colormaps

    return tuple(colormaps["tab20"](place % 10 * 2 + place // 10 % 2))
