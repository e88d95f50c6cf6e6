"""Scale a noise until it has a wanted influence: bracket the factor, then divide the bracket; forward passes only.

A random or a permuted noise is compared with a learned one at the same influence epsilon, measured on the same held-out
images (the paper's table 3).
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.history import LEAST, scaled_ending
from hf_nullspace.noise.probe import probing

TOLERANCE = 0.02
"""How far from epsilon the influence may end, as a share of epsilon."""
_DOUBLINGS, _GUESSES, _DIVISIONS = 40, 6, 40


class NoiseNotCalibratedError(RuntimeError):
    """Every factor that was tried gives a larger influence than the wanted one."""


class Scaled(NamedTuple):
    """A factor, its influence, and how often the influence was computed."""

    factor: float
    influence: float
    evaluations: int


def scale_to_influence(
    influence_at: Callable[[float], float],
    epsilon: float,
    *,
    start: float = 1.0,
    tolerance: float = TOLERANCE,
    largest: float = math.inf,
) -> Scaled:
    """A factor > 0, at most ``largest``, with an influence within ``tolerance`` * ``epsilon`` of ``epsilon``.

    ``influence_at(factor)`` is 0 at 0. From ``start`` the factor goes by at most a factor of two at a time until
    ``epsilon`` is bracketed; then the bracket shrinks, to where a power law between its ends has ``epsilon``, and every
    third time to its middle. The influence need not be monotone.

    Where no factor has that influence, because it saturates below ``epsilon`` or jumps over it, the result is
    ``largest`` or, without one, the smallest factor with nearly the largest influence below ``epsilon``.

    Raises:
        ValueError: if epsilon is not positive.
        FloatingPointError: if an influence is NaN, but for one farther out than others that are below epsilon.
        NoiseNotCalibratedError: if every factor that was tried has an influence above epsilon.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r}: a noise is scaled to a positive influence")
    asked: list[tuple[float, float]] = []

    def ask(factor: float) -> tuple[float, float]:
        asked.append((factor, influence_at(factor)))
        if math.isnan(asked[-1][1]):
            raise FloatingPointError(f"the influence of the noise times {factor:g} is NaN: check the model's logits")
        return asked[-1]

    def is_near(influence: float) -> bool:
        return abs(influence - epsilon) <= tolerance * epsilon

    inside, outside = (0.0, 0.0), None
    point = ask(min(start, largest))
    for number in range(_DOUBLINGS):
        if is_near(point[1]):
            return Scaled(*point, len(asked))
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
        except FloatingPointError:  # the precision ends that far out
            if inside[0] == 0 or outside is not None:
                raise
            break
    for step in range(_DIVISIONS if outside is not None and inside[0] > 0 else 0):
        assert outside is not None
        point = ask(_between(inside, outside, epsilon, halve=step % 3 == 2))
        if is_near(point[1]):
            return Scaled(*point, len(asked))
        inside, outside = (point, outside) if point[1] < epsilon else (inside, point)
    if inside[0] == 0:
        raise NoiseNotCalibratedError(
            f"no factor between {start:g} and {point[0]:g} gives an influence of {epsilon:g}; at {point[0]:g} it is "
            f"{point[1]:.4g}: the influence jumps there, use a wider precision"
        )
    if largest == math.inf:
        below = sorted(each for each in asked if each[1] < epsilon)
        enough = (1 - tolerance) * max(influence for _, influence in below)
        inside = next(each for each in below if each[1] >= enough)
    return Scaled(*inside, len(asked))


def _between(inside: tuple[float, float], outside: tuple[float, float], epsilon: float, *, halve: bool) -> float:
    """A factor inside of the bracket ((factor, influence), (factor, influence)), not at its very ends."""
    if halve or inside[1] <= 0:
        return (inside[0] + outside[0]) / 2
    share = math.log(epsilon / inside[1]) / math.log(outside[1] / inside[1])
    return inside[0] * (outside[0] / inside[0]) ** min(max(share, 0.05), 0.95)


def scale_into(
    influence_at: Callable[[float], float],
    epsilon: float,
    *,
    start: float = 1.0,
    largest: float = math.inf,
    tolerance: float = 1 - LEAST,
) -> Scaled:
    """:func:`scale_to_influence`, to an influence in [(1 - tolerance) * epsilon, epsilon]."""
    half = tolerance / 2
    aim, near = epsilon * (1 - half), half / (1 - half) * 0.999
    return scale_to_influence(influence_at, aim, start=start, tolerance=near, largest=largest)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A noise that was scaled: the factor, its influence on the held-out images, and on how many that was measured."""

    noise: Tensor
    """(1, N, D), float32 or wider, on the model's device."""
    factor: float
    influence: float
    images: int
    evaluations: int
    ended: str
    """"calibrated", or another of :data:`hf_nullspace.noise.history.ENDINGS` if no factor has the influence."""


def calibrate(
    model: nn.Module,
    directions: Sequence[Tensor],
    epsilon: float,
    held_out: Sequence[Tensor],
    *,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
    tolerance: float = TOLERANCE,
    largest: float = math.inf,
) -> list[Calibrated]:
    """Each of ``directions`` (1, N, D) times the factor that gives it the influence ``epsilon`` on ``held_out``.

    The model, ``held_out``, ``hook`` and ``chunk_size`` are those of :func:`hf_nullspace.noise.probe.probing`; the
    tolerance, ``largest`` and what becomes of a noise that no factor brings to epsilon, of :func:`scale_to_influence`.

    Raises:
        ValueError: without held-out images.
        NoiseNotCalibratedError: if every factor that was tried has an influence above epsilon.
    """
    if not held_out:
        raise ValueError("a noise is scaled on held-out images: pass some (held_out_images)")
    found = []
    with probing(model, held_out, hook=hook, chunk_size=chunk_size) as probe:
        for given in directions:
            direction = given.to(probe.device, probe.noise_dtype)

            def influence_at(factor: float, direction: Tensor = direction) -> float:
                return probe.held_out_influence(factor * direction)

            scaled = scale_to_influence(influence_at, epsilon, tolerance=tolerance, largest=largest)
            ended = scaled_ending(scaled.influence, epsilon, at_bound=scaled.factor >= largest)
            noise = scaled.factor * direction
            found.append(
                Calibrated(noise, scaled.factor, scaled.influence, probe.held_out_images, scaled.evaluations, ended)
            )
    return found
