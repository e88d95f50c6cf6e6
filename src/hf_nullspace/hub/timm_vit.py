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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model under timm's name, with its shape."""
        width, tokens = self.width, (self.image // self.patch) ** 2 + (2 if self.distilled else 1)
        found: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, width),
            "pos_embed": (1, tokens, width),
            "patch_embed.proj.weight": (width, self.channels, self.patch, self.patch),
            "patch_embed.proj.bias": (width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
            "head.weight": (self.classes, width),
            "head.bias": (self.classes,),
        }
        if self.distilled:
            found |= {"dist_token": (1, 1, width), "head_dist.weight": (self.classes, width)}
            found |= {"head_dist.bias": (self.classes,)}
        for layer in range(self.depth):
            start = f"blocks.{layer}"
            found[f"{start}.attn.qkv.weight"] = (3 * width, width)
            if self.qkv_bias:
                found[f"{start}.attn.qkv.bias"] = (3 * width,)
            for part, (rows, *columns) in {
                "norm1": (width,),
                "attn.proj": (width, width),
                "norm2": (width,),
                "mlp.fc1": (self.mlp, width),
                "mlp.fc2": (width, self.mlp),
            }.items():
                found |= {f"{start}.{part}.weight": (rows, *columns), f"{start}.{part}.bias": (rows,)}
        return found


def read_architecture(
    tensors: Mapping[str, Tensor], heads: int | None = None, name: str | None = None
) -> tuple[Architecture, str]:
    """The architecture of the weights, and where the number of heads is from.

    ``name`` (such as "vit_base_patch16_224") has to be true of the shapes. Heads are those given, else those of
    ``name``, else those of timm's ViT of this width.

    Raises:
        CheckpointError: for a model that cannot be expressed, tensors that are missing, too many or of a wrong shape,
            or if nothing says how many heads there are.
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
            f"patches, and a square number of them beside {'CLS and distillation token' if distilled else 'the CLS'}"
            f"{'' if distilled else ' token'}"
        )
    layers = [int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))]
    number, source = _heads(width, heads, name)
    if number < 1 or width % number:
        raise CheckpointError(f"heads={number}: the width {width} is no multiple of that. Give --heads")
    found = Architecture(
        width=width,
        depth=max(layers) + 1,
        heads=number,
        mlp=fc1.shape[0],
        patch=side,
        image=grid * side,
        channels=channels,
        classes=head.shape[0],
        qkv_bias=any(key.endswith(".attn.qkv.bias") for key in tensors),
        distilled=distilled,
    )
    _check_name(found, name)
    _check_shapes(tensors, found.shapes())
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


def _heads(width: int, heads: int | None, name: str | None) -> tuple[int, str]:
    if heads is not None:
        return heads, "as given"
    if name is not None and (match := _NAME.fullmatch(name)):
        return SIZES[match[1]][2], f"those of {name}"
    for size_width, _, size_heads in SIZES.values():
        if size_width == width:
            return size_heads, f"those of timm's ViT of width {width}; no tensor says it"
    raise CheckpointError(
        f"the number of attention heads is in no tensor, and timm has no usual ViT of width {width}: give --heads"
    )


def _check_name(found: Architecture, name: str | None) -> None:
    if name is None:
        return
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"architecture {name!r}: expected a name such as vit_base_patch16_224 or deit_small_distilled_patch16_224 "
            f"({', '.join(SIZES)}). Leave it out: sizes are read from the shapes"
        )
    width, depth, _ = SIZES[match[1]]
    expected = {"width": width, "depth": depth, "patch": int(match[3]), "image": int(match[4])}
    expected["distilled"] = match[2] is not None
    wrong = [
        f"{key} {getattr(found, key)} (not {value})" for key, value in expected.items() if getattr(found, key) != value
    ]
    if wrong:
        raise CheckpointError(f"the weights are not those of {name}: they have {', '.join(wrong)}")


def _check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{key} is missing, expected {shape}" for key, shape in expected.items() if key not in tensors]
    problems += [f"{key} {tuple(value.shape)} is not known" for key, value in tensors.items() if key not in expected]
    for key, shape in expected.items():
        value = tensors.get(key)
        if value is None:
            continue
        if tuple(value.shape) != shape:
            problems.append(f"{key} has the shape {tuple(value.shape)}, expected {shape}")
        elif not value.is_floating_point():
            problems.append(f"{key} holds {value.dtype}, expected floating-point numbers")
        elif not value.isfinite().all():
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"not converted: {'; '.join(problems[:6])}{more}")
