"""Averages of the weights of several models: part of the way from a checkpoint to its fine-tuning, and model soups.

The models are copies of one network that were trained from the same weights; an average of others is no useful model.
"""

import copy
from collections.abc import Callable, Sequence
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_nullspace.data.label_maps import align_labels, names_of_classes
from hf_nullspace.models.loading import load_model

Source: TypeAlias = PreTrainedModel | str | Path
"""An image classifier, or the folder or Hub id of one, which is loaded when it is needed."""


class NotAveragedError(ValueError):
    """Weights that have no average; the message is one line that says why."""


class GreedySoup(NamedTuple):
    """What :func:`greedy_soup` found."""

    model: PreTrainedModel
    taken: tuple[int, ...]
    """The places of the models in it, in the order in which they were taken; of the best single one first."""
    score: float
    """Of the soup."""
    scores: tuple[float, ...]
    """Of each model alone."""


def interpolate(base: Source, tuned: Source, alpha: float) -> PreTrainedModel:
    """A model with the weights (1 - alpha) * base + alpha * tuned (WiSE-FT, Wortsman et al. 2022).

    ``alpha`` in [0, 1]: 0 gives the weights of ``base``, 1 those of ``tuned``, exactly. ``base`` is the checkpoint that
    the fine-tuning started from. The result has the class, the config, the dtypes and the device of ``tuned``.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, equation 1.

    Raises:
        ValueError: if alpha is outside of [0, 1].
        NotAveragedError: as :func:`soup`; one of the models has a new head, for example.
        ModelNotLoadedError: if there is no such model.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r}: expected a number in [0, 1], 0 for the base and 1 for the tuned weights")
    return soup([tuned, base], [alpha, 1 - alpha])


def soup(models: Sequence[Source], coefficients: Sequence[float] | None = None) -> PreTrainedModel:
    """A model with the weights sum_i coefficients[i] * models[i], equal coefficients if none are given (uniform soup).

    ``coefficients`` are at least 0 with the sum 1. Weights are added in float64 and have the dtypes of the first model;
    the result has its class, config and device. Integer buffers have to be equal. No model is changed.

    Wortsman et al., "Model soups", ICML 2022; with other coefficients Croce et al., "Seasoning model soups for
    robustness to adversarial and natural distribution shifts", CVPR 2023.

    Raises:
        ValueError: if there is no model, or the coefficients are not convex.
        NotAveragedError: if the models are of different classes, or differ in the names or shapes of their weights, in
            the classes of their heads, or in an integer buffer.
        ModelNotLoadedError: if a folder or a Hub id holds no such model.
    """
    weights = _convex(len(models), coefficients)
    first = _loaded(models[0])
    total = {name: _wide(value) * weights[0] for name, value in first.state_dict().items() if _averaged(value)}
    for place, (source, weight) in enumerate(zip(models[1:], weights[1:], strict=True), start=1):
        other = _loaded(source)
        check_same(first, other, f"{_called(source, place)} cannot be averaged with {_called(models[0], 0)}")
        for name, value in other.state_dict().items():
            if _averaged(value):
                total[name] += weight * _wide(value)
    result = copy.deepcopy(first)
    state = result.state_dict()
    result.load_state_dict({name: total[name].to(value) if name in total else value for name, value in state.items()})
    return result


def greedy_soup(models: Sequence[Source], score: Callable[[PreTrainedModel], float]) -> GreedySoup:
    """A uniform soup that takes in one model after the other, the best first, if it does not lower the score.

    ``score(model)`` is higher for better models, such as the accuracy on held-out images; it is called once for each
    model and once for each soup that is tried. Never use test images for it.

    Wortsman et al., "Model soups", ICML 2022, recipe 1.

    Raises:
        ValueError, NotAveragedError, ModelNotLoadedError: as :func:`soup`.
    """
    _convex(len(models), None)
    scores = [float(score(_loaded(source))) for source in models]
    order = sorted(range(len(models)), key=lambda place: -scores[place])
    taken, best, model = order[:1], scores[order[0]], soup([models[order[0]]])
    for place in order[1:]:
        candidate = soup([models[each] for each in (*taken, place)])
        if (reached := float(score(candidate))) >= best:
            taken, best, model = [*taken, place], reached, candidate
    return GreedySoup(model, tuple(taken), best, tuple(scores))


def _convex(count: int, coefficients: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise ValueError("no models: expected at least one to average")
    if coefficients is None:
        return [1 / count] * count
    given = [float(each) for each in coefficients]
    if len(given) != count:
        raise ValueError(f"{len(given)} coefficients for {count} models: expected one for each")
    if not all(each >= 0 for each in given) or not isclose(sum(given), 1, abs_tol=1e-6):
        raise ValueError(f"coefficients={given}: expected numbers of at least 0 with the sum 1")
    return given


def _loaded(source: Any) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        return source
    if isinstance(source, str | Path):
        return load_model(str(source))
    raise NotAveragedError(f"{type(source).__name__}: expected a transformers model, or the folder or Hub id of one")


def _wide(value: Tensor) -> Tensor:
    """On the CPU: the same bits whatever the models are on, and some devices have no float64."""
    return value.detach().cpu().double()


def _averaged(value: Tensor) -> bool:
    return value.is_floating_point()


def _called(source: Source, place: int) -> str:
    return f"model {place + 1}" if isinstance(source, PreTrainedModel) else repr(str(source))


def check_same(first: PreTrainedModel, other: PreTrainedModel, failed: str) -> None:
    """Raise NotAveragedError, beginning with ``failed``, if the two have no average; see :func:`soup`."""
    if type(other) is not type(first):
        raise NotAveragedError(f"{failed}: a {type(other).__name__} and a {type(first).__name__} differ in their parts")
    ours, theirs = first.state_dict(), other.state_dict()
    if different := sorted(ours.keys() ^ theirs.keys()):
        raise NotAveragedError(f"{failed}: only one of them has {different[0]}")
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            raise NotAveragedError(
                f"{failed}: {name} has the shapes {tuple(theirs[name].shape)} and {tuple(value.shape)}; a new head, or "
                "another size, has no weights to average with"
            )
        if not _averaged(value) and not torch.equal(value, theirs[name].to(value.device)):
            raise NotAveragedError(f"{failed}: {name} counts in whole numbers, has no average, and is not the same")
    aligned = align_labels(names_of_classes(other.config), first.config)
    if names_of_classes(first.config) is not None and (aligned.new_head or aligned.remap is not None):
        raise NotAveragedError(f"{failed}: their heads are for other classes, or for the same in another order")
