"""Are these the owner's weights? Null patterns of a patch embedding as a fingerprint (section 6, "model patenting").

The owner draws patterns from the nullspace of the own model and shows images with and without them to a suspect, which
need not open its weights. A model with these weights answers the same. Others react, but less than to the same values
in another order, since all trained patch embeddings prefer smooth patches: five ViTs trained on CIFAR-10 score 0.27 to
0.61 on each other's fingerprint (20 pairs), below 0.001 on their own. So the rate at which other models pass is
measured on models that are known to be others. It is no proof against a thief who knows the method: noise in the null
directions of the weights hides a copy at no cost (docs/ownership.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_nullspace.linear.patch import NoNullspaceError, PatchNullspace
from hf_nullspace.noise.influence import noise_influence
from hf_nullspace.robustness.scores import Interval, wilson

PixelClassifier = Callable[[Tensor], Tensor]
"""Pixels (B, C, H, W) in [0, 1] to logits (B, K), for instance ``robustness.pixel_model.PixelModel``."""


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Patterns that one model cannot see, and controls: the same numbers at other places; changes of pixels."""

    patterns: Tensor
    """(count, C, H, W)."""
    controls: Tensor
    """(count, C, H, W); each has the values of its pattern, permuted."""
    amplitude: float
    """The largest absolute value of each of them, in (0, 0.5)."""


@dataclass(frozen=True)
class Ownership:
    """How invariant a suspect is to a fingerprint, beside models that are known to be others."""

    score: float
    """The suspect's (:func:`invariance_score`): near 0 for the owner's weights, of the order of 1 for others."""
    threshold: float
    claimed: bool
    """Whether the score is at most the threshold."""
    other_scores: tuple[float, ...]
    false_positives: int
    """How many of the other models have a score of at most the threshold."""
    false_positive_rate: Interval
    """Their share, with its Wilson interval."""


def fingerprint(
    nullspace: PatchNullspace, size: tuple[int, int], count: int, generator: torch.Generator, amplitude: float = 0.2
) -> Fingerprint:
    """``count`` random null patterns for images of ``size`` (H, W), another one in every patch (equation 4).

    ``nullspace`` is one of pixels (``PatchNullspace.in_pixels(std)``).

    Raises:
        NoNullspaceError: if there is no pattern that the model cannot see.
        ValueError: for an amplitude outside of (0, 0.5), or a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} patterns: expected at least 1")
    if not 0 < amplitude < 0.5:
        raise ValueError(f"amplitude={amplitude}: expected between 0 and 0.5, so that patterns fit into [0, 1]")
    if nullspace.dimension() == 0:
        theta = tuple(nullspace.weight.shape)
        raise NoNullspaceError(f"theta {theta} has full rank: the model sees every pattern, and has no fingerprint")
    normal = torch.randn(count, nullspace.patch_shape[0], *size, generator=generator, dtype=torch.float64)
    patterns = nullspace.project(normal)
    patterns = patterns * (amplitude / patterns.abs().amax((1, 2, 3), keepdim=True))
    orders = [torch.randperm(each.numel(), generator=generator) for each in patterns]
    controls = [each.flatten()[order].reshape(each.shape) for each, order in zip(patterns, orders, strict=True)]
    return Fingerprint(patterns.float(), torch.stack(controls).float(), amplitude)


@torch.no_grad()
def invariance_score(model: PixelClassifier, mark: Fingerprint, pixels: Tensor) -> float:
    """The median over the patterns of influence of the pattern / influence of its control, at least 0.

    The influence is ``noise_influence`` on ``pixels`` (B, C, H, W) in [0, 1], in 8 bits. Their contrast is reduced
    first, so that they stay in [0, 1] with a pattern.

    Raises:
        ValueError: if the model does not react to the controls either; if its answers are no numbers; without images.
    """
    if not len(pixels):
        raise ValueError("no images: expected at least one")
    base = _eight_bit(mark.amplitude + (1 - 2 * mark.amplitude) * pixels)
    clean = model(base)
    ratios = []
    for pattern, control in zip(mark.patterns, mark.controls, strict=True):
        seen, reference = (float(noise_influence(clean, model(_eight_bit(base + each)))) for each in (pattern, control))
        if not (math.isfinite(seen) and math.isfinite(reference)):
            raise ValueError("the model's logits are NaN or infinite; check its weights and the images")
        if reference < 1e-8:
            raise ValueError(
                f"the model's answer to a control of amplitude {mark.amplitude:g} shifts by {reference:.1e} only: it "
                "is invariant to everything. Take a larger amplitude or other images."
            )
        ratios.append(seen / reference)
    return float(torch.tensor(ratios, dtype=torch.float64).median())


def verify_owner(
    mark: Fingerprint,
    suspect: PixelClassifier,
    others: Sequence[PixelClassifier],
    pixels: Tensor,
    *,
    threshold: float = 0.1,
) -> Ownership:
    """Whether ``suspect`` is as invariant to a model's fingerprint as only its own weights make it.

    Args:
        others: models known not to have these weights, the more the better: they measure the false positive rate.
            Take some of the same architecture, trained on the same data.
        pixels: images (B, C, H, W) in [0, 1] of the size of the fingerprint.
        threshold: on :func:`invariance_score`, chosen before the suspect is looked at; a fine-tuned copy scores
            above 0.

    Raises:
        ValueError: without other models; for a threshold below 0; if a model cannot be judged; if images and
            fingerprint differ in size.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}: expected a number of at least 0, such as 0.1")
    if not others:
        raise ValueError("no other models: without them the false positive rate is not known; pass some in others=")
    if pixels.shape[1:] != mark.patterns.shape[1:]:
        shapes = f"images {tuple(pixels.shape[1:])} and a fingerprint for {tuple(mark.patterns.shape[1:])}"
        raise ValueError(f"{shapes}: expected the same channels, height and width")
    scores = tuple(invariance_score(other, mark, pixels) for other in others)
    score = invariance_score(suspect, mark, pixels)
    false_positives = sum(each <= threshold for each in scores)
    return Ownership(
        score=score,
        threshold=threshold,
        claimed=score <= threshold,
        other_scores=scores,
        false_positives=false_positives,
        false_positive_rate=wilson(false_positives, len(scores)),
    )


def _eight_bit(pixels: Tensor) -> Tensor:
    return (pixels.clamp(0, 1) * 255).round() / 255
