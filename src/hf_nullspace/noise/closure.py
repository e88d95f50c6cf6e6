"""Is the approximate nullspace nearly linear? Scaling and linear combinations of learned noises (A.5, figure 4).

The paper finds that alpha * v, for alpha < 1, has an influence below alpha * epsilon, and that convex combinations of
two epsilon-noises are epsilon-noises (it draws the contour at 0.035, the influence that its noises really have).
Influences are over all given images, with the clean logits computed once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.probe import probing

GRID = tuple(step / 10 for step in range(11))  # A.5: [0, 1] in steps of 0.1


@dataclass(frozen=True, eq=False)
class Scaling:
    """The influence of every noise times every factor."""

    factors: tuple[float, ...]
    influence: Tensor
    """(noises, factors), float64, in [0, 2]."""
    images: int

    @property
    def mean(self) -> Tensor:
        """(factors,): the curve of figure 4, averaged over the noises."""
        return self.influence.mean(0)

    def share_below_proportion(self) -> float:
        """Share of (noise, 0 < alpha < 1) with influence(alpha v) <= alpha * influence(v), in [0, 1].

        The paper's claim with each noise's own influence in the place of epsilon.

        Raises:
            ValueError: if 1 is not among the factors, or nothing is between 0 and 1.
        """
        if 1.0 not in self.factors or not any(0 < factor < 1 for factor in self.factors):
            raise ValueError(f"factors {self.factors}: expected 1 and some between 0 and 1")
        inside = [index for index, factor in enumerate(self.factors) if 0 < factor < 1]
        alphas = torch.tensor([self.factors[index] for index in inside], dtype=self.influence.dtype)
        whole = self.influence[:, [self.factors.index(1.0)]]
        return float((self.influence[:, inside] <= alphas * whole).double().mean())


@dataclass(frozen=True, eq=False)
class Combinations:
    """The influence of alpha_1 v_1 + alpha_2 v_2 for every pair of noises over a grid."""

    alphas_1: tuple[float, ...]
    alphas_2: tuple[float, ...]
    influence: Tensor
    """(pairs, alphas_1, alphas_2), float64, in [0, 2]."""
    images: int

    @property
    def mean(self) -> Tensor:
        """(alphas_1, alphas_2): the surface of figure 4, averaged over the pairs."""
        return self.influence.mean(0)

    def convex(self) -> list[tuple[float, float, float]]:
        """(alpha_1, alpha_2, mean influence) where alpha_1 + alpha_2 = 1, both in [0, 1]: the convex combinations."""
        return [
            (one, two, float(self.mean[row, column]))
            for row, one in enumerate(self.alphas_1)
            for column, two in enumerate(self.alphas_2)
            if abs(one + two - 1) < 1e-9 and one >= 0 and two >= 0
        ]


def scaling(
    model: nn.Module,
    batches: Sequence[Tensor],
    noises: Sequence[Tensor],
    factors: Sequence[float] = GRID,
    *,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Scaling:
    """Influence of every noise (1, N, D) times every factor, on ``batches`` of ``pixel_values`` (b, C, H, W).

    Args:
        batches: this process's share of the images; the influence is over those of all processes.
        hook: the persistent hook of a model that has one.
        chunk_size: at most so many images go through the model at once.
        on_step: called with (evaluations done, evaluations in all).

    Raises:
        ValueError: without images or noises, or for a noise that does not fit the model.
    """
    scaled = (factor * noise for noise in noises for factor in factors)
    found, images = _influences(model, batches, scaled, len(noises) * len(factors), hook, chunk_size, on_step)
    return Scaling(tuple(factors), found.reshape(len(noises), len(factors)), images)


def combinations(
    model: nn.Module,
    batches: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    alphas_1: Sequence[float] = GRID,
    alphas_2: Sequence[float] = GRID,
    *,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Combinations:
    """Influence of alpha_1 v_1 + alpha_2 v_2 for every pair (v_1, v_2) of noises (1, N, D); else as :func:`scaling`."""
    combined = (a * one + b * two for one, two in pairs for a in alphas_1 for b in alphas_2)
    count = len(pairs) * len(alphas_1) * len(alphas_2)
    found, images = _influences(model, batches, combined, count, hook, chunk_size, on_step)
    shape = (len(pairs), len(alphas_1), len(alphas_2))
    return Combinations(tuple(alphas_1), tuple(alphas_2), found.reshape(shape), images)


def _influences(
    model: nn.Module,
    batches: Sequence[Tensor],
    noises: Iterable[Tensor],
    count: int,
    hook: PatchEmbeddingNoise | None,
    chunk_size: int | None,
    on_step: Callable[[int, int], None] | None,
) -> tuple[Tensor, int]:
    """The influence of each of ``count`` noises, and the number of images."""
    if not batches or not count:
        raise ValueError(f"{len(batches)} batches of images and {count} noises: expected at least one of each")
    found = []
    with probing(model, batches, hook=hook, chunk_size=chunk_size) as probe:
        for index, noise in enumerate(noises):
            found.append(probe.held_out_influence(noise))
            if on_step is not None:
                on_step(index + 1, count)
    return torch.tensor(found, dtype=torch.float64), probe.held_out_images
