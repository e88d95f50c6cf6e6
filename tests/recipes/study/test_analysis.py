"""Averages, intervals and power of a study against NumPy loops, the scores of single conditions and closed forms."""

import json

import numpy as np
import pytest
from scipy.stats import norm

from hf_nullspace.robustness.records import bits, from_bits
from hf_nullspace.robustness.scores import paired_mean_difference
from study.analysis import Results, differences, power, smallest, table
from study.report import complete, difference_scale, markdown, write_study

LIMITS = {"clean": 400, "FGSM": 100, "fog": 100}
WEIGHTS = {"clean": 0.5, "FGSM": 0.25, "fog": 0.25}


def content(limits=LIMITS, seed=0):
    """Three arms; ``better`` gets two points more of each condition, with two seeds."""
    rng = np.random.default_rng(seed)
    runs = []
    cost = {"forward_equivalents": 10, "seconds": 1.0,
            "stages": {stage: {"forward_equivalents": 5} for stage in ("training", "attack", "noise")}}  # fmt: skip
    hard = {title: rng.random(count or 400) for title, count in limits.items()}
    for arm, seeds, share in (("before", [None], 0.5), ("plain", [0, 1, 2], 0.5), ("better", [0, 1], 0.6)):
        for own in seeds:
            correct = {t: hard[t] + 0.1 * rng.standard_normal(len(hard[t])) < share for t in limits}
            run = {"arm": arm, "learning_rate": None if own is None else 1e-3, "seed": own}
            run["cost"] = None if own is None else cost
            runs.append(run | {"correct_bits": {t: bits(values) for t, values in correct.items()}})
    study = {"report": {"name": "report", "first": 0, "stop": 400}, "conditions": limits, "control": "plain",
             "groups": {"average": WEIGHTS, "clean": {"clean": 1.0}}}  # fmt: skip
    return {"study": study, "runs": runs, "power": None}


def change(ours, reference="plain", weights=WEIGHTS, resamples=200):
    """[difference, low, high] of better to ``reference``."""
    pair = ("better", reference)
    return differences(Results(ours), {"group": weights}, [pair], resamples=resamples)[pair]["group"]


def raw(ours, arm, seed):
    """Condition -> one bool per image."""
    run = next(run for run in ours["runs"] if (run["arm"], run["seed"]) == (arm, seed))
    return {t: from_bits(found, ours["study"]["conditions"][t]) for t, found in run["correct_bits"].items()}


def test_means_and_spreads_by_hand():
    ours = content()
    for arm, seeds in (("plain", (0, 1, 2)), ("better", (0, 1))):
        entry = table(Results(ours), {"average": WEIGHTS})[arm]["average"]
        by_hand = [100 * sum(w * raw(ours, arm, seed)[t].mean() for t, w in WEIGHTS.items()) for seed in seeds]
        assert entry["seeds"] == pytest.approx(by_hand, abs=1e-4)
        assert entry["mean"] == pytest.approx(np.mean(by_hand), abs=1e-4)
        assert entry["spread"] == pytest.approx(np.std(by_hand, ddof=1), abs=1e-4)


def test_differences_are_paired_by_seed():
    """better has the seeds 0 and 1, so the control's third seed plays no part."""
    ours = content()
    by_hand = [raw(ours, "better", s)["clean"].mean() - raw(ours, "plain", s)["clean"].mean() for s in (0, 1)]
    assert change(ours, weights={"clean": 1.0})[0] == pytest.approx(100 * np.mean(by_hand), abs=1e-3)


def test_a_condition_of_one_seed_is_compared_on_that_seed():
    ours = content()
    for run in ours["runs"]:
        if run["seed"] in (1, 2):
            del run["correct_bits"]["fog"]
    results = Results(ours)
    entry = table(results, {"fog": {"fog": 1.0}, "clean": {"clean": 1.0}})["plain"]
    assert entry["fog"]["seeds"] == [pytest.approx(100 * raw(ours, "plain", 0)["fog"].mean(), abs=1e-4)]
    assert entry["fog"]["spread"] is None
    assert len(entry["clean"]["seeds"]) == 3
    for reference, seed in (("plain", 0), ("before", None)):
        by_hand = raw(ours, "better", 0)["fog"].mean() - raw(ours, reference, seed)["fog"].mean()
        assert change(ours, reference, {"fog": 1.0})[0] == pytest.approx(100 * by_hand, abs=1e-3)


def test_an_arm_without_the_seeds_of_a_condition_has_no_entry_there():
    """A condition of seed 0 alone, and an arm of seed 1 alone."""
    ours = content()
    ours["runs"] = [run for run in ours["runs"] if run["arm"] != "better" or run["seed"] == 1]
    for run in ours["runs"]:
        if run["seed"] in (1, 2):
            del run["correct_bits"]["fog"]
    ours["study"]["groups"] = {"average": {"clean": 0.5, "FGSM": 0.5}, "fog": {"fog": 1.0}}
    whole = complete(ours, resamples=200)
    assert set(whole["table"]["better"]) == {"average"}
    assert set(whole["differences"]["better"]) == {"average", "clean", "FGSM"}
    assert set(whole["differences"]["before"]) == {"average", "fog", *LIMITS}
    text = markdown(whole)
    assert "nan" not in text
    assert f"| better | 1 | {whole['table']['better']['average']['mean']:.2f} |  |" in text


def test_every_two_arms_are_compared_as_each_is_to_the_control(tmp_path):
    ours = content()
    whole = complete(ours, resamples=300)
    between = whole["between_arms"]
    assert {arm: entry["plain"] for arm, entry in between.items() if arm != "plain"} == {
        arm: entry["average"] for arm, entry in whole["differences"].items()
    }
    value, low, high = between["better"]["before"]
    assert between["before"]["better"] == pytest.approx([-value, -high, -low], abs=1e-3)
    assert "better" not in between["better"]
    for run in ours["runs"]:
        if run["arm"] == "better":
            run["seed"] += 5  # none in common with the control
    whole = complete(ours, resamples=200)
    assert set(whole["between_arms"]["better"]) == {"before"}
    assert whole["differences"]["better"] == {}
    write_study(whole, tmp_path)


def test_a_difference_far_off_does_not_flatten_the_others():
    assert difference_scale([0.3, 0.4, 0.2, 14.0]) == "symlog"
    assert difference_scale([0.3, 0.4, 2.9]) == difference_scale([5.0]) == difference_scale([]) == "linear"


@pytest.mark.parametrize("weights", [{"clean": 1.0}, WEIGHTS])
def test_images_are_resampled_jointly_as_the_scores_do_it(weights):
    """Conditions that share their images, as a study's cells do: against the scores' own bootstrap."""
    ours = content(dict.fromkeys(LIMITS, 400), seed=5)
    for run in ours["runs"]:  # the same images are hard under both
        run["correct_bits"]["fog"] = run["correct_bits"]["FGSM"]
    ours["runs"] = [run for run in ours["runs"] if run["seed"] == 0]
    value, low, high = change(ours, weights=weights, resamples=20_000)
    before, after = ([raw(ours, arm, 0)[title] for title in weights] for arm in ("plain", "better"))
    theirs = paired_mean_difference(before, after, weights=list(weights.values()), resamples=20_000)
    assert value == pytest.approx(100 * theirs.value, abs=1e-3)
    assert [low, high] == pytest.approx([100 * theirs.low, 100 * theirs.high], abs=0.3)


def test_conditions_on_fewer_images_against_a_loop():
    ours = content()
    value, low, high = change(ours, resamples=4000)
    by_image = {
        t: np.mean([raw(ours, "better", s)[t] * 1.0 - raw(ours, "plain", s)[t] for s in (0, 1)], 0) for t in LIMITS
    }
    places = {t: np.unique(np.linspace(0, 399, count).round().astype(int)) for t, count in LIMITS.items()}
    rng, drawn = np.random.default_rng(11), []
    for _ in range(4000):
        chosen = np.bincount(rng.integers(400, size=400), minlength=400)
        drawn.append(sum(w * np.average(by_image[t], weights=chosen[places[t]]) for t, w in WEIGHTS.items()))
    assert value == pytest.approx(100 * sum(w * by_image[t].mean() for t, w in WEIGHTS.items()), abs=1e-3)
    assert [low, high] == pytest.approx(100 * np.quantile(drawn, [0.025, 0.975]), abs=0.4)


def test_a_condition_on_two_images_has_an_interval():
    """Some draws have neither of them; their interval is over the others."""
    ours = content({"clean": 400, "FGSM": 100, "fog": 2})
    for weights in ({"fog": 1.0}, WEIGHTS):
        value, low, high = change(ours, weights=weights, resamples=300)
        assert low <= value <= high
        assert -100 <= low <= high <= 100


def test_everything_is_computed_again_from_the_content():
    ours = content()
    whole = complete(ours, resamples=300)
    again = complete({key: value for key, value in whole.items() if key not in ("table", "differences")}, resamples=300)
    assert again == whole
    assert set(whole["differences"]["better"]) == {"average", *LIMITS}
    assert whole["against_before"]["plain"]["average"][1] <= whole["against_before"]["plain"]["average"][2]
    text = markdown(whole)
    assert "| better | 2 |" in text
    assert f"{whole['differences']['better']['average'][0]:+.2f} [" in text
    spoilt = markdown(json.loads(json.dumps(whole).replace('"better"', '"<b> | x"')))
    assert spoilt == text.replace("| better |", "| &lt;b> \\| x |"), "a name is text"


def test_power_in_closed_form():
    assert smallest(0.1, 2000) == pytest.approx(100 * 1.96 * (0.1 / 2000) ** 0.5, abs=1e-4)
    rng = np.random.default_rng(0)
    control = {t: rng.random(5000) < 0.7 for t in WEIGHTS}
    other = {t: control[t] ^ (rng.random(5000) < 0.08) for t in WEIGHTS}
    found = power(control, {"other": other}, WEIGHTS, {"clean": 8000, "FGSM": 2000, "fog": 2000})
    assert found["conditions"]["clean"]["discordance"] == pytest.approx(0.08, abs=0.01)
    assert found["conditions"]["clean"]["smallest"] == pytest.approx(100 * 1.96 * (0.08 / 8000) ** 0.5, rel=0.1)
    # Independent conditions: the variance of the mean is the weighted sum of theirs.
    variance = sum(w**2 for w in WEIGHTS.values()) * 0.08
    assert found["average"]["spread_per_image"] == pytest.approx(variance**0.5, rel=0.05)
    assert found["average"]["smallest"] == pytest.approx(100 * 1.96 * (variance / 2000) ** 0.5, rel=0.05)
    spread = found["average"]["spread_per_image"]  # rounded to 1e-5 of about 0.17, z to 1.96: 1e-4 in all
    powerful = 100 * (norm.ppf(0.975) + norm.ppf(0.8)) * spread / 2000**0.5
    assert found["average"]["smallest_with_80_percent_power"] == pytest.approx(powerful, rel=1e-4)
    assert found["average"]["smallest"] == pytest.approx(100 * norm.ppf(0.975) * spread / 2000**0.5, rel=1e-4)
    assert (found["selection_images"], found["report_images"], found["seeds"]) == (5000, 2000, 1)
    with pytest.raises(ValueError, match="no other arm"):
        power(control, {}, WEIGHTS, {})
    with pytest.raises(ValueError, match="different numbers"):
        power(control, {"other": {t: v[:10] for t, v in other.items()}}, WEIGHTS, dict.fromkeys(WEIGHTS, 1))
