"""Losses of views: cross-entropy, the divergence between two views, means over the images that are labelled."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers.modeling_outputs import ImageClassifierOutput

DIVERGENCES = ("kl", "js")
"""Choices of :func:`divergence`."""


def view_loss(
    logits: Tensor,
    labels: Tensor,
    count: Tensor | int | None,
    label_smoothing: float = 0.0,
    loss_func: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of one view in at least float32: the sum over its images / ``count``, or their mean if ``None``.

    Labels are classes (B,) or their probabilities (B, K): -sum_k y_k log p_k. ``count`` is that of :func:`images_of`.
    ``loss_func`` is a user's ``compute_loss_func``, used instead of cross-entropy, and told the same labels and count.
    """
    count = images_of(count, labels)
    if loss_func is not None:
        return loss_func(ImageClassifierOutput(logits=logits), labels, num_items_in_batch=count)
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
    reduction = "mean" if count is None else "sum"
    loss = cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    return loss if count is None else loss / count


def mean_over_images(values: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """The mean of one number per image (B,), without those labelled -100: the sum / ``count``, or / their number."""
    counted = labels != -100 if labels.dim() == 1 else labels.new_ones(len(labels), dtype=torch.bool)
    total = values.masked_fill(~counted, 0).sum()
    return total / (counted.sum() if count is None else images_of(count, labels))


def images_of(count: Tensor | int | None, labels: Tensor) -> Any:
    """The images in the Trainer's ``num_items_in_batch``: it counts an image K times whose label is K probabilities."""
    return count / labels.shape[1] if count is not None and labels.is_floating_point() and labels.dim() == 2 else count


def divergence(clean: Tensor, other: Tensor, kind: str = "kl") -> Tensor:
    """How far the predictions p and p' of two views are apart: logits (B, K) each -> one number >= 0 per image (B,).

    "kl" is KL(p || p') (TRADES, Zhang et al. 2019); "js", at most log 2, the Jensen-Shannon divergence
    (KL(p || m) + KL(p' || m)) / 2 with m = (p + p') / 2 (AugMix, Hendrycks et al. 2020). In at least float32; neither
    side is detached.
    """
    dtype = torch.promote_types(torch.float32, clean.dtype)
    p, q = log_softmax(clean.to(dtype), -1), log_softmax(other.to(dtype), -1)
    if kind == "kl":
        return _kl(p, q)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)
