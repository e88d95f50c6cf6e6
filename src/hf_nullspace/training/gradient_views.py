"""Adversarial views from a gradient that the training step computes anyway: two views, two passes, the price of plain.

The noise is on the patch embeddings u (B, N, D), so that it needs no image processor and exists for every family.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_nullspace.noise.influence import centre
from hf_nullspace.training.objectives import Batch, Objective, View


def along(gradient: Tensor, norms: Tensor) -> Tensor:
    """r_adv = norm * g / ||g||_2 for each image (Miyato et al. 2017, eq. 5 and 6), from ``gradient`` (B, N, D).

    ``norms`` is (B,). An image whose gradient is zero or not finite gets no noise.
    """
    lengths = torch.linalg.vector_norm(gradient, dim=(1, 2))
    usable = lengths.isfinite() & (lengths > 0)
    factors = norms / torch.where(usable, lengths, 1)
    return torch.where(usable[:, None, None], gradient * factors[:, None, None], 0)


def embedding_norms(embeddings: Tensor) -> Tensor:
    """The centred norm of each image's patch embeddings (B, N, D): (B,)."""
    return torch.linalg.vector_norm(centre(embeddings), dim=(1, 2))


class FGM(Objective):
    """CE(z, y) + CE(z', y), with adversarial noise along the gradient on the patch embeddings (Miyato et al. 2017).

    The clean view goes first; z' follows with r_adv = share ||u|| g / ||g||, g the gradient of the loss at the image's
    embeddings u, both over all its patches, ||u|| without each token's mean. The paper has one norm for all inputs and
    normalises the embeddings instead. It is the first step of FreeLB (Zhu et al. 2020), from zero.
    """

    def __init__(self, share: float) -> None:
        self.then = AlongGradient(share)

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images)}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["clean"])


class AlongGradient(Objective):
    """CE(z', y), the second part of :class:`FGM`."""

    def __init__(self, share: float) -> None:
        self.share = share

    def views(self, batch: Batch) -> dict[str, View]:
        assert batch.gradient is not None
        return {"fgm": View(batch.images, along(batch.gradient, self.share * embedding_norms(batch.embeddings())))}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["fgm"])


def fgm(args: Any) -> Objective:
    """``objective="fgm"``, with the share of the run's settings."""
    return FGM(args.fgm_share)
