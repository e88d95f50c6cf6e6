"""Rounding to 8 bits in the direction that the model sees least.

An image in the nullspace leaves it when its pixels are rounded, each by up to 1 / 510. But every pixel may as well go
to the other neighbour of its value: of the 2^P ways to round a patch, one is sought whose change of the embedding,
||theta (rounded - source)||, is small, starting from the nearest levels and flipping one pixel at a time, the best
first, until no flip helps. It stays within 1 / 255 of the image.
"""

import torch
from torch import Tensor

from hf_nullspace.linear.patch import PatchNullspace, join_patches, split_patches

LEVELS = 255


def round_unseen(nullspace: PatchNullspace, source: Tensor, pixels: Tensor, *, flips: int | None = None) -> Tensor:
    """8-bit pixels (B, C, H, W), multiples of 1/255, next to ``pixels`` in [0, 1] and seen as much as ``source``.

    ``nullspace`` is one of pixels (``PatchNullspace.in_pixels(std)``). ``flips`` limits the flips per patch (default: 4
    times its numbers). Where the patches end, pixels are rounded to the nearest. Computed in float64, returned in the
    dtype of ``pixels``.

    Raises:
        ValueError: if the shapes differ.
    """
    if source.shape != pixels.shape:
        raise ValueError(f"source {tuple(source.shape)} and pixels {tuple(pixels.shape)}: expected the same shape")
    shape, size = nullspace.patch_shape, (pixels.shape[-2], pixels.shape[-1])
    exact = split_patches(pixels.double() * LEVELS, shape)
    start = split_patches(source.double() * LEVELS, shape).flatten(0, 1)
    rounded = join_patches(
        _flipped(nullspace.weight.to(exact), start, exact.flatten(0, 1), flips or 4 * exact.shape[-1]).view_as(exact),
        shape,
        size,
    )
    result = (pixels.double() * LEVELS).round()
    rows, columns = size[0] // shape[1] * shape[1], size[1] // shape[2] * shape[2]
    result[:, :, :rows, :columns] = rounded[:, :, :rows, :columns]
    return (result / LEVELS).to(pixels.dtype)


def _flipped(weight: Tensor, source: Tensor, exact: Tensor, flips: int) -> Tensor:
    """Patches (N, P) of integers, floors or ceilings of ``exact``, by greedy descent of ||theta (x - source)||^2."""
    gram = weight.T @ weight
    levels, low = exact.round(), exact.floor()
    free = exact.ceil() > low
    gradient = (levels - source) @ gram
    active = torch.arange(len(exact), device=exact.device)
    for _ in range(flips):
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
