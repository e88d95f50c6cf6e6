"""A ViT of one layer, and the same written by hand with nothing but tensors: an oracle that shares no code."""

import torch
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from tiny_models import IMAGE, LABELS, SIZES


def one_layer_model():
    """Float64, two heads, with biases and weights that are not small."""
    torch.manual_seed(4)
    model = ViTForImageClassification(ViTConfig(**{**SIZES, "num_hidden_layers": 1}, **IMAGE, **LABELS)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def one_layer_parts(model, pixel_values):
    """Every intermediate of the forward pass by name, in the order of the computation, with its graph."""
    vit, layer, part = model.vit, model.vit.layers[0], {}
    attention, mlp, size = layer.attention, layer.mlp, vit.embeddings.patch_embeddings.patch_size
    size = size if isinstance(size, int) else size[0]
    weight, bias = (getattr(vit.embeddings.patch_embeddings.projection, name).detach() for name in ("weight", "bias"))
    patches = functional.unfold(pixel_values, size, stride=size).transpose(1, 2)
    patches = patches @ weight.flatten(1).T + bias
    tokens = torch.cat([vit.embeddings.cls_token.detach().expand(len(patches), -1, -1), patches], 1)
    part["x"] = (tokens + vit.embeddings.position_embeddings.detach()).requires_grad_()
    part["norm_before"] = layer_norm(part["x"], layer.layernorm_before)
    for name in ("q", "k", "v"):
        part[name] = heads(affine(part["norm_before"], getattr(attention, f"{name}_proj")))
    part["scores"] = part["q"] @ part["k"].transpose(2, 3)
    scaled = torch.exp(part["scores"] / part["q"].shape[-1] ** 0.5)
    part["attention"] = scaled / scaled.sum(-1, keepdim=True)
    part["heads"] = part["attention"] @ part["v"]
    part["joined"] = part["heads"].transpose(1, 2).flatten(2)
    part["attended"] = affine(part["joined"], attention.o_proj)
    part["y"] = part["x"] + part["attended"]
    part["norm_after"] = layer_norm(part["y"], layer.layernorm_after)
    part["hidden"] = functional.gelu(affine(part["norm_after"], mlp.fc1))
    part["mlp"] = affine(part["hidden"], mlp.fc2)
    part["cls"] = layer_norm(part["y"] + part["mlp"], vit.layernorm)[:, 0]
    part["logits"] = affine(part["cls"], model.classifier)
    return part


def heads(features):
    return features.unflatten(-1, (2, -1)).transpose(1, 2)


def affine(features, linear):
    return features @ linear.weight.detach().T + linear.bias.detach()


def layer_norm(features, norm):
    centred = features - features.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight.detach() + norm.bias.detach()
