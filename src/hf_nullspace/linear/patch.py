"""The exact nullspace of the patch embedding: patches that the model cannot see (section 2.2 and A.4 of the paper).

The projection maps the P = C * r * r numbers of one patch to D features. Patches p with ``weight @ p = 0`` form a space
of dimension P - rank(weight); added to any patch of any image they leave every embedding, so every prediction, as it
was, until the pixels are clipped or rounded. The bias plays no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_nullspace.models.patch_embedding import NotAViTError, find_patch_embedding, patch_projection, unwrap


class NoNullspaceError(ValueError):
    """The patch embedding is injective: only the zero patch is mapped to zero."""


@dataclass(frozen=True, eq=False)
class PatchNullspace:
    """The nullspace of a patch projection theta, found once, in float64.

    Patches live in the space of ``pixel_values`` (normalised); :meth:`in_pixels` gives the same nullspace for pixels in
    [0, 1]. Kept is an orthonormal basis of the row space, which is smaller than the nullspace: the projection onto the
    nullspace is ``p - row_basis^T row_basis p``.
    """

    weight: Tensor
    """theta (D, P), as the model holds it."""
    patch_shape: tuple[int, int, int]
    """(C, height, width) of a patch; their product is P."""
    singular_values: Tensor
    """The spectrum of theta, min(D, P) numbers, descending, float64."""
    row_basis: Tensor
    """(rank, P), orthonormal rows, float64."""
    tolerance: float
    """Singular values up to this one count as zero."""

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        patch_embedding: nn.Module | None = None,
        tolerance: float | None = None,
        stored_dtype: torch.dtype | None = None,
    ) -> Self:
        """The nullspace of the model's patch embedding.

        ``stored_dtype`` is the precision of the checkpoint, for the tolerance (:func:`default_tolerance`). Unset, it is
        the coarser of the dtypes of the weights and of ``config.dtype``, so that ``model.double()`` has the same
        nullspace; the precision of a bfloat16 checkpoint that was loaded as float32 has to be given.

        Raises:
            NotAViTError: if the model has no patch embedding, or its patches overlap.
        """
        module = patch_embedding if patch_embedding is not None else find_patch_embedding(model)
        projection = patch_projection(module)
        if projection is None:
            kind = f"{type(module).__name__} of {type(unwrap(model)).__name__}"
            raise NotAViTError(f"{kind} has no convolution with a stride of its kernel size: its patches overlap")
        weight = projection.weight
        return cls.from_weight(weight, tolerance=tolerance, stored_dtype=stored_dtype or _coarser(weight, model))

    @classmethod
    def from_weight(
        cls, weight: Tensor, *, tolerance: float | None = None, stored_dtype: torch.dtype | None = None
    ) -> Self:
        """The nullspace of a convolution's weight (D, C, height, width)."""
        if weight.dim() != 4:
            raise ValueError(f"the weight of a patch projection is (D, C, height, width), got {tuple(weight.shape)}")
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight  # of FSDP2
        flat = whole.detach().flatten(1).cpu()
        _, singular_values, rows = torch.linalg.svd(flat.double(), full_matrices=False)
        if tolerance is None:
            tolerance = default_tolerance(singular_values, flat.shape, stored_dtype or flat.dtype)
        rank = int((singular_values > tolerance).sum())
        channels, height, width = weight.shape[1:]
        return cls(flat, (channels, height, width), singular_values, rows[:rank].contiguous(), tolerance)

    @property
    def basis(self) -> Tensor:
        """An orthonormal basis (dimension, P) of the nullspace, b_1 .. b_k of equation 4; computed at every call."""
        complete, _ = torch.linalg.qr(self.row_basis.T, mode="complete")
        return complete[:, len(self.row_basis) :].T.contiguous()

    def dimension(self, tolerance: float | None = None) -> int:
        """P - rank(theta), where singular values up to ``tolerance`` (absolute; default: the own one) are zero."""
        rank = len(self.row_basis) if tolerance is None else int((self.singular_values > tolerance).sum())
        return self.weight.shape[1] - rank

    def summary(self) -> dict[str, Any]:
        """Spectrum, tolerance, and the dimension there, at a tenth and at ten times of it, for JSON."""
        return {
            "features": self.weight.shape[0],
            "patch": list(self.patch_shape),
            "weight_dtype": str(self.weight.dtype).removeprefix("torch."),
            "tolerance": self.tolerance,
            "dimension": self.dimension(),
            "dimension_at_a_tenth": self.dimension(self.tolerance / 10),
            "dimension_at_ten_times": self.dimension(self.tolerance * 10),
            "singular_values": self.singular_values.tolist(),
        }

    def project_patches(self, patches: Tensor) -> Tensor:
        """The nearest patches (..., P) that the model cannot see; computed in float64, returned in the given dtype."""
        rows = self.row_basis.to(patches.device)
        exact = patches.double()
        return (exact - (exact @ rows.T) @ rows).to(patches.dtype)

    def project(self, pixel_values: Tensor) -> Tensor:
        """The part of images or of changes of images (B, C, H, W) that the model cannot see, patch by patch.

        It is zero beyond the last whole patch: some models drop that border, others pad it.
        """
        patches = self.project_patches(split_patches(pixel_values, self.patch_shape))
        return with_patches(torch.zeros_like(pixel_values), patches, self.patch_shape)

    def sample(self, generator: torch.Generator, count: int = 1, *, std: float = 1.0) -> Tensor:
        """Patches (count, C, height, width) of the nullspace, float64: equation 4 with lambda_i ~ N(0, std^2).

        Raises:
            NoNullspaceError: if the dimension is 0.
        """
        if self.dimension() == 0:
            rank = f"rank {len(self.row_basis)} at the tolerance {self.tolerance:.3g}"
            raise NoNullspaceError(f"theta {tuple(self.weight.shape)} has {rank}: the patch embedding has no nullspace")
        normal = torch.randn(count, self.weight.shape[1], generator=generator, dtype=torch.float64)
        return self.project_patches(std * normal).unflatten(1, self.patch_shape)

    def residual(self, patches: Tensor) -> float:
        """What the model itself sees of ``patches`` (count, C, height, width) that should be invisible.

        The largest ||theta p|| / (s_max ||p||), multiplied in the precision of the model's weights: about the dtype's
        epsilon is rounding, and a random patch has about 1 / sqrt(P) times the spectrum.
        """
        flat = patches.reshape(len(patches), -1).to(self.weight.dtype).cpu()
        seen = torch.linalg.vector_norm((flat @ self.weight.T).double(), dim=1)
        return float((seen / (self.singular_values[0] * torch.linalg.vector_norm(flat.double(), dim=1))).max())

    def in_pixels(self, std: Sequence[float]) -> Self:
        """The same nullspace for changes of pixels in [0, 1], by the ``std`` of the image processor.

        A null patch p becomes ``p * std``. An orthogonal projection does not carry over where std differs by channel,
        so the basis is computed again: its row space is that of theta * diag(1 / std).
        """
        if len(std) != self.patch_shape[0]:
            raise ValueError(f"std {tuple(std)} for patches of {self.patch_shape[0]} channels")
        height, width = self.patch_shape[1:]
        per_number = torch.tensor(std, dtype=torch.float64).repeat_interleave(height * width)
        rows, _ = torch.linalg.qr((self.row_basis / per_number).T)
        weight = (self.weight.double() / per_number).to(self.weight.dtype)
        spectrum = torch.linalg.svdvals(weight.double())
        return type(self)(weight, self.patch_shape, spectrum, rows.T.contiguous(), self.tolerance / min(std))


def default_tolerance(singular_values: Tensor, shape: Sequence[int], stored_dtype: torch.dtype) -> float:
    """Largest singular value that counts as zero, for a weight of ``shape`` (D, P) stored in ``stored_dtype``.

    Storing rounds every weight, which lifts exact zeros of the spectrum. For float32 and float64 the tolerance is the
    usual s_max * max(D, P) * eps of that dtype. In half precision that is as large as s_max; there it is the norm of
    the rounding errors: each weight moves by at most eps / 2 of itself, so that norm is about
    eps / 2 * rms(weight) * (sqrt(D) + sqrt(P)) at most. Real singular values may be smaller: look at the spectrum.
    """
    if not len(singular_values):
        return 0.0
    eps = torch.finfo(stored_dtype).eps
    if eps <= torch.finfo(torch.float32).eps:
        return float(singular_values[0]) * max(shape) * eps
    root_mean_square = float(torch.linalg.vector_norm(singular_values)) / (shape[0] * shape[1]) ** 0.5
    return eps / 2 * root_mean_square * (shape[0] ** 0.5 + shape[1] ** 0.5)


def patches_in_pixels(patches: Tensor, std: Sequence[float]) -> Tensor:
    """Patches or images (..., C, height, width) of normalised numbers as changes of pixels in [0, 1]: p * std."""
    return patches * torch.tensor(std, dtype=patches.dtype, device=patches.device).view(-1, 1, 1)


def split_patches(images: Tensor, patch_shape: tuple[int, int, int]) -> Tensor:
    """Images (B, C, H, W) as patches (B, N, P), row by row, in the order of the embeddings; a rest is left out.

    Raises:
        ValueError: for another number of channels, or images smaller than a patch.
    """
    channels, height, width = patch_shape
    if images.dim() != 4 or images.shape[1] != channels or images.shape[2] < height or images.shape[3] < width:
        raise ValueError(f"images of shape {tuple(images.shape)}; expected (B, {channels}, >={height}, >={width})")
    rows, columns = images.shape[2] // height, images.shape[3] // width
    whole = images[:, :, : rows * height, : columns * width]
    parts = whole.reshape(len(images), channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(len(images), rows * columns, channels * height * width)


def with_patches(images: Tensor, patches: Tensor, patch_shape: tuple[int, int, int]) -> Tensor:
    """A copy of ``images`` (B, C, H, W) with other patches (B, N, P); the rest that is no whole patch stays."""
    channels, height, width = patch_shape
    rows, columns = images.shape[2] // height, images.shape[3] // width
    if patches.shape[1] != rows * columns:
        raise ValueError(f"{patches.shape[1]} patches for an image of {rows} x {columns}")
    parts = patches.reshape(len(patches), rows, columns, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    result = images.clone()
    result[:, :, : rows * height, : columns * width] = parts.flatten(4, 5).flatten(2, 3)
    return result


def join_patches(patches: Tensor, patch_shape: tuple[int, int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`split_patches` for images of ``size`` (H, W); zero beyond the last whole patch."""
    return with_patches(patches.new_zeros(len(patches), patch_shape[0], *size), patches, patch_shape)


def _coarser(weight: Tensor, model: nn.Module) -> torch.dtype:
    """The coarser of the dtypes of the weight and of the model's config."""
    inner = unwrap(model)
    dtypes = [weight.dtype]
    if isinstance(inner, PreTrainedModel) and isinstance(inner.config.dtype, torch.dtype):
        dtypes.append(inner.config.dtype)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
