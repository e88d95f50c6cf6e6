"""Results to read: a table for the terminal, JSON, CSV, Markdown, and bars."""

import base64
import csv
import io
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hf_nullspace.files import write_json, write_whole
from hf_nullspace.robustness.scores import Interval, paired_difference
from hf_nullspace.robustness.suite import ConditionResult

Results = Mapping[str, Sequence[ConditionResult]]  # checkpoint name -> its results, in the same order of conditions
LIBRARIES = ("hf-nullspace", "torch", "transformers", "datasets", "accelerate", "numpy", "pillow")


def write_report(results: Results, folder: str | Path, *, context: Mapping[str, Any] | None = None) -> dict[str, Path]:
    """Write results.json, results.md, results.csv and results.png into ``folder``; returns their paths.

    ``context`` goes into the JSON (set, checkpoint, settings of the run). Call it on the main process only.
    """
    paths = {kind: Path(folder) / f"results.{kind}" for kind in ("json", "md", "csv", "png")}
    write_json(paths["json"], as_json(results, context or {}))
    write_text(paths["md"], markdown_table(results) + "\n")
    write_text(paths["csv"], csv_table(results))
    plot_bars(results, paths["png"])
    return paths


def table_rows(results: Results) -> list[list[str]]:
    """Header and rows in %: a column per checkpoint, then the differences with 95% paired bootstrap intervals."""
    check_same_conditions(results)
    names = list(results)
    pairs = comparisons(names)
    rows = [["condition", "images", *names, *(f"{after} - {before}" for before, after in pairs)]]
    for index, first in enumerate(results[names[0]]):
        scores = [f"{100 * results[name][index].score.value:.2f}" for name in names]
        changes = [signed(difference(results, before, after, index)) for before, after in pairs]
        rows.append([first.condition, str(first.n), *scores, *changes])
    return rows


def terminal_table(results: Results) -> str:
    """Aligned columns, numbers to the right."""
    rows = table_rows(results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    note = "Accuracy in %; differences in points with 95% intervals (paired bootstrap over images)."
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note if len(results) > 1 else "Accuracy in %."])


def markdown_table(results: Results) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table_rows(results)]
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def csv_table(results: Results) -> str:
    """One line per checkpoint and condition; scores in [0, 1]."""
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["checkpoint", "condition", "n", "correct", "accuracy", "low", "high", "seconds", "seed"])
        for name, conditions in results.items():
            for r in conditions:
                score = r.score
                counts = (r.n, int(r.correct.sum()))
                writer.writerow([name, r.condition, *counts, score.value, score.low, score.high, r.seconds, r.seed])
        return file.getvalue()


def as_json(results: Results, context: Mapping[str, Any]) -> dict[str, Any]:
    """One record per checkpoint and condition, differences between checkpoints, versions."""
    check_same_conditions(results)
    records = [{"checkpoint": name} | record(r) for name, conditions in results.items() for r in conditions]
    differences = [
        {"before": before, "after": after, "condition": r.condition, **vars(difference(results, before, after, index))}
        for before, after in comparisons(list(results))
        for index, r in enumerate(results[before])
    ]
    return {"context": dict(context), "versions": versions(), "results": records, "differences": differences}


def record(result: ConditionResult) -> dict[str, Any]:
    score = result.score
    return {
        "condition": result.condition,
        "protocol": result.protocol,
        "n": result.n,
        "correct": int(result.correct.sum()),
        "score": score.value,
        "interval": [score.low, score.high],
        "seconds": round(result.seconds, 3),
        "seed": result.seed,
        "correct_bits": base64.b64encode(np.packbits(result.correct).tobytes()).decode(),
    }


def result_from_record(record: Mapping[str, Any]) -> ConditionResult:
    """The inverse of ``record``: what a results.json says about one condition."""
    bits = np.frombuffer(base64.b64decode(record["correct_bits"]), dtype=np.uint8)
    correct = np.unpackbits(bits, count=record["n"]).astype(bool)
    if int(correct.sum()) != record["correct"]:
        raise ValueError(
            f"damaged record of {record['condition']!r}: the bits do not sum to {record['correct']} correct"
        )
    return ConditionResult(record["condition"], correct, record["seconds"], record["seed"], record["protocol"])


def comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every checkpoint against the first, then the last against those between (nullspace against its control)."""
    return [(names[0], name) for name in names[1:]] + [(name, names[-1]) for name in names[1:-1]]


def difference(results: Results, before: str, after: str, index: int) -> Interval:
    return paired_difference(results[before][index].correct, results[after][index].correct)


def signed(change: Interval) -> str:
    return f"{100 * change.value:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}]"


def check_same_conditions(results: Results) -> None:
    if not results or not all(results.values()):
        raise ValueError("there are no results to report")
    first, *others = ([(r.condition, r.n, r.seed) for r in conditions] for conditions in results.values())
    for name, other in zip(list(results)[1:], others, strict=True):
        if other != first:
            odd = sorted({str(c) for c in set(first) ^ set(other)})
            raise ValueError(f"{name} was measured under other conditions than {next(iter(results))}: {', '.join(odd)}")


def plot_bars(results: Results, path: str | Path) -> None:
    """Accuracy with its 95% interval per condition, a bar for each checkpoint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_same_conditions(results)
    labels = [short(r.condition) for r in next(iter(results.values()))]
    figure = Figure(figsize=(max(6.0, 1.6 + len(labels) * (0.5 + 0.25 * len(results))), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(results)
    for place, (name, conditions) in enumerate(results.items()):
        scores = [r.score for r in conditions]
        heights = np.array([100 * s.value for s in scores])
        spread = np.array([[100 * (s.value - s.low), 100 * (s.high - s.value)] for s in scores]).T
        where = np.arange(len(labels)) + (place - (len(results) - 1) / 2) * width
        axes.bar(where, heights, width, yerr=spread, capsize=2, label=name, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy in % (95% interval)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(results), 4), frameon=False)
    canvas = FigureCanvasAgg(figure)
    write_whole(path, lambda temporary: canvas.print_png(str(temporary)))


def short(condition: str) -> str:
    """A condition's name for an axis: its full settings stand in the table."""
    return condition.removeprefix("generated ").replace("_", " ").replace(", ", ",\n", 1)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # run from a source tree
            found[library] = "not installed"
    return found


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_whole(path, write)
