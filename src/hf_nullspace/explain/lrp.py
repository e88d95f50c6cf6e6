"""Layer-wise relevance propagation for ViT and DeiT (Chefer, Gur and Wolf, CVPR 2021: the paper's "LRP").

Relevance starts as 1 at the target's logit and is handed down to the tokens; every rule keeps its sum. On the way
each attention map A gets its share R_A, and the map is the CLS row of the product over layers (the later on the left)
of I + mean over heads of (grad A * R_A)+. LayerNorm, GELU and softmax hand relevance on as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_nullspace.explain.maps import at_least_float32, check_has_cls, on_grid, without_autocast
from hf_nullspace.models.attention import PreNormLayer, attention_gradients, pre_norm_layers, prefix_tokens, recorded

Seen = dict[nn.Module, tuple[Tensor, Tensor]]
"""Input and output of modules."""


@dataclass(frozen=True, eq=False)
class Relevance:
    """How much of the target's logit every token and every attention weight accounts for; layers first to last."""

    tokens: list[Tensor]
    """(B, tokens, D), at the input of every layer: the first is that of the embeddings. The sum is 1 per image."""
    attentions: list[Tensor]
    """R_A, (B, heads, tokens, tokens). The sum is that of the layer's value matrix, and half of the heads'."""
    gradients: list[Tensor]
    """grad A, of the same shapes."""


def lrp_map(model: nn.Module, pixel_values: Tensor, targets: Tensor | int | None = None) -> Tensor:
    """The map (B, h, w), at least 0, of images ``pixel_values`` (B, C, H, W).

    ``targets`` are the classes that are explained, (B,) or one for all; unset: what the model predicts.

    The rules divide by sums that nearly cancel, so the map of an image can move far when the image hardly does, even by
    rounding to 8 bits (docs/saliency.md).

    Raises:
        NoClsTokenError, NoAttentionWeightsError: for a model that is no ViT, DeiT or ViTMSN with one classifier.
        ValueError: if targets are no classes of the model.
    """
    found = propagate_relevance(model, pixel_values, targets)
    size = found.attentions[0].shape[-1]
    identity = torch.eye(size, dtype=found.attentions[0].dtype, device=found.attentions[0].device)
    joint = identity[None]
    with without_autocast(pixel_values):
        for relevance, gradient in zip(found.attentions, found.gradients, strict=True):
            joint = (identity + (gradient * relevance).relu().mean(1)) @ joint
    return on_grid(model, pixel_values, joint[:, 0, prefix_tokens(model) :])


@torch.no_grad()
def propagate_relevance(model: nn.Module, pixel_values: Tensor, targets: Tensor | int | None = None) -> Relevance:
    """Relevance of all tokens and attention maps for one logit per image; arguments and errors as :func:`lrp_map`."""
    check_has_cls(model)
    layers, classifier = pre_norm_layers(model)
    with recorded([*(module for layer in layers for module in vars(layer).values()), classifier]) as seen:
        found = attention_gradients(model, pixel_values, targets)
    exact = {module: (at_least_float32(one), at_least_float32(other)) for module, (one, other) in seen.items()}
    one_hot = at_least_float32(torch.zeros_like(found.logits)).scatter_(1, found.targets[:, None], 1)
    relevance = torch.zeros_like(exact[layers[-1].second][1])
    tokens: list[Tensor] = []
    attentions: list[Tensor] = []
    with without_autocast(pixel_values):
        relevance[:, 0] = linear_rule(exact[classifier][0], classifier.weight, one_hot)
        for layer, attention in zip(reversed(layers), reversed(found.attentions), strict=True):
            relevance, of_attention = _through_layer(layer, exact, at_least_float32(attention), relevance)
            tokens.insert(0, relevance)
            attentions.insert(0, of_attention)
    return Relevance(tokens, attentions, [at_least_float32(one) for one in found.gradients])


def _through_layer(layer: PreNormLayer, seen: Seen, attention: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """From the relevance of a layer's output (B, tokens, D) to that of its input, and R_A."""
    skipped, branch = sum_rule(seen[layer.norm_after][0], seen[layer.second][1], relevance)
    branch = linear_rule(seen[layer.second][0], layer.second.weight, branch)
    relevance = skipped + linear_rule(seen[layer.first][0], layer.first.weight, branch)

    skipped, branch = sum_rule(seen[layer.norm_before][0], seen[layer.output][1], relevance)
    branch = linear_rule(seen[layer.output][0], layer.output.weight, branch)
    heads = attention.shape[1]
    query, key, value = (_by_head(seen[linear][1], heads) for linear in (layer.query, layer.key, layer.value))
    of_attention, of_value = product_rule(attention, value, _by_head(branch, heads))
    of_query, of_key = product_rule(query, key.transpose(2, 3), of_attention)
    for linear, part in ((layer.query, of_query), (layer.key, of_key.transpose(2, 3)), (layer.value, of_value)):
        skipped = skipped + linear_rule(seen[linear][0], linear.weight, part.transpose(1, 2).flatten(2))
    return skipped, of_attention


def linear_rule(inputs: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of the ``inputs`` (..., in) of a linear map from that of its output (..., out); no share for the bias.

    Only what pulls in the same direction counts: S = R / (x+ W+^T + x- W-^T), R <- x+ * (S W+) + x- * (S W-).
    """
    weight = weight.detach().to(inputs.dtype)
    ups, downs = weight.clamp(min=0), weight.clamp(max=0)
    highs, lows = inputs.clamp(min=0), inputs.clamp(max=0)
    share = safe_divide(relevance, highs @ ups.T + lows @ downs.T)
    return highs * (share @ ups) + lows * (share @ downs)


def sum_rule(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the two terms of a residual sum (B, tokens, D), a * R / (a + b) and b * R / (a + b), rescaled.

    Opposite terms get huge shares that cancel, so each term's total becomes its part |sum a| / (|sum a| + |sum b|) of
    R's, per image.
    """
    share = safe_divide(relevance, first + second)
    terms = first * share, second * share
    totals = [term.sum((1, 2), keepdim=True) for term in terms]
    size = totals[0].abs() + totals[1].abs()
    whole = relevance.sum((1, 2), keepdim=True)
    one, other = (
        term * safe_divide(safe_divide(total.abs(), size) * whole, total)
        for term, total in zip(terms, totals, strict=True)
    )
    return one, other


def product_rule(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of both factors of a matrix product, half each: S = R / (A B), A * (S B^T) / 2, B * (A^T S) / 2."""
    share = safe_divide(relevance, first @ second)
    return first * (share @ second.transpose(-1, -2)) / 2, second * (first.transpose(-1, -2) @ share) / 2


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is 0."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)


def _by_head(features: Tensor, heads: int) -> Tensor:
    """(B, tokens, heads * d) -> (B, heads, tokens, d)."""
    return features.unflatten(-1, (heads, -1)).transpose(1, 2)
