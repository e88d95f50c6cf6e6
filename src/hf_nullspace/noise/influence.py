"""What a noise does to the predictions, and how large it is."""

import torch
from torch import Tensor


def noise_influence(clean_logits: Tensor, noisy_logits: Tensor) -> Tensor:
    """Mean squared shift of the predicted distribution, sigma (Algorithm 1, line 8; the paper's "MSE probability").

    Both are logits of shape ``(batch, classes)``; the result is a scalar in [0, 2].
    """
    return influences(clean_logits, noisy_logits).mean()


def influences(clean_logits: Tensor, noisy_logits: Tensor) -> Tensor:
    """The squared shift of each image's predicted distribution, (batch,); :func:`noise_influence` is the mean."""
    shift = noisy_logits.softmax(-1) - clean_logits.softmax(-1)
    return shift.square().sum(-1)


def match_rate(clean_logits: Tensor, noisy_logits: Tensor) -> Tensor:
    """Share of images, in [0, 1], that have the same predicted class with and without the noise (section 2.3)."""
    return (clean_logits.argmax(-1) == noisy_logits.argmax(-1)).double().mean()


def centre(noise: Tensor) -> Tensor:
    """``noise`` (1, N, D) without each token's feature mean.

    LayerNorm subtracts the mean over the features, so adding the same constant to all features of a token changes
    nothing in a pre-LayerNorm transformer: that part of a noise is free, at any size.
    """
    return noise - noise.mean(-1, keepdim=True)


def centred_norm(noise: Tensor) -> Tensor:
    """Euclidean norm of the centred noise, the part that a LayerNorm can see; a scalar."""
    return torch.linalg.vector_norm(centre(noise))


def permuted(noise: Tensor, generator: torch.Generator, *, raw: bool = False) -> Tensor:
    """The control of figure 2: ``noise`` (1, N, D) with its elements permuted, so the same size in another direction.

    Each token's mean is removed, the elements are permuted over tokens and features, the means that this creates are
    removed again, and the centred norm is matched. ``raw=True`` permutes the elements as they are, as the paper does.
    """
    source = noise if raw else centre(noise)
    order = torch.randperm(source.numel(), generator=generator).to(source.device)
    shuffled = source.flatten()[order].reshape(source.shape)
    if raw:
        return shuffled
    shuffled = centre(shuffled)
    return shuffled * (centred_norm(noise) / torch.linalg.vector_norm(shuffled))
