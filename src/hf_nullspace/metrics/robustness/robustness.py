"""Robustness scores of an image classifier over several conditions; an `evaluate` module over hf_nullspace.

The mathematics is in hf_nullspace.robustness.scores; this file only names inputs and outputs.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_nullspace.robustness.published import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS
from hf_nullspace.robustness.scores import accuracy, expected_calibration_error, mean_corruption_error, worst_condition

SEVERITIES = [1, 2, 3, 4, 5]  # of ImageNet-C
_CELL = re.compile(r"(?:(?P<set>[\w.-]+(?:/[\w.-]+)*)/)?(?P<corruption>\w+)/(?P<severity>\d+)")

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
    condition: name of the condition it was seen under, a str; a corruption is named "fog/3" (corruption/severity), or
        "imagenet-c/fog/3" with its set.
    probabilities: optional, (images, classes), for the expected calibration error; rows in the order of predictions.
    reference_errors: optional, asks for an mCE: "alexnet" (for ImageNet-C only), or a dict from every corruption to the
        reference's error in %: a number for each severity that was measured, or one number, which is the mean over the
        severities 1 to 5; "clean" in it, and a condition "clean", give the relative mCE too.

Returns:
    accuracies, intervals, n: dicts by condition; accuracy: only if there is one condition; worst_condition,
    worst_accuracy; calibration_errors (by condition) if there are probabilities; mce, relative_mce (in %).

Examples:
    >>> module = evaluate.load(path_to_this_folder)
    >>> found = module.compute(
    ...     predictions=[0, 1, 1, 0], references=[0, 1, 0, 1], condition=["clean", "clean", "fog/1", "fog/1"],
    ...     reference_errors={"fog": [50.0]})
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

    def add_batch(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> None:
        """As any module's; a class that is no whole number raises ``ValueError``. Arguments:"""
        check_whole(predictions=predictions, references=references)
        super().add_batch(predictions=predictions, references=references, **columns)

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """As any module's; a class that is no whole number raises ``ValueError``. Arguments:"""
        check_whole(predictions=prediction, references=reference)
        super().add(prediction=prediction, reference=reference, **columns)

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
            chosen, classes = np.asarray(predictions), probabilities.shape[1]
            if len(out_of_range := chosen[(chosen < 0) | (chosen >= classes)]):
                raise ValueError(
                    f"a predicted class of {out_of_range[0]}, but probabilities of {classes} classes from 0"
                )
            confidence = probabilities[np.arange(len(correct)), chosen]
            found["calibration_errors"] = {
                name: expected_calibration_error(confidence[row], correct[row]) for name, row in rows.items()
            }
        if reference_errors is not None:
            found |= corruption_errors(found["accuracies"], reference_errors)
        return found


def check_whole(**columns: Any) -> None:
    """Raise ``ValueError`` for classes that are no whole numbers: `datasets` would cut off what is behind the point."""
    for name, column in columns.items():
        values = np.asarray(column.tolist() if hasattr(column, "tolist") else column)
        if values.dtype.kind == "f" and len(broken := values[values != np.trunc(values)].ravel()):
            raise ValueError(f"{name} hold {broken[0]:g}; expected classes as whole numbers, such as logits.argmax(-1)")


def corruption_errors(accuracies: Mapping[str, float], reference_errors: Any) -> dict[str, float]:
    """mCE, and relative mCE where the clean errors of both sides are known."""
    cells: dict[str, dict[int, str]] = {}  # corruption -> severity -> condition
    for name in accuracies:
        if match := _CELL.fullmatch(name):
            other = cells.setdefault(match["corruption"], {}).setdefault(int(match["severity"]), name)
            if other != name:
                raise ValueError(f"{other} and {name} are the same cell; an mCE is over one set")
            if reference_errors == "alexnet" and match["set"] not in (None, "imagenet-c"):
                raise ValueError(f"AlexNet's errors are a reference for ImageNet-C only, got {name}; give a dict")
    if isinstance(reference_errors, Mapping):
        given = dict(reference_errors)
    elif reference_errors == "alexnet":
        given = ALEXNET_ERRORS | {"clean": ALEXNET_CLEAN_ERROR}
    else:
        raise ValueError(f"unknown reference {reference_errors!r}; expected 'alexnet' or a dict of errors in %")
    given = {corruption: _errors(corruption, value) for corruption, value in given.items()}
    clean = given.pop("clean", None)
    errors = {c: [100 * (1 - accuracies[names[severity]]) for severity in sorted(names)] for c, names in cells.items()}
    same = set(cells) == set(given)  # mean_corruption_error names what differs
    reference = {c: _per_severity(c, sorted(cells[c]), value) if same else [] for c, value in given.items()}
    found = {"mce": mean_corruption_error(errors, reference)}
    if clean is not None and "clean" in accuracies:
        both = (100 * (1 - accuracies["clean"]), float(clean))
        found["relative_mce"] = mean_corruption_error(errors, reference, clean=both)
    return found


def _errors(name: str, value: Any) -> np.ndarray:
    """Errors in %; of no dimension for one number."""
    try:
        errors = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        errors = np.array(np.nan)
    if errors.ndim > (name != "clean") or not ((errors >= 0) & (errors <= 100)).all():
        raise ValueError(f"the reference of {name} is {value!r}; expected errors in %, from 0 to 100")
    return errors


def _per_severity(corruption: str, severities: list[int], errors: np.ndarray) -> list[float]:
    measured = f"{corruption} was measured at severity {', '.join(map(str, severities))}"
    if not errors.ndim and severities != SEVERITIES:
        raise ValueError(f"{measured}; one number is a mean over 1 to 5: give a list, one for each severity")
    if errors.ndim and len(errors) != len(severities):
        raise ValueError(f"{measured}; its reference has {len(errors)} values, expected one for each severity")
    return np.broadcast_to(errors, len(severities)).tolist()
