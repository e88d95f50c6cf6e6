"""The nearest image to a wish, inside [0, 1], that the model cannot tell from its source (the problem of A.7).

For every patch by itself: minimise ||x - target||^2 / 2 over 0 <= x <= 1 with A x = A source, where the rows of A are
an orthonormal basis of what the model sees (``PatchNullspace.row_basis``). The Lagrangian's minimiser inside the box is
x(lambda) = clip(target + A^T lambda), so the dual function is concave and smooth with gradient A source - A x(lambda),
with the Lipschitz constant 1 because A's rows are orthonormal: accelerated ascent with step 1 (FISTA); the momentum of
a patch is dropped whenever it points downhill (O'Donoghue and Candes 2015).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_nullspace.linear.patch import PatchNullspace, split_patches, with_patches

SLACK = 1e-6  # of [0, 1], for rounding


@dataclass(frozen=True, eq=False)
class BoxSolution:
    """The patches that were found, and how far they are from optimal."""

    patches: Tensor
    """(N, P), inside the box."""
    kkt_residual: Tensor
    """(N,): ||A (x - source)|| / max(||A source||, 1), the relative change of the embedding. The other optimality
    conditions are met by construction."""
    iterations: int


def nearest_in_box(
    row_basis: Tensor, source: Tensor, target: Tensor, *, iterations: int = 2000, tolerance: float = 1e-5
) -> BoxSolution:
    """Patches nearest to ``target`` (N, P) within [0, 1], with A x = A source; all in one dtype and on one device.

    Args:
        row_basis: A (rank, P) with orthonormal rows, that of ``PatchNullspace.in_pixels``.
        source: patches (N, P) in [0, 1], so that there is a solution.
        iterations: at most; each is two products with A for all patches that are not done.
        tolerance: a patch is done when its KKT residual is below this; float32 does not get much below 1e-6.

    Raises:
        ValueError: for shapes that do not fit, or a source outside of [0, 1].
    """
    if source.shape != target.shape or source.dim() != 2 or source.shape[1] != row_basis.shape[1]:
        shapes = f"source {tuple(source.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{shapes}: expected (patches, {row_basis.shape[1]}), as the row basis has it")
    if source.numel() and (source.min() < -SLACK or source.max() > 1 + SLACK):
        low, high = float(source.min()), float(source.max())
        raise ValueError(f"source in [{low:.4g}, {high:.4g}], expected [0, 1]: start from pixels of a real image")
    rows = row_basis.to(source)
    wanted = source @ rows.T
    scale = torch.linalg.vector_norm(wanted, dim=1).clamp_min(1.0)

    def primal(goal: Tensor, multipliers: Tensor) -> Tensor:
        return (goal + multipliers @ rows).clamp(0, 1)

    multipliers = torch.zeros_like(wanted)
    ahead, momentum = multipliers.clone(), wanted.new_ones(len(source))
    active = torch.arange(len(source), device=source.device)
    done = 0
    for done in range(1, iterations + 1):  # noqa: B007 (reported)
        gradient = wanted[active] - primal(target[active], ahead[active]) @ rows.T
        finished = torch.linalg.vector_norm(gradient, dim=1) <= tolerance * scale[active]
        # what is judged is the point where the gradient was taken
        multipliers[active[finished]] = ahead[active[finished]]
        active, gradient = active[~finished], gradient[~finished]
        if not len(active):
            break
        step = ahead[active] + gradient
        moved = step - multipliers[active]
        downhill = (gradient * moved).sum(1) < 0
        before = torch.where(downhill, 1.0, momentum[active])
        after = (1 + (1 + 4 * before.square()).sqrt()) / 2
        ahead[active] = step + ((before - 1) / after)[:, None] * moved
        multipliers[active], momentum[active] = step, after
    patches = primal(target, multipliers)
    residual = torch.linalg.vector_norm(patches @ rows.T - wanted, dim=1) / scale
    return BoxSolution(patches, residual, iterations=done)


def nearest_invisible_image(
    nullspace: PatchNullspace, source: Tensor, target: Tensor, *, iterations: int = 2000, tolerance: float = 1e-5
) -> tuple[Tensor, BoxSolution]:
    """The image nearest to ``target`` among those in [0, 1] with the patch embeddings of ``source``.

    Both are pixels (B, C, H, W) in [0, 1], and ``nullspace`` is one of pixels (``PatchNullspace.in_pixels(std)``).
    Returns the pixels (B, C, H, W) and the solution for the B * N patches. A border that belongs to no whole patch
    stays as it is in the source.
    """
    shape = nullspace.patch_shape
    sources, targets = split_patches(source, shape), split_patches(target, shape)
    both = sources.flatten(0, 1), targets.flatten(0, 1)
    solution = nearest_in_box(nullspace.row_basis, *both, iterations=iterations, tolerance=tolerance)
    return with_patches(source, solution.patches.view_as(sources), shape), solution
