"""Robustness scores of an image classifier over several conditions; an `evaluate` module over hf_nullspace.

The mathematics is in hf_nullspace.robustness.scores; this file only names inputs and outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_nullspace.robustness.published import ALEXNET_CLEAN_ERROR, alexnet_reference
from hf_nullspace.robustness.scores import accuracy, expected_calibration_error, mean_corruption_error, worst_condition

_DESCRIPTION = """\
Accuracy with a 95% Wilson interval for each condition (clean, an attack, a corruption at a severity, a shifted set),
the worst condition, calibration, and ImageNet-C's mCE against a named reference. An average over a part of what it
needs is an error.
"""

_CITATION = """\
@inproceedings{hendrycks2019robustness,
  title={Benchmarking Neural Network Robustness to Common Corruptions and Perturbations},
  author={Dan Hendrycks and Thomas Dietterich},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted class of every image, an int.
    references: its label, an int.
    condition: name of the condition it was seen under, a str; a corruption is named "fog/3" (corruption/severity).
    probabilities: optional, (images, classes), for the expected calibration error; rows in the order of predictions.
    reference_errors: optional, asks for an mCE: "alexnet" (for ImageNet-C only), or a dict from every corruption to the
        reference's error in %: a number (mean over severities) or one for each severity; "clean" in it, and a condition
        "clean", give the relative mCE too.

Returns:
    accuracies, intervals, n: dicts by condition; accuracy: only if there is one condition; worst_condition,
    worst_accuracy; calibration_errors (by condition) if there are probabilities; mce, relative_mce (in %).

Examples:
    >>> module = evaluate.load(path_to_this_folder)
    >>> found = module.compute(
    ...     predictions=[0, 1, 1, 0], references=[0, 1, 0, 1], condition=["clean", "clean", "fog/1", "fog/1"],
    ...     reference_errors={"fog": 50.0})
    >>> found["accuracies"]
    {'clean': 1.0, 'fog/1': 0.0}
    >>> found["worst_condition"], found["mce"]
    ('fog/1', 200.0)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Robustness(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("int64"),
                    "references": datasets.Value("int64"),
                    "condition": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1903.12261"],
        )

    def _compute(
        self,
        predictions: Sequence[int],
        references: Sequence[int],
        condition: Sequence[str],
        probabilities: Any = None,
        reference_errors: Any = None,
    ) -> dict[str, Any]:
        names = np.asarray(condition)
        correct = np.asarray(predictions) == np.asarray(references)
        rows = {name: names == name for name in dict.fromkeys(condition)}
        scores = {name: accuracy(correct[row]) for name, row in rows.items()}
        found: dict[str, Any] = {
            "accuracies": {name: score.value for name, score in scores.items()},
            "intervals": {name: (score.low, score.high) for name, score in scores.items()},
            "n": {name: int(row.sum()) for name, row in rows.items()},
        }
        found["worst_condition"], found["worst_accuracy"] = worst_condition(found["accuracies"])
        if len(scores) == 1:
            found["accuracy"] = found["worst_accuracy"]
        if probabilities is not None:
            probabilities = np.asarray(probabilities, dtype=float)
            if probabilities.ndim != 2 or len(probabilities) != len(correct):
                raise ValueError(f"probabilities have shape {probabilities.shape}, expected ({len(correct)}, classes)")
            confidence = probabilities[np.arange(len(correct)), np.asarray(predictions)]
            found["calibration_errors"] = {
                name: expected_calibration_error(confidence[row], correct[row]) for name, row in rows.items()
            }
        if reference_errors is not None:
            found |= corruption_errors(found["accuracies"], reference_errors)
        return found


def corruption_errors(accuracies: Mapping[str, float], reference_errors: Any) -> dict[str, float]:
    """mCE, and relative mCE where the clean errors of both sides are known."""
    cells = {name: 100 * (1 - value) for name, value in accuracies.items() if "/" in name}
    errors: dict[str, list[float]] = {}
    for name in sorted(cells, key=lambda name: (name.split("/")[0], int(name.split("/")[1]))):
        errors.setdefault(name.split("/")[0], []).append(cells[name])
    if reference_errors == "alexnet":
        given: dict[str, Any] = alexnet_reference() | {"clean": ALEXNET_CLEAN_ERROR}
    elif isinstance(reference_errors, str):
        raise ValueError(f"unknown reference {reference_errors!r}; expected 'alexnet' or a dict of errors in %")
    else:
        given = dict(reference_errors)
    clean = given.pop("clean", None)
    reference = {
        corruption: [float(error)] * len(errors.get(corruption, [0])) if isinstance(error, int | float) else list(error)
        for corruption, error in given.items()
    }
    found = {"mce": mean_corruption_error(errors, reference)}
    if clean is not None and "clean" in accuracies:
        both = (100 * (1 - accuracies["clean"]), float(clean))
        found["relative_mce"] = mean_corruption_error(errors, reference, clean=both)
    return found
