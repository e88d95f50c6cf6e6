"""Scale a noise until it has a wanted influence: bracket the factor, then bisect; forward passes only.

What makes controls fair: a random or a permuted noise is compared with a learned one at the same influence epsilon,
measured on the same held-out images (the paper's table 3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.probe import Probe, frozen

TOLERANCE = 0.02
"""How far from epsilon the influence may end, as a share of epsilon."""
_DOUBLINGS = 40


class NoiseNotCalibratedError(RuntimeError):
    """No factor gives the wanted influence: the influence saturates below it, or jumps over it."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A noise that was scaled: the factor, its influence on the held-out images, and on how many that was measured."""

    noise: Tensor
    """(1, N, D), float32 or wider, on the model's device."""
    factor: float
    influence: float
    images: int
    evaluations: int


def find_factor(
    influence_at: Callable[[float], float],
    epsilon: float,
    *,
    start: float = 1.0,
    tolerance: float = TOLERANCE,
    steps: int = 40,
) -> tuple[float, float, int]:
    """A factor > 0 at which the influence is within ``tolerance`` * ``epsilon`` of ``epsilon``.

    ``influence_at(factor)`` is 0 at 0. From ``start`` the factor is doubled or halved until ``epsilon`` is bracketed,
    then bisected. The influence need not be monotone; a crossing is found in any case. Returns the factor, its
    influence, and how often ``influence_at`` was asked.

    Raises:
        ValueError: if epsilon is not positive.
        NoiseNotCalibratedError: if no factor brackets epsilon, or ``steps`` bisections do not come near enough.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r}: a noise is scaled to a positive influence")
    asked = 0

    def near(influence: float) -> bool:
        return abs(influence - epsilon) <= tolerance * epsilon

    def ask(factor: float) -> float:
        nonlocal asked
        asked += 1
        return influence_at(factor)

    factor = start
    influence = ask(factor)
    growing = influence < epsilon
    inside, outside = (factor, None) if growing else (0.0, factor)
    for _ in range(_DOUBLINGS):
        if near(influence):
            return factor, influence, asked
        if not growing and influence < epsilon:
            inside = factor
            break
        if growing and influence > epsilon:
            outside = factor
            break
        inside, outside = (factor, outside) if growing else (inside, factor)
        factor = factor * 2 if growing else factor / 2
        influence = ask(factor)
    else:
        raise NoiseNotCalibratedError(
            f"no factor between {start:g} and {factor:g} gives an influence of {epsilon:g}; at {factor:g} it is "
            f"{influence:.4g}. Choose another epsilon: the model's predictions do not move by that much"
        )
    assert outside is not None
    for _ in range(steps):
        factor = (inside + outside) / 2
        influence = ask(factor)
        if near(influence):
            return factor, influence, asked
        inside, outside = (factor, outside) if influence < epsilon else (inside, factor)
    raise NoiseNotCalibratedError(
        f"{steps} bisections ended at the factor {factor:.6g} with influence {influence:.4g}; epsilon is {epsilon:g}. "
        "The influence jumps there: hold out more images (held_out_images), or use a wider precision"
    )


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
    if not held_out:
        raise ValueError("a noise is scaled on held-out images: pass some (held_out_images)")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    own_hook = hook is None
    hook = hook or PatchEmbeddingNoise(model)
    parameter = next(model.parameters())
    direction = direction.to(parameter.device, torch.promote_types(torch.float32, parameter.dtype))
    try:
        with frozen(model):
            probe = Probe(model, hook, held_out, chunk_size, spare=held_out[0][:1])
            found = find_factor(
                lambda factor: probe.held_out_influence(factor * direction), epsilon, tolerance=tolerance
            )
    finally:
        if own_hook:
            hook.remove()
    factor, influence, asked = found
    return Calibrated(factor * direction, factor, influence, probe.held_out_images, asked)
