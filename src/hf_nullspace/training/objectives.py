"""What the second view of a training batch is. The trainer asks the objective; adding one needs no edit of the trainer.

Every objective trains on two views of each batch in one forward pass, CE(z, y) + CE(z', y) (Algorithm 1, line 19), so
that runs with different objectives cost the same and differ in nothing but the second view.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_nullspace.noise.artifact import NullspaceNoise


class Objective(Protocol):
    """Chooses the noise that the second view of each batch gets during a round."""

    def round_noise(self, learn: Callable[[], NullspaceNoise]) -> NullspaceNoise | None:
        """The noise of a round that begins; ``learn()`` learns one. ``None``: the second view is the first."""


class Nullspace:
    """The paper's method: each round, a noise that the present model cannot see."""

    def round_noise(self, learn: Callable[[], NullspaceNoise]) -> NullspaceNoise | None:
        return learn()


class Plain:
    """The control that the paper lacks: the same batches, steps and learning rate, two identical views, no noise."""

    def round_noise(self, learn: Callable[[], NullspaceNoise]) -> NullspaceNoise | None:
        return None


_OBJECTIVES: dict[str, Callable[[], Objective]] = {"nullspace": Nullspace, "plain": Plain}


def make_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective={name!r}: expected one of {', '.join(map(repr, _OBJECTIVES))}")
    return _OBJECTIVES[name]()


def two_views(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the model for [x; x]: everything that has one entry per image twice, without the labels."""
    count = len(inputs["labels"])
    return {
        name: torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == count else value
        for name, value in inputs.items()
        if name != "labels"
    }


def view_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of one view in at least float32: the sum over its images / ``count``, or their mean if ``None``."""
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    reduction = "mean" if count is None else "sum"
    loss = cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    return loss if count is None else loss / count


def check_labels(labels: Tensor, classes: int | None) -> None:
    """Raise a ValueError if a label is none of the model's classes; -100 (ignored by the loss) is allowed.

    On a GPU such a label is an assertion in a kernel that names nothing and ends the process.
    """
    wrong = (labels < 0) & (labels != -100)
    if classes is not None:
        wrong |= labels >= classes
    if labels.is_floating_point() or labels.dim() != 1 or wrong.any():
        shown = f"{labels.dtype} of shape {tuple(labels.shape)}" if not wrong.any() else str(labels[wrong].tolist()[:5])
        raise ValueError(
            f"labels {shown}: expected one whole number per image, in [0, {classes or 'number of classes'}) as the "
            "model's head has it; map the labels of the data to the model's, or give the model a new head (and pass "
            "compute_loss_func for soft labels)"
        )


def check_head(config: Any) -> None:
    """Raise a ValueError if the model's config says that its head is for something else than one label per image."""
    problem, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    if problem in ("multi_label_classification", "regression") or labels == 1:
        kind = "regression" if labels == 1 or problem == "regression" else "multi-label classification"
        raise ValueError(
            f"the model's head is for {kind}; nullspace fine-tuning compares class probabilities and trains with "
            "cross-entropy, which need one label per image out of at least two"
        )
