"""Results to read: a table for the terminal, JSON, CSV, Markdown, and pictures. Nothing is left out in silence."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_nullspace.core.files import write_json, write_text
from hf_nullspace.core.text import cell, escape, table, with_interval
from hf_nullspace.robustness.checks import Check, unreliable
from hf_nullspace.robustness.plots import Results, plot_bars, plot_severity, plot_strength
from hf_nullspace.robustness.published import TABLE_1, TABLE_1_COLUMNS
from hf_nullspace.robustness.records import record, versions
from hf_nullspace.robustness.scores import Interval, paired_difference, paired_mean_difference, worst_condition
from hf_nullspace.robustness.summaries import image_averages, summaries

Checks = Mapping[str, Sequence[Check]]  # checkpoint name -> results of checks.run_checks
Missing = Mapping[str, str]  # condition -> why it was not measured, and how to get what it needs
UNRELIABLE = "(!)"
NOTHING: Mapping[str, Any] = MappingProxyType({})


def write_report(
    results: Results,
    folder: str | Path,
    *,
    context: Mapping[str, Any] = NOTHING,
    missing: Missing = NOTHING,
    checks: Checks = NOTHING,
    published: bool = False,
    remarks: str = "",
) -> dict[str, Path]:
    """Write results.json, .md, .csv and pictures into ``folder``; returns their paths.

    ``context`` goes into the JSON (set, checkpoint, settings of the run); ``remarks`` is Markdown for the end of
    results.md. severity.png and strength.png exist where there is something to draw. Call it on the main process only.
    """
    folder = Path(folder)
    text = markdown(results, missing=missing, checks=checks, published=published) + remarks
    paths = {
        "json": write_json(folder / "results.json", as_json(results, context, missing, checks)),
        "md": write_text(folder / "results.md", text),
        "csv": write_text(folder / "results.csv", csv_table(results)),
        "png": plot_bars(results, folder / "results.png"),
    }
    for name, plot in (("severity", plot_severity), ("strength", plot_strength)):
        if (path := plot(results, folder / f"{name}.png")) is not None:
            paths[name] = path
    return paths


def table_rows(results: Results, missing: Missing = NOTHING, checks: Checks = NOTHING) -> list[list[str]]:
    """Header and rows in %: a column per checkpoint, then its 95% Wilson intervals, or, of several checkpoints, the
    differences with 95% paired bootstrap intervals."""
    check_same_conditions(results)
    names = list(results)
    pairs = comparisons(names)
    last = [f"{after} - {before}" for before, after in pairs] or ["95% interval"]
    blank = [""] * len(last)
    rows = [["condition", "images", *names, *last]]
    for index, first in enumerate(results[names[0]]):
        row = {name: results[name][index] for name in names}
        doubts = {name: unreliable(checks.get(name, ()), attack="attack" in r.protocol) for name, r in row.items()}
        scores = [f"{100 * r.score.value:.2f}{f' {UNRELIABLE}' * bool(doubts[name])}" for name, r in row.items()]
        interval = f"[{100 * first.score.low:.2f}, {100 * first.score.high:.2f}]"
        changes = [signed(difference(results, before, after, index)) for before, after in pairs] or [interval]
        rows.append([first.condition, str(first.n), *scores, *changes])
        if first.correct_all is not None:
            every = [f"{100 * r.correct_all.mean():.2f}" for r in row.values() if r.correct_all is not None]
            rows.append([f"{first.condition}, among all classes", str(first.n), *every, *blank])
    averages = {name: summaries(results[name], results[names[0]]) for name in names}
    weights = image_averages([r.condition for r in results[names[0]]])
    for title in dict.fromkeys(title for found in averages.values() for title in found):
        values = {name: found[title] for name, found in averages.items() if title in found}
        if title in weights:
            changes = [signed(average_difference(results, before, after, weights[title])) for before, after in pairs]
        else:
            changes = [f"{values[a] - values[b]:+.2f}" if a in values and b in values else "" for b, a in pairs]
        rows.append([title, "", *(f"{values[n]:.2f}" if n in values else "" for n in names), *(changes or blank)])
    rows += [[title, "", *["missing"] * len(names), *blank] for title in grouped(missing)]
    return rows


def notes(results: Results, missing: Missing, checks: Checks) -> list[str]:
    """What has to be read with the table."""
    lines = ["Accuracy in %; mCE in %, lower is better."]
    if len(results) > 1:
        lines[0] += " Differences in points with 95% intervals (paired bootstrap over images)."
    for name, answers in checks.items():
        failed = [check for check in answers if not check.passed]
        lines += [f"{UNRELIABLE} {name}: {check.name}: {check.detail}" for check in failed]
        if not failed:
            lines.append(f"{name}: {len(answers)} checks passed." if answers else f"{name}: no checks were run.")
    for name, conditions in results.items():
        if len(conditions) > 1:
            worst, _ = worst_condition({r.condition: r.score.value for r in conditions})
            lines.append(f"Worst condition of {name}: {worst}")
    partial = {str(r.protocol["note"]) for rows in results.values() for r in rows if "note" in r.protocol}
    lines += [f"Note: {note}" for note in sorted(partial)]
    if missing:
        lines.append("Averages over what is missing are left out; none is over a part.")
    lines += [f"Missing: {title}: {why}" for title, why in grouped(missing).items()]
    return lines


def grouped(missing: Missing) -> dict[str, str]:
    """The cells of a set (imagenet-c/fog/1, ...) in one line that counts them, with the first one's reason."""
    found: dict[str, list[str]] = {}
    for title in missing:
        found.setdefault(title.split("/")[0], []).append(title)
    return {
        titles[0] if len(titles) == 1 else f"{name} ({len(titles)} conditions)": missing[titles[0]]
        for name, titles in found.items()
    }


def terminal_table(
    results: Results, *, missing: Missing = NOTHING, checks: Checks = NOTHING, published: bool = False
) -> str:
    """Aligned columns, numbers to the right, and what has to be read with them."""
    lines = aligned(table_rows(results, missing, checks)) + notes(results, missing, checks)
    if published:
        lines += ["", "Quoted from the paper, table 1 (not measured here):", *aligned(published_rows())]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])]


def markdown(results: Results, *, missing: Missing = NOTHING, checks: Checks = NOTHING, published: bool = False) -> str:
    """The same as a Markdown document."""
    head, *rows = [[cell(text) for text in row] for row in table_rows(results, missing, checks)]
    parts = ["\n".join(table(head, rows)), "\n".join(f"* {escape(note)}" for note in notes(results, missing, checks))]
    if published:
        head, *rows = published_rows()
        parts += ["Quoted from the paper, table 1 (not measured here):", "\n".join(table(head, rows))]
    return "\n\n".join(parts) + "\n"


def published_rows() -> list[list[str]]:
    """The paper's table 1: accuracies in %, but MIM is an error and C an mCE."""
    header = ["model", *("MIM (error)" if c == "MIM" else "C (mCE)" if c == "C" else c for c in TABLE_1_COLUMNS)]
    body = [[name, *("-" if v is None else f"{v:.2f}" for v in row.values())] for name, row in TABLE_1.items()]
    return [header, *body]


def csv_table(results: Results) -> str:
    """One line per checkpoint and condition; scores in [0, 1]."""
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["checkpoint", "condition", "n", "correct", "accuracy", "low", "high", "seconds", "seed"])
        for name, conditions in results.items():
            for r in conditions:
                counts, score = (r.n, int(r.correct.sum())), astuple(r.score)
                writer.writerow([name, r.condition, *counts, *score, r.seconds, r.seed])
        return file.getvalue()


def as_json(
    results: Results, context: Mapping[str, Any], missing: Missing = NOTHING, checks: Checks = NOTHING
) -> dict[str, Any]:
    """One record per checkpoint and condition, averages, differences between checkpoints, checks, versions."""
    check_same_conditions(results)
    records = [{"checkpoint": name} | record(r) for name, conditions in results.items() for r in conditions]
    differences = [
        {"before": before, "after": after, "condition": r.condition, **vars(difference(results, before, after, index))}
        for before, after in comparisons(list(results))
        for index, r in enumerate(results[before])
    ]
    first = next(iter(results.values()))
    return {
        "context": dict(context),
        "versions": versions(),
        "results": records,
        "averages": {name: summaries(conditions, first) for name, conditions in results.items()},
        "differences": differences,
        "missing": dict(missing),
        "checks": {name: [asdict(check) for check in answers] for name, answers in checks.items()},
    }


def comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every checkpoint against the first, then the last against those between (nullspace against its control)."""
    return [(names[0], name) for name in names[1:]] + [(name, names[-1]) for name in names[1:-1]]


def difference(results: Results, before: str, after: str, index: int) -> Interval:
    return paired_difference(results[before][index].correct, results[after][index].correct)


def average_difference(results: Results, before: str, after: str, weights: Mapping[str, float]) -> Interval:
    """Difference of a weighted mean over conditions on the same images, which are resampled jointly."""
    rows = [{r.condition: r.correct for r in results[name]} for name in (before, after)]
    first, second = ([row[condition] for condition in weights] for row in rows)
    return paired_mean_difference(first, second, weights=list(weights.values()))


def signed(change: Interval) -> str:
    return with_interval(100 * change.value, 100 * change.low, 100 * change.high)


def check_same_conditions(results: Results) -> None:
    if not results or not all(results.values()):
        raise ValueError("there are no results to report")
    first, *others = ([(r.condition, r.n, r.seed) for r in conditions] for conditions in results.values())
    for name, other in zip(list(results)[1:], others, strict=True):
        if other != first:
            odd = sorted({str(c) for c in set(first) ^ set(other)})
            raise ValueError(f"{name} was measured under other conditions than {next(iter(results))}: {', '.join(odd)}")
