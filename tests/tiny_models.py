"""Tiny random image classifiers of every family, built from a config; nothing is downloaded."""

import numpy as np
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 4}
LABELS = {"id2label": {i: f"class {i}" for i in range(5)}, "label2id": {f"class {i}": i for i in range(5)}}

_TEXT = {**SIZES, "vocab_size": 8, "max_position_embeddings": 4}
_BUILDERS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, **LABELS)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SIZES, **IMAGE, **LABELS)),
    "beit": lambda: BeitForImageClassification(
        BeitConfig(**SIZES, **IMAGE, **LABELS, use_absolute_position_embeddings=True)
    ),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, **IMAGE, **LABELS, mlp_ratio=2)),
    "vit_msn": lambda: ViTMSNForImageClassification(ViTMSNConfig(**SIZES, **IMAGE, **LABELS)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(**LABELS, image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
    "siglip": lambda: SiglipForImageClassification(
        SiglipConfig(text_config=_TEXT, vision_config={**SIZES, **IMAGE}, **LABELS)
    ),
    "clip": lambda: CLIPForImageClassification(
        CLIPConfig(text_config=_TEXT, vision_config={**SIZES, **IMAGE}, projection_dim=24, **LABELS)
    ),
}
FAMILIES = tuple(_BUILDERS)
_BUILDERS["dinov2_with_registers"] = lambda: Dinov2WithRegistersForImageClassification(
    Dinov2WithRegistersConfig(**SIZES, **IMAGE, **LABELS, mlp_ratio=2, num_register_tokens=3)
)


def tiny_model(family: str = "vit", seed: int = 0) -> torch.nn.Module:
    """A random classifier of 16 px images into 5 classes, with weights large enough for logits that differ."""
    torch.manual_seed(seed)
    model = _BUILDERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers, drawn from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The cosine of the angle between two tensors of one shape."""
    return torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item()


def tiny_resnet() -> torch.nn.Module:
    """A classifier that is not a ViT."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], **LABELS)
    ).eval()


def uniform(*shape, seed=0):
    """Numbers in [0, 1), float64."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(count=3, dtype=torch.float64):
    """``pixel_values`` of the tiny models."""
    return normal(count, 3, 16, 16, seed=1).to(dtype)


def numpy_patches(pixels):
    """Images (..., 16, 16, 3) as patches (..., 16, 48), in the order of the embeddings, by NumPy."""
    shape = np.shape(pixels)[:-3]
    first = len(shape)
    parts = np.reshape(pixels, (*shape, 4, 4, 4, 4, 3))
    order = (first + axis for axis in (0, 2, 4, 1, 3))
    return parts.transpose(*range(first), *order).reshape(*shape, 16, 48)


def numpy_projection(model):
    """theta (24, 48) and the bias (24,) of a tiny ViT or DeiT, float64."""
    projection = getattr(model, model.config.model_type).embeddings.patch_embeddings.projection
    return projection.weight.detach().double().numpy().reshape(24, 48), projection.bias.detach().double().numpy()
