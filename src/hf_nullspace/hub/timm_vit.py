"""What a ViT of timm is, read from the shapes of its tensors; what transformers cannot express is refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_nullspace.hub.checkpoint_files import CheckpointError

# timm's and DeiT's sizes: width, depth, heads.
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
    "gigantic": (1664, 48, 16),
}
_NAME = re.compile(rf"(?:vit|deit)_({'|'.join(SIZES)})_(distilled_)?patch(\d+)_(\d+)(?:\.\w+)?")

# Parts of keys that mean a model of another kind, and why it is refused.
_REFUSED = {
    r"(^|\.)(vit|deit)\.(embeddings|encoder|layers|layernorm)\.": "is transformers' own: load it as it is",
    r"\.ls[12]\.gamma$|\.gamma_[12]$": "is a layer scale (CaiT, DeiT-III), which ViTForImageClassification has not",
    r"^norm_pre\.": "is a LayerNorm before the first block (CLIP's ViTs), which ViTForImageClassification has not",
    r"^fc_norm\.": "belongs to global average pooling; ViTForImageClassification classifies the CLS token",
    r"^attn_pool\.": "belongs to attention pooling; ViTForImageClassification classifies the CLS token",
    r"^patch_embed\.norm\.": "is a LayerNorm of the patch embedding, which ViTForImageClassification has not",
    r"^patch_embed\.backbone\.": "is a hybrid's convolutional stem, which ViTForImageClassification has not",
    r"^reg_token$": "are register tokens, which ViTForImageClassification has not",
    r"^pre_logits\.": "is a layer between the CLS token and the head, which ViTForImageClassification has not",
    r"\.attn\.[qk]_norm\.": "normalises queries or keys, which ViTForImageClassification does not",
    r"\.attn\.(scale_)?norm\.|\.mlp\.norm\.": "is a LayerNorm inside a layer, which ViTForImageClassification has not",
    r"rel_pos|relative_position|\.attn\.[qv]_bias$": "is BEiT's or a relative position's; this converts plain ViTs",
}


@dataclass(frozen=True)
class Architecture:
    """What timm's constructor was given. ``image`` and ``patch`` are sides in pixels, ``mlp`` a layer's inner width."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    image: int
    channels: int
    classes: int
    qkv_bias: bool
    distilled: bool


def read_architecture(
    tensors: Mapping[str, Tensor], heads: int | None = None, name: str | None = None
) -> tuple[Architecture, str]:
    """The architecture of the weights, and where the number of heads is from.

    ``name`` (such as "vit_base_patch16_224") has to be true of the shapes. Heads are those given, else those of
    ``name``, else those of timm's ViT of this width.

    Raises:
        CheckpointError: for a model that transformers cannot express, if a tensor that shows the sizes is missing, or
            if nothing says how many heads there are.
    """
    for key in tensors:
        for pattern, reason in _REFUSED.items():
            if re.search(pattern, key):
                raise CheckpointError(f"not converted: {key} {reason}")
    patch = _tensor(tensors, "patch_embed.proj.weight", 4)
    position = _tensor(tensors, "pos_embed", 3)
    _tensor(tensors, "cls_token", 3, "a model without a CLS token pools its patches, ViTForImageClassification cannot")
    head = _tensor(tensors, "head.weight", 2, "without a classifier there is nothing to measure")
    fc1 = _tensor(tensors, "blocks.0.mlp.fc1.weight", 2)
    width, channels, side, other_side = patch.shape
    distilled = "dist_token" in tensors
    patches = position.shape[1] - (2 if distilled else 1)
    grid = math.isqrt(max(patches, 0))
    if side != other_side or grid * grid != patches or grid == 0:
        raise CheckpointError(
            f"patch_embed.proj.weight {tuple(patch.shape)} and pos_embed {tuple(position.shape)}: expected square "
            "patches, and a square number of them beside "
            f"{'CLS and distillation token' if distilled else 'the CLS token'}"
        )
    named = {} if name is None else _sizes_of(name)
    heads, source = _heads(width, heads, name, named)
    found = Architecture(
        width=width,
        depth=1 + max(int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))),
        heads=heads,
        mlp=fc1.shape[0],
        patch=side,
        image=grid * side,
        channels=channels,
        classes=head.shape[0],
        qkv_bias=any(key.endswith(".attn.qkv.bias") for key in tensors),
        distilled=distilled,
    )
    has = vars(found)
    wrong = [f"{key} {has[key]} (not {value})" for key, value in named.items() if has[key] != value and key != "heads"]
    if wrong:
        raise CheckpointError(f"the weights are not those of {name}: they have {', '.join(wrong)}")
    return found, source


def _tensor(tensors: Mapping[str, Tensor], key: str, dimensions: int, why: str = "") -> Tensor:
    tensor = tensors.get(key)
    if tensor is None:
        raise CheckpointError(
            f"there is no {key}{f' ({why})' if why else ''}; expected a ViT with timm's names (cls_token, pos_embed, "
            f"patch_embed.proj, blocks.0 ..., norm, head). The file begins with {', '.join(list(tensors)[:4])}"
        )
    if tensor.dim() != dimensions:
        raise CheckpointError(f"{key} has the shape {tuple(tensor.shape)}; expected {dimensions} dimensions")
    return tensor


def _sizes_of(name: str) -> dict[str, int]:
    """What timm's name of a model says of its :class:`Architecture`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"architecture {name!r}: expected a name such as vit_base_patch16_224 or deit_small_distilled_patch16_224 "
            f"({', '.join(SIZES)}). Leave it out: sizes are read from the shapes"
        )
    size, distilled, patch, image = match.groups()
    width, depth, heads = SIZES[size]
    sizes = {"width": width, "depth": depth, "patch": int(patch), "image": int(image)}
    return sizes | {"distilled": distilled is not None, "heads": heads}


def _heads(width: int, given: int | None, name: str | None, named: Mapping[str, int]) -> tuple[int, str]:
    """The number of heads, and where it is from."""
    usual = {size_width: size_heads for size_width, _, size_heads in SIZES.values()}
    if given is not None:
        number, source = given, "as given"
    elif named:
        number, source = named["heads"], f"those of {name}"
    elif width in usual:
        number, source = usual[width], f"those of timm's ViT of width {width}; no tensor says it"
    else:
        raise CheckpointError(
            f"the number of attention heads is in no tensor, and timm has no usual ViT of width {width}: give --heads"
        )
    if number < 1 or width % number:
        raise CheckpointError(f"heads={number}: the width {width} is no multiple of that. Give --heads")
    return number, source
