"""What the figures compute from their points, against numbers that are worked out by hand or by NumPy."""

import numpy as np
import pytest
import torch

from figures import figure_2, figure_3, figure_4, table_5
from hf_nullspace.noise.closure import Combinations, Scaling
from hf_nullspace.robustness.attacks.gradient import FGSM
from hf_nullspace.robustness.suite import Attacked, Clean, ConditionResult, Corrupted


def test_closure_of_a_known_surface():
    factors = (0.0, 0.5, 1.0)
    influence = torch.tensor([[0.0, 0.01, 0.04], [0.0, 0.03, 0.05]], dtype=torch.float64)
    grid = torch.tensor([[[0.04 * (a + b) ** 2 for b in factors] for a in factors]], dtype=torch.float64)
    found = figure_4.summary(Scaling(factors, influence, 7), Combinations(factors, factors, grid, 7))
    assert found["influence"] == pytest.approx({"mean": 0.045, "low": 0.04, "high": 0.05})
    assert found["contour"] == 0.04
    assert found["scaling"]["share_below_proportion"] == 0.5  # 0.01 <= 0.02, but 0.03 > 0.025
    assert found["scaling"]["largest_share_of_proportion"] == pytest.approx(0.02 / 0.0225)
    combined = found["combinations"]
    assert combined["convex"] == [(0.0, 1.0, 0.04), (0.5, 0.5, 0.04), (1.0, 0.0, 0.04)]
    assert combined["largest_inside"] == pytest.approx(0.04)
    assert combined["share_inside_contour"] == 1.0
    given = figure_4.summary(Scaling(factors, influence, 7), Combinations(factors, factors, grid, 7), 0.035)
    assert given["combinations"]["share_inside_contour"] == 0.0
    assert figure_4.summary(Scaling(factors, influence, 7), None)["combinations"] is None


def test_pairs_are_different_and_drawn_from_the_seed():
    pairs = figure_4.pairs_of(20, 10, seed=3)
    assert len(set(pairs)) == 10
    assert all(one < two < 20 for one, two in pairs)
    assert pairs == figure_4.pairs_of(20, 10, seed=3) != figure_4.pairs_of(20, 10, seed=4)
    assert figure_4.pairs_of(3, 10, seed=0) == [(0, 1), (0, 2), (1, 2)]
    assert figure_4.pairs_of(1, 10, seed=0) == []


def sweep_point(weight, seed, match):
    measured = {"norm": 2.0 + seed, "centred_norm": 1.0 + seed, "influence": 0.1 * weight, "match": match}
    return {"lambda": weight, "seed": seed, "learned": measured, "permuted": measured | {"match": match / 2}}


def test_curves_are_means_with_their_spread():
    rows = figure_2.curves([sweep_point(3.0, 0, 0.8), sweep_point(1.0, 0, 1.0), sweep_point(3.0, 1, 0.6)])
    assert [row["lambda"] for row in rows] == [1.0, 3.0]
    assert rows[1]["learned"]["match"] == pytest.approx({"mean": 0.7, "low": 0.6, "high": 0.8})
    assert rows[1]["permuted"]["match"]["mean"] == pytest.approx(0.35)
    text = figure_2.table(rows)
    assert "| 3 | 2.5 [2.0, 3.0] | 1.5 [1.0, 2.0] | 70.0 [60.0, 80.0] |" in text
    assert text.splitlines()[2].startswith("| 1 | 2.0 | 1.0 | 100.0 | 50.0 |")


CONDITIONS = [Clean(), Attacked(FGSM(1 / 255)), Corrupted("contrast", 3), Corrupted("contrast", 5)]


def checkpoint(step, correct, norms=()):
    """A point whose conditions have that many of ten images right, the first ones."""
    results = [ConditionResult(str(c), np.arange(10) < n, 0.0, 0) for c, n in zip(CONDITIONS, correct, strict=True)]
    return figure_3.summary(step, results, CONDITIONS, [{"norm": 2 * n, "centred_norm": n} for n in norms])


def test_groups_are_means_over_their_conditions_and_relative_to_the_start():
    start, end = checkpoint(0, (10, 5, 4, 2), norms=(20.0,)), checkpoint(40, (9, 6, 5, 4), norms=(25.0,))
    assert start["groups"] == pytest.approx({"clean": 1.0, "adversarial": 0.5, "corruption": 0.3, "average": 0.6})
    other = [checkpoint(0, (10, 5, 4, 2), norms=(30.0,)), checkpoint(40, (9, 4, 5, 4), norms=(30.0,))]
    rows = figure_3.relative([[start, end], other])
    assert set(rows[0]["relative"].values()) == {1.0}
    assert rows[1]["relative"] == pytest.approx(
        {"clean": 0.9, "adversarial": 1.0, "corruption": 1.5, "average": (0.9 + 0.5 + 0.45) / 1.8,
         "norm": 1.1, "centred_norm": 1.1}
    )  # fmt: skip
    assert rows[1]["value"]["centred_norm"] == pytest.approx(27.5)


def test_a_group_that_starts_at_zero_has_no_relative_value():
    rows = figure_3.relative([[checkpoint(0, (10, 0, 4, 2)), checkpoint(40, (10, 1, 4, 2))]])
    assert "adversarial" not in rows[1]["relative"]
    assert "adversarial" not in figure_3.progress_lines({"nullspace": rows, "plain": rows})


def test_differences_are_paired_and_in_points():
    before, after = [[checkpoint(40, (5, 5, 5, 5))]], [[checkpoint(40, (7, 4, 5, 6))]]
    last = figure_3.differences(before, after)
    assert {group: round(d["value"], 6) for group, d in last.items()} == {
        "clean": 20.0,
        "adversarial": -10.0,
        "corruption": 5.0,
    }
    assert last["clean"]["low"] < 20 < last["clean"]["high"]
    assert figure_3.differences(before, before)["clean"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "clean +20.00" in figure_3.differences_line(last)


def test_the_noise_of_another_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="learned at step 40, the model is of step 20"):
        table_5.table_5_row(None, 20, {"round": 1, "step": 40}, tmp_path)
