"""Rounding to 8 bits in the direction that the model sees least.

Of the 2^P ways to round a patch up or down, one is sought that changes the embedding little, by
||theta (rounded - source)||: from the nearest levels, one pixel is flipped at a time, the best first, until no flip
helps. It stays within 1 / 255 of the image.
"""

import torch
from torch import Tensor

from hf_nullspace.linear.patch import PatchNullspace, split_patches, with_patches

LEVELS = 255


def round_unseen(nullspace: PatchNullspace, source: Tensor, pixels: Tensor) -> Tensor:
    """8-bit pixels (B, C, H, W), multiples of 1/255, next to ``pixels`` in [0, 1] and seen as much as ``source``.

    ``nullspace`` is one of pixels (``PatchNullspace.in_pixels(std)``). Beyond the last whole patch, pixels are rounded
    to the nearest. Computed in float64, returned in the dtype of ``pixels``.

    Raises:
        ValueError: if the shapes differ.
    """
    if source.shape != pixels.shape:
        raise ValueError(f"source {tuple(source.shape)} and pixels {tuple(pixels.shape)}: expected the same shape")
    shape, levels = nullspace.patch_shape, pixels.double() * LEVELS
    exact = split_patches(levels, shape)
    start = split_patches(source.double() * LEVELS, shape)
    rounded = _flipped(nullspace.weight.to(exact), start.flatten(0, 1), exact.flatten(0, 1)).view_as(exact)
    return (with_patches(levels.round(), rounded, shape) / LEVELS).to(pixels.dtype)


def _flipped(weight: Tensor, source: Tensor, exact: Tensor) -> Tensor:
    """Patches (N, P) of integers, floors or ceilings of ``exact``, by greedy descent of ||theta (x - source)||^2.

    At most 4 flips per number.
    """
    gram = weight.T @ weight
    levels, low = exact.round(), exact.floor()
    free = exact.ceil() > low
    gradient = (levels - source) @ gram
    active = torch.arange(len(exact), device=exact.device)
    for _ in range(4 * exact.shape[-1]):
        step = torch.where(levels[active] > low[active], -1.0, 1.0)
        change = (2 * step * gradient[active] + gram.diagonal()).masked_fill(~free[active], torch.inf)
        best, which = change.min(1)
        helps = best < -1e-12 * gram.diagonal().mean()
        active, which = active[helps], which[helps]
        if not len(active):
            break
        moved = step[helps].gather(1, which[:, None])
        levels[active, which] += moved[:, 0]
        gradient[active] += moved * gram[which]
    return levels
