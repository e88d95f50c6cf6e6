"""Scores against SciPy, brute force and published numbers."""

import numpy as np
import pytest
from scipy import stats

from hf_nullspace.robustness import published
from hf_nullspace.robustness.scores import (
    Interval,
    expected_calibration_error,
    mean_corruption_error,
    nine_column_average,
    paired_difference,
    paired_mean_difference,
    wilson,
)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (7, 10), (481, 1000), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(correct, n, confidence):
    expected = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    got = wilson(correct, n, confidence=confidence)
    assert got.value == correct / n
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_interval_is_written_in_percent():
    assert str(Interval(0.5, 0.25, 0.75125)) == "50.00 [25.00, 75.12]"


def test_paired_difference_is_the_bootstrap_over_images():
    rng = np.random.default_rng(0)
    before, after = rng.random(300) < 0.6, rng.random(300) < 0.7
    got = paired_difference(before, after)
    change = after.astype(float) - before
    draws = [rng.choice(change, change.size).mean() for _ in range(10_000)]
    assert got.value == pytest.approx(change.mean())
    assert (got.low, got.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)
    same = paired_difference(before, before)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_means_over_conditions_resample_images_jointly():
    rng = np.random.default_rng(1)
    before = [rng.random(200) < p for p in (0.5, 0.6, 0.4)]
    after = [row | (rng.random(200) < 0.2) for row in before]
    got = paired_mean_difference(before, after)
    change = (np.array(after).astype(float) - np.array(before)).mean(0)
    draws = [rng.choice(change, 200).mean() for _ in range(5000)]
    assert got.value == pytest.approx(change.mean())
    assert (got.low, got.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)
    weighted = paired_mean_difference(before, after, weights=[0.5, 0.25, 0.25])
    by_hand = sum(w * (a.mean() - b.mean()) for w, a, b in zip((0.5, 0.25, 0.25), after, before, strict=True))
    assert weighted.value == pytest.approx(by_hand)
    assert weighted.low < by_hand < weighted.high
    for weights in ([0.5, 0.5], [1.0, 1.0, 1.0], [0.5, 0.25, 0.25 + 2e-9]):
        with pytest.raises(ValueError, match="3 conditions before, 3 after"):
            paired_mean_difference(before, after, weights=weights)
    with pytest.raises(ValueError, match="2 conditions before, 3 after"):
        paired_mean_difference(before[:2], after)
    one = paired_mean_difference(before, after, resamples=150, seed=4)
    assert one == paired_mean_difference(before, after, resamples=150, seed=4)
    assert one != paired_mean_difference(before, after, resamples=150, seed=5)


def test_corruption_errors_by_hand():
    errors = {"fog": [0.2, 0.4], "snow": [0.3, 0.3]}
    reference = {"fog": [0.4, 0.8], "snow": [0.5, 0.7]}
    assert mean_corruption_error(errors, reference) == pytest.approx(100 * (0.6 / 1.2 + 0.6 / 1.2) / 2)
    relative = mean_corruption_error(errors, reference, clean=(0.1, 0.2))
    assert relative == pytest.approx(100 * (0.4 / 0.8 + 0.4 / 0.8) / 2)
    assert mean_corruption_error(reference, reference) == pytest.approx(100)


def test_the_papers_averages_come_out_of_its_columns():
    assert len(published.TABLE_1) == 6
    for name, row in published.TABLE_1.items():
        expected = 48.00 if name.startswith("ViT-B + DAT + NS") else row["average"]  # 48.01 is printed
        measured = {column: value for column, value in row.items() if value is not None}
        assert nine_column_average(measured) == pytest.approx(expected, abs=0.01)
        del measured["R"]
        with pytest.raises(ValueError, match="R not measured"):
            nine_column_average(measured)


def test_alexnet_against_itself_is_100():
    reference = {c: [error] * 5 for c, error in published.ALEXNET_ERRORS.items()}
    assert mean_corruption_error(reference, reference) == pytest.approx(100)
    clean = (published.ALEXNET_CLEAN_ERROR, published.ALEXNET_CLEAN_ERROR)
    assert mean_corruption_error(reference, reference, clean=clean) == pytest.approx(100)
    assert np.mean(list(published.ALEXNET_ERRORS.values())) == pytest.approx(78.9, abs=0.05)
    half = {c: [e / 2 for e in errors] for c, errors in reference.items()}
    assert mean_corruption_error(half, reference) == pytest.approx(50)


def test_calibration_by_hand_and_for_a_calibrated_model():
    confidence, correct = [0.95, 0.95, 0.55, 0.55], [True, False, True, True]
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx((2 * 0.45 + 2 * 0.45) / 4)
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, 200_000)
    assert expected_calibration_error(confidence, rng.random(200_000) < confidence) < 0.01
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0


def test_a_bin_is_open_below_and_closed_above():
    """Confidences that are edges of bins, exactly representable, against the definition written out."""
    assert expected_calibration_error([0.5, 0.75], [True, False], bins=2) == (0.5 + 0.75) / 2
    assert expected_calibration_error([0.0, 0.25], [True, False], bins=2) == (1 - 0.25) / 2, "0 is in the first bin"
    assert expected_calibration_error([1.0, 0.75], [False, True], bins=2) == (1 - 0.25) / 2, "1 is in the last bin"
    rng = np.random.default_rng(3)
    confidence, correct = rng.integers(1, 61, 500) / 60, rng.random(500) < 0.5  # every fourth is an edge of 15 bins
    total = 0.0
    for upper in range(4, 61, 4):
        inside = (confidence > (upper - 4) / 60) & (confidence <= upper / 60)
        total += abs(confidence[inside].sum() - correct[inside].sum())
    assert expected_calibration_error(confidence, correct) == pytest.approx(total / 500, abs=1e-12)
