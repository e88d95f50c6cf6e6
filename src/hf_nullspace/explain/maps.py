"""Where a ViT looks, from its attention: raw attention, rollout, Grad-CAM, generic relevance.

A map has one number per patch, (B, h, w), at least 0 and on a scale of its own: compare maps by :func:`correlation`.
The functions of ``MAPS`` are the definitions, on attention maps A (B, heads, tokens, tokens) of every layer and their
gradients; :func:`saliency_maps` reads those from a model. Tokens that are no patches (CLS, DeiT's distillation token,
registers) come first and are dropped from the map.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_nullspace.models.attention import attention_gradients, attention_maps, prefix_tokens
from hf_nullspace.models.patch_embedding import embedding_shape, model_type, unwrap

# Families with a CLS token that the classifier reads.
CLS_FAMILIES = frozenset({"deit", "dinov2", "dinov2_with_registers", "vit", "vit_msn"})

Layers = Sequence[Tensor]


class NoClsTokenError(ValueError):
    """The classifier does not read a CLS token, so there is no row of the attention to make a map of."""


def raw_attention(attentions: Layers, gradients: Layers, prefix: int) -> Tensor:
    """Attention from CLS to the patches (B, N) in the last layer, mean over heads."""
    return attentions[-1].mean(1)[:, 0, prefix:]


def rollout(attentions: Layers, gradients: Layers, prefix: int) -> Tensor:
    """The CLS row (B, N) of the product over layers, the later on the left, of mean_h A + I with rows of sum 1.

    Abnar & Zuidema, ACL 2020.
    """
    joint = _identity(attentions)
    for attention in attentions:
        mixed = attention.mean(1) + _identity(attentions)
        joint = mixed / mixed.sum(-1, keepdim=True) @ joint
    return joint[:, 0, prefix:]


def grad_cam(attentions: Layers, gradients: Layers, prefix: int) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) on the last layer's attention from CLS to the patches, (B, N).

    Each head's row is weighted with the mean of its gradient over the patches; mean over heads, ReLU.
    """
    rows, weights = attentions[-1][:, :, 0, prefix:], gradients[-1][:, :, 0, prefix:].mean(-1, keepdim=True)
    return (rows * weights).mean(1).relu()


def generic_relevance(attentions: Layers, gradients: Layers, prefix: int) -> Tensor:
    """Chefer et al., ICCV 2021: R_0 = I, R <- R + mean_h (grad A * A)+ R, layer by layer; its CLS row, (B, N)."""
    relevance = _identity(attentions)
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (gradient * attention).relu().mean(1) @ relevance
    return relevance[:, 0, prefix:]


MAPS: dict[str, Callable[[Layers, Layers, int], Tensor]] = {
    "raw": raw_attention,
    "rollout": rollout,
    "grad_cam": grad_cam,
    "generic": generic_relevance,
}
WITHOUT_GRADIENT = frozenset({"raw", "rollout"})


def saliency_maps(
    model: nn.Module, pixel_values: Tensor, methods: Sequence[str] = tuple(MAPS), targets: Tensor | int | None = None
) -> dict[str, Tensor]:
    """Maps (B, h, w) of images ``pixel_values`` (B, C, H, W) by every method of ``methods``, in one pass.

    ``targets`` are the classes that are explained, (B,) or one for all; unset: what the model predicts. Raw attention
    and rollout are the same for every class. The model is left as it was. Maps are in the model's dtype, float32 where
    that is half precision.

    Raises:
        NoClsTokenError: if the model's classifier reads no CLS token (BEiT, Swin, SigLIP).
        ValueError: for an unknown method, or targets that are no classes.
    """
    unknown = [name for name in methods if name not in MAPS]
    if unknown or not methods:
        raise ValueError(f"methods {list(methods)}: expected some of {', '.join(MAPS)}")
    check_has_cls(model)
    gradients: list[Tensor] = []
    if targets is None and WITHOUT_GRADIENT.issuperset(methods):
        attentions = attention_maps(model, pixel_values)
    else:
        found = attention_gradients(model, pixel_values, targets)
        attentions, gradients = found.attentions, found.gradients
    layers = [at_least_float32(one) for one in attentions], [at_least_float32(one) for one in gradients]
    with without_autocast(pixel_values):
        rows = {name: MAPS[name](*layers, prefix_tokens(model)) for name in methods}
    return {name: on_grid(model, pixel_values, one) for name, one in rows.items()}


def check_has_cls(model: nn.Module) -> None:
    """Raise ``NoClsTokenError`` unless the model is of ``CLS_FAMILIES``."""
    if (kind := model_type(model)) not in CLS_FAMILIES:
        raise NoClsTokenError(
            f"{type(unwrap(model)).__name__} (model type {kind}) is not known to classify by a CLS token, and the "
            f"maps are its row of the attention; known are {', '.join(sorted(CLS_FAMILIES))}"
        )


def on_grid(model: nn.Module, pixel_values: Tensor, rows: Tensor) -> Tensor:
    """One number per patch (B, N) on the grid of the patches, (B, h, w)."""
    return rows.unflatten(1, embedding_shape(model, pixel_values).grid)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> torch.autocast:
    """For products of maps inside a caller's ``torch.autocast``, which would take them in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Pearson correlation (B,), in [-1, 1], of maps (B, h, w) with others (B or 1, h, w); nan for a constant map."""
    first, second = (one.flatten(1).double() - one.flatten(1).double().mean(1, keepdim=True) for one in (maps, others))
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


def _identity(attentions: Layers) -> Tensor:
    return torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)[None]
