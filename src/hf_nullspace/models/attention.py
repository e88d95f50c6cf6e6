"""The weights and the maps of every attention layer, per head: the one place that knows where they are.

transformers 5.12 moved them (``encoder.layer.N.attention.attention.query`` became ``layers.N.attention.q_proj``) and
families differ, so a layer is recognised by its three linear maps under one of the known names, never by its path.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from hf_nullspace.models.frozen import frozen
from hf_nullspace.models.patch_embedding import model_type, unwrap

_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_HEADS = ("num_attention_heads", "num_heads")
_PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")

# Families with heads softmax(q k^T / sqrt(d_k) + constant) v and q, k, v affine in the layer's input. Others have not:
# Swinv2 (cosine), DINOv3 (rotary), SegFormer and PVT (keys of a shrunken image), Hiera (pooled queries).
PLAIN_ATTENTION = frozenset(
    {"beit", "clip", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "ijepa", "siglip", "swin", "vit",
     "vit_mae", "vit_msn"}
)  # fmt: skip

_VISIBLE = "hf_nullspace_visible"  # the name of `_visible_attention` in transformers


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
    found = []
    for name, module, projections in _layers(model):
        heads = next((vars(module)[attribute] for attribute in _HEADS if attribute in vars(module)), None)
        if heads is None:
            raise NoAttentionWeightsError(f"{name} ({type(module).__name__}) does not say how many heads it has")
        # a Linear's weight is (heads * d_k, D); Q_i, with q = x Q_i, is the transpose of its i-th block
        matrices = [linear.weight.unflatten(0, (heads, -1)).transpose(1, 2) for linear in projections]
        biases = [
            (linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias).view(heads, -1)
            for linear in projections
        ]
        found.append(AttentionWeights(name, *matrices, *biases))
    return found


@torch.no_grad()
def attention_inputs(model: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """X of every layer, (B, tokens, D), for images ``pixel_values`` (B, C, H, W): the input of Q, K and V.

    Swin's are windows: (B * windows, tokens in a window, D). Raises what :func:`attention_weights` raises.
    """
    queries = [query for _, _, (query, *_) in _layers(model)]
    with recorded(queries) as seen:
        unwrap(model)(pixel_values=pixel_values)  # a compiled model ignores hooks that come later
    return [seen[query][0] for query in queries]


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Input and output of every module in the forward pass inside the block, detached."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = args[0].detach(), output.detach()

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(hook))
        yield seen


@dataclass(frozen=True, eq=False)
class AttentionGradients:
    """The attention maps of a batch, and how the logit of each image's target depends on them."""

    logits: Tensor
    """(B, K)."""
    targets: Tensor
    """(B,), the classes; their logits are differentiated."""
    attentions: list[Tensor]
    """A of every layer, (B, heads, tokens, tokens); a row sums to 1."""
    gradients: list[Tensor]
    """d logits[target] / d A, of the same shapes."""


@torch.no_grad()
def attention_maps(model: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """A of every layer, (B, heads, tokens, tokens), for images ``pixel_values`` (B, C, H, W), in eval mode.

    The softmax is taken in the model's own dtype; transformers' eager attention always takes it in float32. Swin's
    maps are those of windows. Raises what :func:`attention_weights` raises.
    """
    with _watched(model) as seen:
        unwrap(model)(pixel_values=pixel_values)
    return seen


def attention_gradients(
    model: nn.Module, pixel_values: Tensor, targets: Tensor | int | None = None
) -> AttentionGradients:
    """The maps of :func:`attention_maps` and the gradient of one logit per image with respect to them.

    ``targets`` are the classes: (B,), one for all, or unset: what the model predicts. Works on frozen models and
    inside ``torch.no_grad()``; no ``.grad`` is written.

    Raises:
        ValueError: if a target is no class of the model, or their number is not that of the images.
    """
    with torch.inference_mode(False), torch.enable_grad(), _watched(model) as seen:
        images = pixel_values.detach().clone().requires_grad_()  # a graph from here on, if all parameters are frozen
        logits: Tensor = unwrap(model)(pixel_values=images).logits
        classes = _targets(logits, targets)
        gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), seen)
    return AttentionGradients(logits.detach(), classes, [attention.detach() for attention in seen], list(gradients))


def _targets(logits: Tensor, targets: Tensor | int | None) -> Tensor:
    if targets is None:
        return logits.detach().argmax(1)
    classes = torch.as_tensor(targets, device=logits.device)
    classes = classes.expand(len(logits)) if classes.dim() == 0 else classes
    if classes.shape != logits.shape[:1] or classes.is_floating_point():
        raise ValueError(f"targets are {len(logits)} class numbers, one per image; got {targets}")
    if bool(((classes < 0) | (classes >= logits.shape[1])).any()):
        raise ValueError(f"targets {classes.tolist()}: the model has the classes 0 to {logits.shape[1] - 1}")
    return classes.long()


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Every module of ``model`` computes its attention as ``name`` says ("eager" gives weights); as before afterwards.

    ``_attn_implementation`` would also change sub-configurations that no module has.
    """
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention maps of the forward pass inside the block, in eval mode; leaves no trace."""
    inner, layers = unwrap(model), _layers(model)
    seen: list[Tensor] = []
    AttentionInterface.register(_VISIBLE, _visible_attention)
    with frozen(inner), attention_implementation(inner, _VISIBLE), ExitStack() as hooks:
        for _, module, _ in layers:
            hooks.enter_context(module.register_forward_hook(lambda module, args, output: seen.append(output[1])))
        yield seen


def _visible_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention without dropout, with the softmax in the dtype of the scores."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    attention = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (attention @ value).transpose(1, 2).contiguous(), attention


@dataclass(frozen=True, eq=False)
class PreNormLayer:
    """The maps of one layer x -> y = x + output(heads(norm_before(x))), y + second(gelu(first(norm_after(y))))."""

    norm_before: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    norm_after: nn.Module
    first: nn.Linear
    second: nn.Linear


def pre_norm_layers(model: nn.Module) -> tuple[list[PreNormLayer], nn.Linear]:
    """The layers of a ViT, DeiT or ViTMSN, first to last, and its classifier, which reads the CLS token.

    Raises:
        NoAttentionWeightsError: for another model, or other names than those of transformers 5.18 to 5.x.
    """
    inner: Any = unwrap(model)
    try:
        if (kind := model_type(model)) not in ("vit", "deit", "vit_msn"):
            raise AttributeError(f"its model type is {kind}")
        layers = []
        for name, attention, projections in _layers(model):
            layer: Any = inner.get_submodule(name.rpartition(".")[0])
            query, key, value = projections
            before, after, mlp = layer.layernorm_before, layer.layernorm_after, layer.mlp
            layers.append(PreNormLayer(before, query, key, value, attention.o_proj, after, mlp.fc1, mlp.fc2))
        if not isinstance(inner.classifier, nn.Linear):
            raise AttributeError("its classifier is no linear map")
    except AttributeError as error:
        expected = "a ViT, DeiT or ViTMSN of transformers 5.18 to 5.x, with a classifier that reads the CLS token"
        raise NoAttentionWeightsError(f"{type(inner).__name__}: {error}; expected {expected}") from error
    return layers, inner.classifier


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens come before the patches: CLS, DeiT's distillation token, registers; 0 for SigLIP and Swin."""
    count = 0
    for name, parameter in unwrap(model).named_parameters():
        if name.rpartition(".")[2] in _PREFIX_TOKENS:
            count += parameter.shape[-2] if parameter.dim() > 1 else 1
    return count


def _layers(model: nn.Module) -> list[tuple[str, Any, list[nn.Linear]]]:
    """The path of every attention module, the module, and its maps to queries, keys and values."""
    inner, kind = unwrap(model), model_type(model)
    if kind not in PLAIN_ATTENTION:
        known = f"expected softmax(q k^T) v of linear maps, as in {', '.join(sorted(PLAIN_ATTENTION))}"
        raise NoAttentionWeightsError(f"{type(inner).__name__} (model type {kind}) has another attention; {known}")
    found = []
    for name, module in inner.named_modules():
        children = dict(module.named_children())
        for names in _PROJECTIONS:
            linears = [child for each in names if isinstance(child := children.get(each), nn.Linear)]
            if len(linears) == len(names):
                found.append((name, module, linears))
    if not found:
        maps = " or ".join(map("/".join, _PROJECTIONS))
        raise NoAttentionWeightsError(
            f"{type(inner).__name__} of transformers {transformers.__version__} has no linear maps named {maps}. "
            "Known is transformers 5.18 to 5.x; adapters (PEFT) and quantised layers have to be merged first"
        )
    return found
