"""The method in plain PyTorch, for comparison: no hook, no Trainer; of the package only the start of a noise."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softmax

from hf_nullspace.noise.algorithm1 import NoiseSettings, start_noise
from tiny_models import tiny_model


def logits_of(vit: torch.nn.Module, pixel_values: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """f_psi(f_phi^0(f_e(X) + [v])) of ViTForImageClassification."""
    embeddings = vit.vit.embeddings
    patches = embeddings.patch_embeddings(pixel_values) + noise
    tokens = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], 1) + embeddings.position_embeddings
    for layer in vit.vit.layers:
        tokens = layer(tokens)
    return vit.classifier(vit.vit.layernorm(tokens)[:, 0])


def influence(logits: Tensor, noisy: Tensor) -> float:
    """The mean squared shift of the probabilities."""
    return ((softmax(noisy, 1) - softmax(logits, 1)) ** 2).sum(1).mean().item()


@torch.no_grad()
def influence_of(vit: torch.nn.Module, pixel_values: Tensor, noise: Tensor) -> float:
    return influence(logits_of(vit, pixel_values), logits_of(vit, pixel_values, noise))


def algorithm_1(vit, batches, seed: int, settings: NoiseSettings) -> tuple[list[Tensor], list[float]]:
    """Lines 3 to 14 as published, with AdamW and a cosine, or eq. 6: every iterate of v, and the influences."""
    shape = type("Shape", (), {"patches": 16, "features": 24})
    v = start_noise(shape, settings.noise_limit, seed).double().requires_grad_()
    optimizer = torch.optim.AdamW([v], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    iterates, influences = [v.detach().clone()], []
    for t in range(settings.max_steps):
        x = next(batches)
        z, z_noisy = logits_of(vit, x), logits_of(vit, x, v)
        influences.append(influence(z, z_noisy))
        if settings.epsilon and influences[-1] < settings.epsilon:
            break
        distance = ((z_noisy - z) ** 2).sum(1)
        loss = (distance if settings.loss == "squared_l2" else distance.sqrt()).mean()
        if settings.norm_weight:
            size = v - v.mean(-1, keepdim=True) if settings.norm == "centred" else v
            loss = loss - settings.norm_weight * size.norm().log()
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * t / settings.max_steps)) / 2
        (v.grad,) = torch.autograd.grad(loss, [v])
        optimizer.step()
        iterates.append(v.detach().clone())
    return iterates, influences


def fine_tuned(batches, loss_of, learning_rate: float = 1e-2, weight_decay: float = 0.01):
    """A step of AdamW for each of (x, y), with a cosine over all steps: the model and its losses.

    A loss is ``loss_of(vit, x, y, step)``. Biases and the weights of norms do not decay.
    """
    vit, losses = tiny_model().double(), []
    decaying, rest = [], []
    for name, parameter in vit.named_parameters():
        (decaying if parameter.dim() > 1 and "norm" not in name else rest).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    for step, (x, y) in enumerate(batches):
        loss = loss_of(vit, x, y, step)
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vit, losses
