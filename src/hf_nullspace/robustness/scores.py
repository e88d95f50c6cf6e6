"""Scores over per-image results; NumPy only. An average over conditions needs all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, all in the unit of the estimate (accuracies in [0, 1])."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def accuracy(correct: ArrayLike) -> Interval:
    """Share of correct images with its 95% Wilson interval; ``correct`` is one bool per image."""
    correct = as_bools(correct)
    return wilson(int(correct.sum()), correct.size)


def wilson(correct: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for ``correct`` out of ``n`` (Wilson 1927): stays in [0, 1], also at 0% and 100%."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct of {n} images is not a score")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a probability in (0, 1), such as 0.95")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def paired_difference(before: ArrayLike, after: ArrayLike, *, resamples: int = 10_000) -> Interval:
    """Accuracy ``after`` minus accuracy ``before`` with its 95% percentile bootstrap interval over images.

    One bool per image in the same order. An image's difference is -1, 0 or 1, so resampling images is drawing the three
    counts from a multinomial.
    """
    before, after = as_bools(before), as_bools(after)
    if before.shape != after.shape:
        raise ValueError(f"{before.size} images before, {after.size} after; a paired difference needs the same images")
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    n = before.size
    counts = np.random.default_rng(0).multinomial(n, [lost / n, won / n, (n - lost - won) / n], size=resamples)
    return percentile((won - lost) / n, (counts[:, 1] - counts[:, 0]) / n)


def paired_mean_difference(
    before: Sequence[ArrayLike],
    after: Sequence[ArrayLike],
    *,
    weights: Sequence[float] | None = None,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Difference of the mean accuracy over several conditions on the same images, images resampled jointly.

    ``before`` and ``after`` hold one bool array per condition (or seed), all over the same images in the same order.
    ``weights`` of the conditions sum to 1; by default they are equal.
    """
    rows = len(after)
    shares = np.full(rows, 1 / rows) if weights is None else np.asarray(weights, dtype=float)
    if len(before) != rows or shares.shape != (rows,) or abs(shares.sum() - 1) > 1e-9:
        raise ValueError(f"{len(before)} conditions before, {rows} after, weights {weights}; their sum must be 1")
    change = np.stack([as_bools(row) for row in after]).astype(float) - np.stack([as_bools(row) for row in before])
    values, counts = np.unique((shares @ change).round(12), return_counts=True)
    n, rng = change.shape[1], np.random.default_rng(seed)
    chunks = [rng.multinomial(n, counts / n, size=min(100, resamples - i)) @ values for i in range(0, resamples, 100)]
    return percentile(float((shares @ change).mean()), np.concatenate(chunks) / n)


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]],
    reference: Mapping[str, Sequence[float]],
    *,
    clean: tuple[float, float] | None = None,
) -> float:
    """mCE in %, or relative mCE when ``clean`` gives the clean errors of the model and of the reference.

    The mean over the corruptions of errors over the severities, divided by the reference's (Hendrycks & Dietterich
    2019). All are in the same unit; every corruption of one side must be on the other.
    """
    if not errors or set(errors) != set(reference):
        alone, unmeasured = sorted(set(errors) - set(reference)), sorted(set(reference) - set(errors))
        raise ValueError(f"no mCE over a part: {alone} without a reference, {unmeasured} without a measurement")
    own, base = clean or (0.0, 0.0)
    found = []
    for c in sorted(errors):
        ours, theirs = [error - own for error in errors[c]], [error - base for error in reference[c]]
        if len(ours) != len(theirs):
            raise ValueError(f"{len(ours)} severities, but the reference has {len(theirs)}")
        if not sum(theirs) > 0:
            raise ValueError(f"the reference makes no error that can be compared with: {[float(r) for r in theirs]}")
        found.append(100 * sum(ours) / sum(theirs))
    return float(np.mean(found))


def mean_of(columns: Mapping[str, float], needed: Sequence[str]) -> float:
    """The mean of the ``needed`` columns; raises and names those that are missing."""
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"no average: {', '.join(missing)} not measured (needed: {', '.join(needed)})")
    return float(np.mean([columns[name] for name in needed]))


NINE_COLUMNS = ("clean", "FGSM", "DAmageNet", "A", "C", "V2", "R", "Sketch", "Stylized")


def nine_column_average(columns: Mapping[str, float]) -> float:
    """The paper's average (table 1) in %: eight accuracies and 100 - mCE for "C"; without PatchFool, CW and MIM."""
    turned = {name: 100 - value if name == "C" else value for name, value in columns.items()}
    return mean_of(turned, NINE_COLUMNS)


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by images, in [0, 1] (Guo et al. 2017).

    ``confidence`` is the probability of the predicted class, one per image; a bin is open below and closed above.
    """
    correct, confidence = as_bools(correct), np.asarray(confidence, dtype=float)
    if confidence.shape != correct.shape or not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"expected one confidence in [0, 1] for each of {correct.size} images")
    if bins < 1:
        raise ValueError(f"bins={bins}: expected at least 1")
    which = np.maximum(np.ceil(confidence * bins).astype(int) - 1, 0)
    surplus = np.bincount(which, weights=confidence - correct)
    return float(np.abs(surplus).sum() / correct.size)


def worst_condition(accuracies: Mapping[str, float]) -> tuple[str, float]:
    """Name and accuracy of the condition with the lowest accuracy; the first of equals."""
    if not accuracies:
        raise ValueError("there are no conditions")
    name = min(accuracies, key=accuracies.__getitem__)
    return name, accuracies[name]


def as_bools(correct: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(correct)
    if array.dtype != np.bool_ or array.ndim != 1 or not array.size:
        raise ValueError(f"expected one bool per image, at least one image; got {array.dtype} of shape {array.shape}")
    return array


def percentile(value: float, draws: NDArray[np.float64]) -> Interval:
    """The 95% percentile interval of a bootstrap."""
    low, high = np.quantile(draws, [0.5 - 0.95 / 2, 0.5 + 0.95 / 2])
    return Interval(float(value), float(low), float(high))
