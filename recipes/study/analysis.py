"""From a study's JSON to averages, paired differences with intervals, and what a design can see. NumPy only.

Intervals are over images: these are resampled jointly for all arms and conditions, the seeds averaged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_nullspace.robustness.records import from_bits
from hf_nullspace.robustness.scores import percentile
from study.design import Slice

Array = NDArray[np.float64]
Z = 1.96
Z_POWER = 1.96 + 0.8416
"""A difference of this many standard errors has an interval without zero in 80% of studies."""


class Results:
    """The runs of a study on its report slice, by arm and seed."""

    def __init__(self, content: Mapping[str, Any]):
        report = content["study"]["report"]
        where = Slice("report", report["first"], report["stop"])
        self.conditions: dict[str, int | None] = content["study"]["conditions"]
        self.places = {title: np.array(where.places(limit)) for title, limit in self.conditions.items()}
        self.correct: dict[str, dict[int | None, dict[str, NDArray[np.bool_]]]] = {}
        for run in content["runs"]:
            bits = {t: from_bits(found, len(self.places[t])) for t, found in run["correct_bits"].items()}
            self.correct.setdefault(run["arm"], {})[run["seed"]] = bits

    def change(self, arm: str, reference: str, title: str) -> Array:
        """Per image, in [-1, 1]: arm minus reference under one condition, averaged over the seeds that both have.

        NaN where they have none in common. The checkpoint before has no seed, and is compared with all.
        """
        ours, theirs = (
            {seed: found[title] for seed, found in self.correct[one].items() if title in found}
            for one in (arm, reference)
        )
        if None not in {*ours, *theirs}:
            both = ours.keys() & theirs.keys()
            ours, theirs = ({seed: found[seed] for seed in both} for found in (ours, theirs))
        if not ours or not theirs:
            return np.full(len(self.places[title]), np.nan)
        return np.mean(list(ours.values()), axis=0) - np.mean(list(theirs.values()), axis=0)


def differences(
    results: Results,
    groups: Mapping[str, Mapping[str, float]],
    pairs: Sequence[tuple[str, str]],
    *,
    resamples: int = 2000,
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(arm, reference) -> group -> [arm minus reference, low, high], in points with 95% intervals.

    Percentile bootstrap over the images of all conditions together; a condition on fewer images takes those of them
    that were drawn, as often as they were. A group has no entry where an arm and the reference share no seed.
    """
    everything = np.unique(np.concatenate(list(results.places.values())))
    where = {title: np.searchsorted(everything, places) for title, places in results.places.items()}
    titles = [title for title in results.conditions if any(title in weights for weights in groups.values())]
    changes = {t: np.stack([results.change(*pair, t) for pair in pairs], axis=1) for t in titles}
    rng = np.random.default_rng(0)
    draws = {title: np.full((resamples, len(pairs)), np.nan) for title in titles}
    equal = np.full(len(everything), 1 / len(everything))
    for first in range(0, resamples, 100):
        some = slice(first, min(first + 100, resamples))
        counts = rng.multinomial(len(everything), equal, size=some.stop - some.start).astype(float)
        for title in titles:
            mine = counts[:, where[title]]
            drawn = mine.sum(1, keepdims=True)
            np.divide(mine @ changes[title], drawn, out=draws[title][some], where=drawn > 0)
    found: dict[tuple[str, str], dict[str, list[float]]] = {pair: {} for pair in pairs}
    for group, weights in groups.items():
        sampled = np.stack([weight * draws[title] for title, weight in weights.items()]).sum(0)
        value = sum(weight * changes[title].mean(0) for title, weight in weights.items())
        for column, pair in enumerate(pairs):
            if np.isnan(value[column]):
                continue
            # A condition of few images has none of them in some draws.
            drawn = sampled[np.isfinite(sampled[:, column]), column]
            interval = percentile(float(value[column]), drawn)
            found[pair][group] = [round(100 * x, 4) for x in (interval.value, interval.low, interval.high)]
    return found


def table(results: Results, groups: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> group -> mean accuracy over the seeds in %, their standard deviation (None for one), and each seed's.

    A group has no entry where no seed of the arm was measured under all of its conditions.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in results.correct}
    for arm, runs in results.correct.items():
        for group, weights in groups.items():
            measured = [correct for correct in runs.values() if weights.keys() <= correct.keys()]
            each = [100 * float(sum(w * correct[t].mean() for t, w in weights.items())) for correct in measured]
            if each:
                found[arm][group] = {
                    "mean": round(float(np.mean(each)), 4),
                    "spread": round(float(np.std(each, ddof=1)), 4) if len(each) > 1 else None,
                    "seeds": [round(value, 4) for value in each],
                }
    return found


def power(
    control: Mapping[str, NDArray[np.bool_]],
    others: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    weights: Mapping[str, float],
    images: Mapping[str, int],
) -> dict[str, Any]:
    """The smallest differences that the report can see, in points, from what the selection slice shows of the noise.

    Two fine-tunings of one checkpoint disagree on a share p of the images (the discordance). The difference of their
    accuracies on n images has a standard error of at most sqrt(p / n). For the average the variance of the per-image
    mean over its conditions takes the place of p: it knows how much they share. One seed; more see smaller differences.

    Args:
        control, others: condition -> one bool per selection image, of the control and of each other arm.
        weights: of the conditions in the average.
        images: condition -> how many images the report has of it.

    Raises:
        ValueError: if there is no other arm, or the conditions are on different selection images.
    """
    if not others:
        raise ValueError("power compares arms with the control; there is no other arm")
    if len({len(values) for arm in (control, *others.values()) for values in arm.values()}) != 1:
        raise ValueError("the conditions of the average are on different numbers of selection images")
    per_condition = {}
    for title in weights:
        p = float(np.mean([(arm[title] != control[title]).mean() for arm in others.values()]))
        per_condition[title] = {"discordance": round(p, 5), "smallest": smallest(p, images[title])}
    change = [
        sum(weight * (arm[t].astype(float) - control[t]) for t, weight in weights.items()) for arm in others.values()
    ]
    spread = float(np.sqrt(np.mean([np.var(values) for values in change])))
    n = min(images[title] for title in weights)
    return {
        "selection_images": len(next(iter(control.values()))),
        "report_images": n,
        "seeds": 1,
        "average": {
            "spread_per_image": round(spread, 5),
            "smallest": smallest(spread**2, n),
            "smallest_with_80_percent_power": round(smallest(spread**2, n) * Z_POWER / Z, 4),
        },
        "conditions": per_condition,
    }


def smallest(p: float, n: int) -> float:
    """The difference in points whose 95% interval just leaves out zero: 1.96 sqrt(p / n)."""
    return round(100 * Z * float(np.sqrt(p / n)), 4)
