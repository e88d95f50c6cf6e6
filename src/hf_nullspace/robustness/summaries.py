"""Averages over conditions: each names what it needs, and is absent (never partial) where something is missing."""

from collections.abc import Mapping, Sequence

import numpy as np

from hf_nullspace.robustness.corruptions import CORRUPTIONS, SEVERITIES
from hf_nullspace.robustness.published import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS
from hf_nullspace.robustness.scores import mean_corruption_error, mean_of, nine_column_average, worst_condition
from hf_nullspace.robustness.suite import ConditionResult

IMAGENET_COLUMNS = {
    "clean": "imagenet-1k",
    "FGSM": "imagenet-1k: FGSM(eps=1/255)",
    "DAmageNet": "damagenet",
    "A": "imagenet-a",
    "V2": "imagenet-v2",
    "R": "imagenet-r",
    "Sketch": "imagenet-sketch",
    "Stylized": "stylized-imagenet",
}
CIFAR_COLUMNS = ("clean", "FGSM(eps=1/255)", "PGD(eps=1/255, step=0.25/255, steps=10, norm='linf', random_start=True)")
FOUR = "average of clean, FGSM 1/255, PGD-10 1/255, cells"


def summaries(
    results: Sequence[ConditionResult], reference: Sequence[ConditionResult] | None = None
) -> dict[str, float]:
    """Name -> number in % of every average that the results of one checkpoint allow.

    ``reference`` are the results of another checkpoint, relative to which generated corruptions get an mCE.
    """
    scores, others = ({r.condition: 100 * r.score.value for r in rows} for rows in (results, reference or ()))
    found: dict[str, float] = {}
    for pattern, name in (("generated {c} {s}", "generated corruptions"), ("cifar10-c/{c}/{s}", "CIFAR-10-C")):
        cells, base = all_cells(scores, pattern), all_cells(others, pattern)
        if cells is None:
            continue
        mean = found[f"{name}, mean of 75"] = float(np.mean([value for row in cells.values() for value in row]))
        if base is not None and base != cells and all(sum(row) > 0 for row in errors(base).values()):
            found[f"{name}, mCE against the first checkpoint"] = mean_corruption_error(errors(cells), errors(base))
        if pattern.startswith("generated") and all(column in scores for column in CIFAR_COLUMNS):
            found[FOUR] = mean_of(scores | {"cells": mean}, [*CIFAR_COLUMNS, "cells"])
    if (cells := all_cells(scores, "imagenet-c/{c}/{s}")) is not None:
        own, alexnet = errors(cells), {c: [error] * len(SEVERITIES) for c, error in ALEXNET_ERRORS.items()}
        mce = found["ImageNet-C, mCE (AlexNet)"] = mean_corruption_error(own, alexnet)
        if "imagenet-1k" in scores:
            clean = (100 - scores["imagenet-1k"], ALEXNET_CLEAN_ERROR)
            found["ImageNet-C, relative mCE (AlexNet)"] = mean_corruption_error(own, alexnet, clean=clean)
        if all(title in scores for title in IMAGENET_COLUMNS.values()):
            columns = {column: scores[title] for column, title in IMAGENET_COLUMNS.items()}
            found["average of nine columns (table 1)"] = nine_column_average(columns | {"C": mce})
    if len(scores) > 1:
        found["worst condition"] = worst_condition(scores)[1]
    return found


def image_averages(conditions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Averages over conditions on the same images -> the weight of each condition; only those that are complete."""
    cells = [f"generated {c} {s}" for c in CORRUPTIONS for s in SEVERITIES]
    if not set(cells) <= set(conditions):
        return {}
    found = {"generated corruptions, mean of 75": dict.fromkeys(cells, 1 / len(cells))}
    if set(CIFAR_COLUMNS) <= set(conditions):
        found[FOUR] = dict.fromkeys(CIFAR_COLUMNS, 1 / 4) | dict.fromkeys(cells, 1 / 4 / len(cells))
    return found


def all_cells(scores: Mapping[str, float], pattern: str) -> dict[str, list[float]] | None:
    """Corruption -> accuracies in % over the severities, or None unless all 75 are there."""
    cells = {c: [pattern.format(c=c, s=s) for s in SEVERITIES] for c in CORRUPTIONS}
    if not all(title in scores for row in cells.values() for title in row):
        return None
    return {c: [scores[title] for title in row] for c, row in cells.items()}


def errors(cells: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {corruption: [100 - accuracy for accuracy in row] for corruption, row in cells.items()}
