"""The `evaluate` module: loads offline, gives the numbers of scores.py, works on two processes (test_two_processes)."""

import doctest
import runpy
from importlib.resources import files
from pathlib import Path

import evaluate
import numpy as np
import pytest

from hf_nullspace.robustness import published, scores

FOLDER = Path(str(files("hf_nullspace") / "metrics" / "robustness"))


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path))


def test_the_numbers_are_those_of_scores(module):
    rng = np.random.default_rng(0)
    conditions = ["clean", *(f"{c}/{s}" for c in published.ALEXNET_ERRORS for s in range(1, 6))]
    references = rng.integers(0, 5, (len(conditions), 30))
    predictions = np.where(rng.random(references.shape) < 0.6, references, (references + 1) % 5)
    probabilities = rng.dirichlet(np.ones(5), references.size)
    found = module.compute(
        predictions=predictions.ravel(),
        references=references.ravel(),
        condition=np.repeat(conditions, 30),
        probabilities=probabilities,
        reference_errors="alexnet",
    )
    correct = predictions == references
    assert found["accuracies"] == {c: row.mean() for c, row in zip(conditions, correct, strict=True)}
    interval = scores.accuracy(correct[7])
    assert found["intervals"][conditions[7]] == (interval.low, interval.high)
    assert set(found["n"].values()) == {30}
    worst = int(correct.sum(1).argmin())
    assert (found["worst_condition"], found["worst_accuracy"]) == (conditions[worst], correct[worst].mean())
    assert "accuracy" not in found
    errors = 100 * (1 - correct[1:].reshape(15, 5, 30).mean(2))
    alexnet = np.array(list(published.ALEXNET_ERRORS.values()))
    assert found["mce"] == pytest.approx(np.mean(100 * errors.sum(1) / (5 * alexnet)))
    clean = 100 * (1 - correct[0].mean())
    relative = (errors - clean).sum(1) / (5 * (alexnet - published.ALEXNET_CLEAN_ERROR))
    assert found["relative_mce"] == pytest.approx(100 * relative.mean())
    confidence = probabilities[np.arange(references.size), predictions.ravel()].reshape(correct.shape)
    expected = scores.expected_calibration_error(confidence[3], correct[3])
    assert found["calibration_errors"][conditions[3]] == pytest.approx(expected)


def test_an_mce_is_asked_for(module):
    rows = {"predictions": [0, 1], "references": [0, 0], "condition": ["fog/1", "snow/1"]}
    assert "mce" not in module.compute(**rows)
    assert module.compute(**rows, reference_errors={"fog": [50.0], "snow": [80]})["mce"] == pytest.approx((0 + 125) / 2)


FOG = [f"fog/{severity}" for severity in range(1, 6)]
ALL_CELLS = [f"{corruption}/{severity}" for corruption in published.ALEXNET_ERRORS for severity in range(1, 6)]


def rows(conditions):
    """One image for each condition, right under "clean" alone."""
    right = [int(name == "clean") for name in conditions]
    return {"predictions": right, "references": [1] * len(right), "condition": conditions}


@pytest.mark.parametrize(
    ("conditions", "reference"),
    [
        (["FGSM(eps=1/255)", *FOG], {"fog": 50.0}),
        (["imagenet-a", "generated fog 3", "lab/set", *FOG], {"fog": 50.0}),
        ([f"imagenet-c/{name}" for name in FOG], {"fog": 50.0}),
        (FOG, {"fog": np.float32(50)}),
        (FOG, {"fog": np.array(50.0)}),
        (FOG, {"fog": np.full(5, 50.0)}),
        (["fog/3"], {"fog": [np.float64(50)]}),
    ],
)
def test_the_cells_are_found_among_other_conditions(module, conditions, reference):
    assert module.compute(**rows(conditions), reference_errors=reference)["mce"] == pytest.approx(200)


def test_alexnets_errors_have_a_name(module):
    cells = rows([f"imagenet-c/{cell}" for cell in ALL_CELLS])
    by_name = module.compute(**cells, reference_errors="alexnet")
    assert by_name == module.compute(**cells, reference_errors=published.ALEXNET_ERRORS)


def test_a_class_that_is_no_whole_number_is_not_cut(module):
    with pytest.raises(ValueError, match="predictions hold"):
        module.add(prediction=0.7, reference=1, condition="clean")


def test_its_own_cases(module):
    for case in runpy.run_path(str(FOLDER / "tests.py"))["test_cases"]:
        result = case.pop("result")
        found = module.compute(**case)
        assert {key: found[key] for key in result} == result


def test_the_doctest_runs(module):
    text = module.inputs_description
    names = {"evaluate": evaluate, "path_to_this_folder": str(FOLDER)}
    examples = doctest.DocTestParser().get_doctest(text, names, "robustness", None, 0)
    assert len(examples.examples) == 4
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0
