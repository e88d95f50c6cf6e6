"""Scale a noise until it has a wanted influence: bracket the factor, then bisect; forward passes only.

What makes controls fair: a random or a permuted noise is compared with a learned one at the same influence epsilon,
measured on the same held-out images (the paper's table 3).
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.endings import scaled_ending
from hf_nullspace.noise.probe import Probe, frozen

TOLERANCE = 0.02
"""How far from epsilon the influence may end, as a share of epsilon."""
_DOUBLINGS = 40
_GUESSES = 6


class NoiseNotCalibratedError(RuntimeError):
    """No factor gives the wanted influence: the influence saturates below it, or jumps over it.

    ``inside``: the largest (factor, influence) below epsilon that was found; (0, 0) if there is none.
    """

    def __init__(self, message: str, inside: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__(message)
        self.inside = inside


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A noise that was scaled: the factor, its influence on the held-out images, and on how many that was measured."""

    noise: Tensor
    """(1, N, D), float32 or wider, on the model's device."""
    factor: float
    influence: float
    images: int
    evaluations: int
    ended: str = "calibrated"
    """"calibrated", or what else became of it (:data:`hf_nullspace.noise.endings.ENDINGS`)."""


def find_factor(
    influence_at: Callable[[float], float],
    epsilon: float,
    *,
    start: float = 1.0,
    tolerance: float = TOLERANCE,
    steps: int = 40,
    largest: float = math.inf,
) -> tuple[float, float, int]:
    """A factor > 0 at which the influence is within ``tolerance`` * ``epsilon`` of ``epsilon``.

    ``influence_at(factor)`` is 0 at 0. From ``start`` the factor goes by at most a factor of two at a time until
    ``epsilon`` is bracketed, never above ``largest``; then the bracket shrinks, to where a power law between its ends
    has ``epsilon``, and every third time to its middle. The influence need not be monotone; a crossing is found in any
    case. Returns the factor, its influence, and how often ``influence_at`` was asked.

    Raises:
        ValueError: if epsilon is not positive.
        FloatingPointError: if an influence is NaN, but for one farther out than others that are below epsilon.
        NoiseNotCalibratedError: if no factor brackets epsilon, or ``steps`` divisions do not come near enough.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r}: a noise is scaled to a positive influence")
    asked = 0

    def ask(factor: float) -> tuple[float, float]:
        nonlocal asked
        asked += 1
        influence = influence_at(factor)
        if math.isnan(influence):
            raise FloatingPointError(f"the influence of the noise times {factor:g} is NaN: check the model's logits")
        return factor, influence

    def near(influence: float) -> bool:
        return abs(influence - epsilon) <= tolerance * epsilon

    inside, outside = (0.0, 0.0), None
    point = ask(min(start, largest))
    for number in range(_DOUBLINGS):
        if near(point[1]):
            return *point, asked
        if point[1] < epsilon:
            inside = point
        else:
            outside = point
        if outside is not None and (inside[0] > 0 or outside[0] <= sys.float_info.min):
            break
        if point[0] >= largest and outside is None:
            break
        # The influence grows about as the square; where that leads nowhere (a plateau), by two at a time.
        guess = math.sqrt(epsilon / point[1]) if point[1] > 0 and number < _GUESSES else math.inf
        guess = guess * 1.05 if outside is None else 0.95 * guess if guess < math.inf else 0.5
        try:
            point = ask(min(point[0] * min(max(guess, 0.5), 2.0), largest))
        except FloatingPointError:  # so far out the precision ends
            if inside[0] == 0 or outside is not None:
                raise
            break
    if outside is None or inside[0] == 0:
        raise NoiseNotCalibratedError(
            f"no factor between {start:g} and {point[0]:g} gives an influence of {epsilon:g}; at {point[0]:g} it is "
            f"{point[1]:.4g}. "
            + (
                "Choose another epsilon: the model's predictions do not move by that much"
                if outside is None
                else "The influence jumps there: use a wider precision"
            ),
            inside,
        )
    for step in range(steps):
        point = ask(_between(inside, outside, epsilon, halve=step % 3 == 2))
        if near(point[1]):
            return *point, asked
        inside, outside = (point, outside) if point[1] < epsilon else (inside, point)
    raise NoiseNotCalibratedError(
        f"{steps} divisions ended at the factor {point[0]:.6g} with influence {point[1]:.4g}; epsilon is {epsilon:g}. "
        "The influence jumps there: hold out more images (held_out_images), or use a wider precision",
        inside,
    )


def _between(inside: tuple[float, float], outside: tuple[float, float], epsilon: float, *, halve: bool) -> float:
    """A factor inside of the bracket ((factor, influence), (factor, influence)), not at its very ends."""
    if halve or inside[1] <= 0:
        return (inside[0] + outside[0]) / 2
    share = math.log(epsilon / inside[1]) / math.log(outside[1] / inside[1])
    return inside[0] * (outside[0] / inside[0]) ** min(max(share, 0.05), 0.95)


def calibrate(
    model: nn.Module,
    direction: Tensor,
    epsilon: float,
    held_out: Sequence[Tensor],
    *,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
    tolerance: float = TOLERANCE,
) -> Calibrated:
    """``direction`` (1, N, D) times the factor that gives it the influence ``epsilon`` on ``held_out``.

    Args:
        model: an image classifier; in eval mode and frozen meanwhile, as before afterwards. DDP is unwrapped.
        held_out: batches ``pixel_values`` (b, C, H, W), on several processes this one's share; all end with one factor.
        hook: the persistent hook of a model that has one; else one is put on for the time.
        chunk_size: at most so many images go through the model at once.

    Raises:
        ValueError: without held-out images.
        NoiseNotCalibratedError: if there is no such factor.
    """
    options: dict[str, Any] = {"hook": hook, "chunk_size": chunk_size, "tolerance": tolerance}
    return calibrate_each(model, [direction], epsilon, held_out, **options)[0]


def calibrate_each(
    model: nn.Module,
    directions: Sequence[Tensor],
    epsilon: float,
    held_out: Sequence[Tensor],
    *,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
    tolerance: float = TOLERANCE,
    largest: float | None = None,
    must_reach: bool = True,
) -> list[Calibrated]:
    """:func:`calibrate` for several directions; the clean logits of the held-out images are computed once.

    ``largest``: no factor gets larger. Without ``must_reach`` a direction that is below epsilon at every factor is no
    error: it gets ``largest``, or the smallest factor with nearly the largest influence that was found.
    """
    if not held_out:
        raise ValueError("a noise is scaled on held-out images: pass some (held_out_images)")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    own_hook = hook is None
    hook = hook or PatchEmbeddingNoise(model)
    parameter = next(model.parameters())
    found = []
    try:
        with frozen(model):
            probe = Probe(model, hook, held_out, chunk_size, spare=held_out[0][:1])
            for given in directions:
                direction = given.to(parameter.device, torch.promote_types(torch.float32, parameter.dtype))
                tried: list[tuple[float, float]] = []
                asking = partial(_influence_at, probe, direction, tried)
                try:
                    factor, influence, asked = find_factor(
                        asking, epsilon, tolerance=tolerance, largest=largest or math.inf
                    )
                except NoiseNotCalibratedError as error:
                    if must_reach or error.inside[0] == 0:
                        raise
                    (factor, influence), asked = error.inside, len(tried)
                    if largest is None:
                        below = sorted(point for point in tried if point[1] < epsilon)
                        most = max(reached for _, reached in below)
                        factor, influence = next(point for point in below if point[1] >= (1 - tolerance) * most)
                ended = scaled_ending(influence, epsilon, at_bound=largest is not None and factor >= largest)
                found.append(Calibrated(factor * direction, factor, influence, probe.held_out_images, asked, ended))
    finally:
        if own_hook:
            hook.remove()
    return found


def _influence_at(probe: Probe, direction: Tensor, tried: list[tuple[float, float]], factor: float) -> float:
    tried.append((factor, probe.held_out_influence(factor * direction)))
    return tried[-1][1]
