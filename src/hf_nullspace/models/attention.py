"""The query, key and value weights of every attention layer, per head: the one place that knows where they are.

transformers moved them in 5.12 (``encoder.layer.N.attention.attention.query`` became ``layers.N.attention.q_proj``) and
families differ, so a layer is recognised by what it holds, three linear maps under one of the known names, and
never by its path.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_nullspace.models.patch_embedding import unwrap

_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_HEADS = ("num_attention_heads", "num_heads")
_PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")

# Families whose heads are softmax(q k^T / sqrt(d_k) + constant) v with q, k, v affine in the layer's input. Not so:
# Swinv2 (cosine), DINOv3 (rotary), SegFormer and PVT (keys of a shrunken image), Hiera (pooled queries).
PLAIN_ATTENTION = frozenset(
    {"beit", "clip", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "ijepa", "siglip", "swin", "vit",
     "vit_mae", "vit_msn"}
)  # fmt: skip


class NoAttentionWeightsError(ValueError):
    """The model's attention is of a kind that this package has no weights of."""


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One attention layer as the paper writes it: head_i(X) = softmax((X Q_i + b)(X K_i + b)^T s)(X V_i + b)."""

    name: str
    """Path of the module in the model, for messages and plots."""
    query: Tensor
    """Q, (heads, D, d_k)."""
    key: Tensor
    """K, (heads, D, d_k)."""
    value: Tensor
    """V, (heads, D, d_k)."""
    query_bias: Tensor
    """(heads, d_k); zero where the layer has none, as the two below."""
    key_bias: Tensor
    value_bias: Tensor

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    @property
    def features(self) -> int:
        """D."""
        return self.query.shape[1]

    @property
    def scaling(self) -> float:
        """s = 1 / sqrt(d_k)."""
        return self.query.shape[2] ** -0.5

    def double(self) -> "AttentionWeights":
        """The same in float64, on the CPU."""
        tensors = (self.query, self.key, self.value, self.query_bias, self.key_bias, self.value_bias)
        return AttentionWeights(self.name, *(tensor.detach().cpu().double() for tensor in tensors))


def attention_weights(model: nn.Module) -> list[AttentionWeights]:
    """The weights of every attention layer, from the first to the last, in the model's own dtype (no copies).

    Raises:
        NoAttentionWeightsError: for another kind of attention than ``PLAIN_ATTENTION``'s, or other names inside it.
    """
    return [_weights(name, module, projections) for name, module, projections in _layers(model)]


@torch.no_grad()
def attention_inputs(model: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """X of every layer, (B, tokens, D), for images ``pixel_values`` (B, C, H, W): what Q, K and V are applied to.

    In a pre-LayerNorm model that is after the LayerNorm. Swin's are windows: (B * windows, tokens in a window, D).

    Raises:
        NoAttentionWeightsError: as :func:`attention_weights`.
    """
    seen: list[Tensor] = []
    handles = [
        getattr(module, projections[0]).register_forward_pre_hook(lambda linear, args: seen.append(args[0].detach()))
        for _, module, projections in _layers(model)
    ]
    try:
        unwrap(model)(pixel_values=pixel_values)  # a compiled model ignores hooks that come later
    finally:
        for handle in handles:
            handle.remove()
    return seen


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens stand before the patches: CLS, DeiT's distillation token, registers; 0 for SigLIP and Swin."""
    count = 0
    for name, parameter in unwrap(model).named_parameters():
        if name.rpartition(".")[2] in _PREFIX_TOKENS:
            count += parameter.shape[-2] if parameter.dim() > 1 else 1
    return count


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, tuple[str, str, str]]]:
    inner = unwrap(model)
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    if kind not in PLAIN_ATTENTION:
        raise NoAttentionWeightsError(
            f"{type(inner).__name__} (model type {kind}): its attention is not known to be softmax(q k^T) v of linear "
            f"maps of the layer's input; known are {', '.join(sorted(PLAIN_ATTENTION))}"
        )
    found = [
        (name, module, projections)
        for name, module in inner.named_modules()
        for projections in _PROJECTIONS
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in projections)
    ]
    if not found:
        import transformers

        raise NoAttentionWeightsError(
            f"{type(inner).__name__} of transformers {transformers.__version__} has no attention module with linear "
            f"maps named {' or '.join('/'.join(names) for names in _PROJECTIONS)}. This package knows transformers "
            "5.18 to 5.x; adapters (PEFT) and quantised layers have to be merged first"
        )
    return found


def _weights(name: str, module: nn.Module, projections: tuple[str, str, str]) -> AttentionWeights:
    heads = next((getattr(module, attribute) for attribute in _HEADS if hasattr(module, attribute)), None)
    if heads is None:
        raise NoAttentionWeightsError(f"{name} ({type(module).__name__}) does not say how many heads it has")
    linears: list[Any] = [getattr(module, part) for part in projections]
    # a Linear's weight is (heads * d_k, D); Q_i, with q = x Q_i, is the transpose of its i-th block
    matrices = [linear.weight.unflatten(0, (heads, -1)).transpose(1, 2) for linear in linears]
    biases = [
        (linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)).view(heads, -1)
        for linear in linears
    ]
    return AttentionWeights(name, *matrices, *biases)
