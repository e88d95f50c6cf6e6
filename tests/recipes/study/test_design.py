"""A study's design: what is trained, chosen and looked at; what contradicts itself is an error."""

import pytest

from study.arguments import CompareArguments
from study.design import Choice, Run, Slice, make_study

GIVEN = {
    "arms": {
        "plain": {"objective": "plain"},
        "nullspace": {"objective": "nullspace"},
        "sweep, 0.1": {"objective": "nullspace", "epsilon": 0.1, "seeds": [7], "learning_rate_of": "nullspace"},
    },
    "control": "plain",
    "seeds": [7, 8, 9],
    "learning_rates": [1e-4, 1e-3],
    "conditions": ["clean", "{attack: FGSM, eps: 1/255, limit: 50}", "{corruption: [fog, snow], severity: [1, 5]}"],
    "average": ["clean", "FGSM", "cells"],
    "report": "0:300",
    "selection": "300:400",
    "selection_limit": 40,
    "limit": 100,
}


def study(**changed):
    return make_study(CompareArguments(**(GIVEN | changed)))


def test_what_is_trained_and_measured():
    ours = study()
    assert [str(run) for run in ours.selection_runs()] == [
        "plain, lr 0.0001, seed 7",
        "plain, lr 0.001, seed 7",
        "nullspace, lr 0.0001, seed 7",
        "nullspace, lr 0.001, seed 7",
    ]
    report = ours.report_runs({"plain": Choice(1e-3), "nullspace": Choice(1e-4)})
    assert report[0] == Run("before")
    assert [run.seed for run in report[1:]] == [7, 7, 7, 8, 8, 9, 9]
    assert report[3] == Run("sweep, 0.1", Choice(1e-4), 7)
    assert report[3].folder == "runs/sweep-0.1/lr-0.0001/seed-7"
    assert [planned.limit for planned in ours.plan] == [100, 50, 100, 100, 100, 100]
    assert {len(task.places) for task in ours.selection_measurements(report[1])} == {40}


def test_a_dear_condition_may_have_fewer_seeds():
    conditions = [*GIVEN["conditions"], "{attack: CW, limit: 20, seeds: [8]}"]
    ours = study(conditions=conditions)
    plans = {
        run: [task.planned.title for task in ours.measurements(run)]
        for run in ours.report_runs(dict.fromkeys(ours.arms, Choice(1e-3)))
    }
    for run, titles in plans.items():
        assert len(titles) == (7 if run.seed in (None, 8) else 6)
        assert any(title.startswith("CW") for title in titles) == (run.seed in (None, 8))


def test_the_average_weighs_its_entries_equally():
    weights = study().average
    assert weights["clean"] == weights["FGSM(eps=1/255)"] == pytest.approx(1 / 3)
    assert weights["generated fog 1"] == pytest.approx(1 / 12)
    assert sum(weights.values()) == pytest.approx(1)
    assert list(study().groups) == ["average", "clean", "FGSM(eps=1/255)", "mean of the cells"]


def test_the_best_learning_rate_is_chosen():
    low, high = Choice(1e-4), Choice(1e-3)
    averages = {"plain": {low: 50.0, high: 51.0}, "nullspace": {low: 50.0, high: 50.0}}
    assert study().chosen(averages, {}) == {"plain": high, "nullspace": low}
    assert study(learning_rates=[1e-4], selection=None).chosen({}, {}) == {"plain": low, "nullspace": low}


def test_an_alpha_is_chosen_among_those_that_keep_clean_accuracy():
    ours = study(learning_rates=[1e-3], alphas=[0.2, 0.5, 1.0], keep_clean=0.5)
    runs = ours.selection_runs()
    assert runs[0] == Run("before")
    assert [run.choice.alpha for run in runs[1:]] == 2 * [0.2, 0.5, 1.0]
    assert runs[2].folder == "runs/plain/lr-0.001/seed-7/alpha-0.5"
    assert runs[2].trained == runs[3]
    grid = dict(zip(ours.choices, (50.0, 51.0, 52.0), strict=True))
    lost = {"plain": dict(zip(ours.choices, (0.1, 0.5, 0.6), strict=True)),
            "nullspace": dict(zip(ours.choices, (2.0, 1.0, 1.5), strict=True))}  # fmt: skip
    chosen = ours.chosen({"plain": grid, "nullspace": grid}, lost)
    assert {arm: choice.alpha for arm, choice in chosen.items()} == {"plain": 0.5, "nullspace": 0.5}


def test_places_are_evenly_spaced_and_within_the_slice():
    places = Slice("report", 100, 200).places(11)
    assert places == (100, 110, 120, 130, 140, 150, 159, 169, 179, 189, 199)
    assert Slice("report", 5, 8).places(None) == Slice("report", 5, 8).places(99) == (5, 6, 7)
