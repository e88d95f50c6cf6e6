"""The exact nullspace of a pre-LayerNorm encoder: one constant per token (not in the paper).

Every branch of such an encoder reads the residual stream through a LayerNorm, and so does the classifier. LayerNorm
subtracts the mean over the D features, so c_n added to all features of token n changes nothing, at any size. The
encoder-level nullspace (equation 5) therefore contains the N-dimensional space { c_n * ones(D) }; the proof is in
docs/layer_norm_direction.md. A model is asked, not assumed, to be of that kind: BatchNorm and GroupNorm break it.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_nullspace.models.frozen import frozen
from hf_nullspace.models.patch_embedding import (
    PatchEmbeddingNoise,
    embeddings_inside,
    find_patch_embedding,
    patches_and_features,
    unwrap,
)

# Share of the control's effect up to which a change counts as rounding: about 1e-13 in float64, and up to 1e-7 where
# attention computes its softmax in float32 (transformers' "eager").
ROUNDING = 1e-6


class NotANullspaceError(ValueError):
    """A constant per token changes what this model answers."""


@dataclass(frozen=True)
class DirectionCheck:
    """What one constant per token did to the logits, beside a control of the same norm without token means."""

    norm: float
    """Euclidean norm of the noise (1, N, D), and of the control."""
    logit_change: float
    """Largest absolute change of a logit by the constants."""
    control_change: float
    """The same by the control, a random noise in the complement."""
    largest_logit: float
    """Largest absolute logit without noise, to compare with."""

    @property
    def is_rounding(self) -> bool:
        """Whether the change by the constants is as small as rounding in float64 (``ROUNDING``)."""
        return self.logit_change <= ROUNDING * self.control_change


@dataclass(frozen=True)
class LayerNormNullspace:
    """The space { c_n * ones(D) } of noises (1, N, D) on the patch embeddings, with the check that was passed."""

    patches: int
    """N."""
    features: int
    """D."""
    check: DirectionCheck

    @property
    def dimension(self) -> int:
        """N: one constant for each patch token."""
        return self.patches

    def sample(self, generator: torch.Generator, norm: float = 1.0) -> Tensor:
        """A noise (1, N, D) of this space with that Euclidean norm, in a uniformly random direction; float64."""
        return _constants(self.patches, self.features, generator, norm)


def exact_encoder_nullspace(
    model: nn.Module,
    pixel_values: Tensor,
    *,
    patch_embedding: nn.Module | None = None,
    norm: float = 1000.0,
    seed: int = 0,
) -> LayerNormNullspace:
    """The LayerNorm direction, verified on ``pixel_values`` (B, C, H, W) on a float64 copy of the model.

    Args:
        patch_embedding: where the noise is added; needed for models with patches that overlap.
        norm: of the noise that is tried. The statement holds for every size.
        seed: of the constants and the control.

    Raises:
        NotANullspaceError: if the logits change, with the size of the change.
        NotAViTError: if the model has no patch embedding and none is given.
    """
    inner = unwrap(model)
    module = patch_embedding if patch_embedding is not None else find_patch_embedding(inner)
    if all(part is not module for part in inner.modules()):
        raise ValueError(f"the patch embedding {type(module).__name__} is no part of {type(inner).__name__}")
    double, module = copy.deepcopy((inner, module))
    double.double().eval()
    images = pixel_values.to(next(double.parameters()).device, torch.float64)
    patches, features = _embedding_size(double, images, module)
    check = check_direction(double, images, patch_embedding=module, norm=norm, seed=seed)
    if not check.control_change:
        name = type(inner).__name__
        raise NotANullspaceError(f"no noise of norm {norm:g} changes a logit of {name}: there is nothing to verify")
    if not check.is_rounding:
        raise NotANullspaceError(
            f"{type(inner).__name__}: one constant per token, of norm {norm:g}, changes the logits by "
            f"{check.logit_change:.3g} in float64 (random noise of that norm: {check.control_change:.3g}). Not every "
            "branch reads the tokens through a LayerNorm: GroupNorm, BatchNorm and RMSNorm do not remove the mean"
        )
    return LayerNormNullspace(patches, features, check)


@torch.no_grad()
def check_direction(
    model: nn.Module,
    pixel_values: Tensor,
    *,
    patch_embedding: nn.Module | None = None,
    norm: float = 1000.0,
    seed: int = 0,
) -> DirectionCheck:
    """Add one constant per token, and a control of the same ``norm``, in the model's own precision; in eval mode.

    ``pixel_values`` are (B, C, H, W). In float32 expect changes of about norm * 1e-7 relative to the embeddings, not 0.
    """
    model = unwrap(model)  # a compiled model ignores hooks that come later
    parameter = next(model.parameters())
    images = pixel_values.to(parameter.device, parameter.dtype)
    hook = PatchEmbeddingNoise(model, patch_embedding)
    try:
        with frozen(model):
            patches, features = _embedding_size(model, images, hook.module)
            generator = torch.Generator().manual_seed(seed)
            constants = _constants(patches, features, generator, norm)
            control = torch.randn(1, patches, features, generator=generator, dtype=torch.float64)
            control -= control.mean(-1, keepdim=True)
            control *= norm / torch.linalg.vector_norm(control)
            clean = _logits(model, images)
            with hook.adding(constants):
                shifted = _logits(model, images)
            with hook.adding(control):
                controlled = _logits(model, images)
    finally:
        hook.remove()
    return DirectionCheck(
        norm=norm,
        logit_change=float((shifted - clean).abs().max()),
        control_change=float((controlled - clean).abs().max()),
        largest_logit=float(clean.abs().max()),
    )


def _constants(patches: int, features: int, generator: torch.Generator, norm: float) -> Tensor:
    constants = torch.randn(1, patches, 1, generator=generator, dtype=torch.float64)
    constants *= norm / (torch.linalg.vector_norm(constants) * features**0.5)
    return constants.expand(1, patches, features).clone()


def _logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    return model(pixel_values=pixel_values).logits.double()


@torch.no_grad()
def _embedding_size(model: nn.Module, pixel_values: Tensor, module: nn.Module) -> tuple[int, int]:
    """N and D, seen from inside the model, so that patches that overlap have them too."""
    with embeddings_inside(module) as seen:
        model(pixel_values=pixel_values[:1])
    return patches_and_features(seen[0])
