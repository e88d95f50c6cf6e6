"""A ViT as timm writes it, twice: weights under timm's names, and the forward pass in plain torch functions."""

import argparse

import torch
from torch.nn import functional as F

# Two layers of width 24, four heads, patches of 4 in images of 16: seventeen tokens.
WIDTH, DEPTH, HEADS, MLP, PATCH, IMAGE, CLASSES = 24, 2, 4, 40, 4, 16, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_weights(
    seed=0, *, width=WIDTH, depth=DEPTH, mlp=MLP, patch=PATCH, image=IMAGE, classes=CLASSES, qkv_bias=True,
    distilled=False, std=0.2,
):  # fmt: skip
    """A random state dict with the names and shapes of timm's ``VisionTransformer`` or its distilled DeiT."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, around=0.0):
        return around + std * torch.randn(*shape, generator=generator)

    tokens = (image // patch) ** 2 + (2 if distilled else 1)
    found = {"cls_token": draw(1, 1, width)}
    if distilled:
        found["dist_token"] = draw(1, 1, width)
    found["pos_embed"] = draw(1, tokens, width)
    found["patch_embed.proj.weight"] = draw(width, 3, patch, patch)
    found["patch_embed.proj.bias"] = draw(width)
    for layer in range(depth):
        block = {
            "norm1.weight": draw(width, around=1), "norm1.bias": draw(width),
            "attn.qkv.weight": draw(3 * width, width), "attn.qkv.bias": draw(3 * width),
            "attn.proj.weight": draw(width, width), "attn.proj.bias": draw(width),
            "norm2.weight": draw(width, around=1), "norm2.bias": draw(width),
            "mlp.fc1.weight": draw(mlp, width), "mlp.fc1.bias": draw(mlp),
            "mlp.fc2.weight": draw(width, mlp), "mlp.fc2.bias": draw(width),
        }  # fmt: skip
        if not qkv_bias:
            del block["attn.qkv.bias"]
        found |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    found |= {"norm.weight": draw(width, around=1), "norm.bias": draw(width)}
    found |= {"head.weight": draw(classes, width), "head.bias": draw(classes)}
    if distilled:
        found |= {"head_dist.weight": draw(classes, width), "head_dist.bias": draw(classes)}
    return found


def timm_logits(weights, pixel_values, heads=HEADS, eps=1e-6):
    """timm's forward pass: fused q, k, v; LayerNorm before each branch; the exact GELU; the CLS token is classified."""
    w, batch = weights, len(pixel_values)
    patch = w["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixel_values, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    prefix = [w[name].expand(batch, -1, -1) for name in ("cls_token", "dist_token") if name in w]
    x = torch.cat([*prefix, x], dim=1) + w["pos_embed"]
    width = x.shape[-1]

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    for layer in range(sum(key.endswith(".norm1.weight") for key in w)):
        block = f"blocks.{layer}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).reshape(batch, -1, width), f"{block}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(inner, f"{block}.mlp.fc2")
    x = norm(x, "norm")
    logits = linear(x[:, 0], "head")
    return (logits + linear(x[:, 1], "head_dist")) / 2 if "head_dist.weight" in w else logits


def easyrobust(weights, mean=MEAN, std=STD, prefix=""):
    """As ``nn.Sequential(normalisation, model)`` names its tensors."""
    wrapped = {"0.mean": torch.tensor(mean), "0.std": torch.tensor(std)}
    wrapped |= {f"1.{key}": value for key, value in weights.items()}
    return {prefix + key: value for key, value in wrapped.items()}


def training_checkpoint(weights, averaged=None, **more):
    """What timm's training script saves: an optimizer's state and the command line's Namespace beside the weights."""
    parameter = next(iter(weights.values()))
    moments = {"step": 3, "exp_avg": torch.zeros_like(parameter)}
    content = {
        "epoch": 299,
        "arch": "vit_base_patch16_224",
        "state_dict": weights,
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]},
        "version": 2,
        "args": argparse.Namespace(model="vit_base_patch16_224", mean=None, lr=0.001, opt_betas=[0.9, 0.99]),
        "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "metric": 81.38,
        **more,
    }
    if averaged is not None:
        content["state_dict_ema"] = averaged
    return content
