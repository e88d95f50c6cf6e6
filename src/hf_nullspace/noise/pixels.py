"""The plain image perturbation that comes nearest to a noise on the embeddings.

An embedding noise v adds v_n to the embedding of patch n. Which change of the patch does the same? None, where v_n has
a part outside of the range of theta (always possible when D > P or theta has not full rank); the least-squares answer
is p_n = theta^+ v_n, which changes the embedding by theta theta^+ v_n, the nearest that any image can do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_nullspace.linear.patch import PatchNullspace, join_patches, patches_in_pixels


@dataclass(frozen=True, eq=False)
class PixelPreimage:
    """The smallest change of ``pixel_values`` that changes the embeddings nearly as a noise does; float64."""

    patches: Tensor
    """theta^+ v (N, P), normalised; row by row over the grid."""
    grid: tuple[int, int]
    patch_shape: tuple[int, int, int]
    embedding_change: Tensor
    """theta theta^+ v (1, N, D), what adding the preimage to an image does to its embeddings."""
    residuals: Tensor
    """(N,): ||v_n - theta theta^+ v_n||, absolute, the part of the noise that no image can cause."""
    residual: float
    """||v - theta theta^+ v|| / ||v|| in [0, 1]: 0 if an image perturbation does all of it, 1 if nothing."""

    def pixel_values(self, size: tuple[int, int] | None = None) -> Tensor:
        """The change of normalised images, (1, C, H, W): the patches in their places.

        ``size`` (H, W), if the images have a border beyond the last whole patch: there it is 0.
        """
        height, width = self.patch_shape[1:]
        whole = (self.grid[0] * height, self.grid[1] * width)
        return join_patches(self.patches[None], self.patch_shape, whole if size is None else size)

    def pixels(self, std: Sequence[float], size: tuple[int, int] | None = None) -> Tensor:
        """The same change for pixels in [0, 1], (1, C, H, W), by the image processor's ``std``; not clipped."""
        return patches_in_pixels(self.pixel_values(size), std)


def pixel_preimage(nullspace: PatchNullspace, noise: Tensor, grid: tuple[int, int]) -> PixelPreimage:
    """The least-squares preimage of ``noise`` (1, N, D) on a grid (h, w) of N = h * w patches.

    The pseudo-inverse is taken in float64; singular values up to ``nullspace.tolerance`` count as zero, so that the
    preimage is orthogonal to the nullspace: adding any element of it gives another preimage, none is smaller. Smallest
    in ``pixel_values``; where std differs by channel, ``nullspace.in_pixels(std)`` gives the one smallest in pixels.

    Raises:
        ValueError: if the noise does not fit the patch projection or the grid.
    """
    features = nullspace.weight.shape[0]
    if tuple(noise.shape) != (1, grid[0] * grid[1], features):
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} for a grid of {grid[0]} x {grid[1]} patches of {features} features; "
            f"expected (1, {grid[0] * grid[1]}, {features}). It belongs to another model or image size."
        )
    weight, wanted = nullspace.weight.double(), noise[0].detach().cpu().double()
    patches = wanted @ torch.linalg.pinv(weight, atol=nullspace.tolerance, rtol=0.0).T
    change = patches @ weight.T
    rest = torch.linalg.vector_norm(wanted - change, dim=1)
    size = float(torch.linalg.vector_norm(wanted))
    return PixelPreimage(
        patches=patches,
        grid=grid,
        patch_shape=nullspace.patch_shape,
        embedding_change=change[None],
        residuals=rest,
        residual=float(torch.linalg.vector_norm(rest)) / size if size else 0.0,
    )
