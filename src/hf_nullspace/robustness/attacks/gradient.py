"""Gradient-sign attacks in pixel space: FGSM, PGD (L-inf and L2), MI-FGSM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_nullspace.robustness.attacks.base import Attack, check_radius, loss_gradient, norms, seeded_like, within


class BoundedAttack(Attack):
    """An attack that stays within distance ``eps`` (pixels in [0, 1]) of the image, in the norm ``norm``."""

    eps: float
    norm: str = "linf"
    soft_labels = True  # the cross-entropy, which they ascend, takes them

    def __post_init__(self) -> None:
        super().__post_init__()
        check_radius(self, self.eps, self.norm)

    def project(self, adversarial: Tensor, pixels: Tensor) -> Tensor:
        # the clamp moves towards the image, so never out of the ball
        return within(adversarial, pixels, self.eps, self.norm).clamp(0, 1)


@dataclass(frozen=True, repr=False)
class FGSM(BoundedAttack):
    """One step of size ``eps`` along the sign of the gradient (Goodfellow et al. 2015).

    The default is the paper's 1/255; the authors' code has 8/225.
    """

    eps: float = 1 / 255

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        return pixels + self.eps * loss_gradient(model, pixels, labels).sign()


@dataclass(frozen=True, repr=False)
class PGD(BoundedAttack):
    """Projected gradient ascent from a random start (Madry et al. 2018); the last iterate counts.

    ``norm`` "linf": steps along the sign, start uniform in the box. "l2": steps along the normalised gradient, start
    uniform in the ball. ``step`` defaults to eps / 4. The default eps is CIFAR's; ImageNet's is 4/255.
    """

    eps: float = 8 / 255
    step: float | None = None
    steps: int = 10
    norm: str = "linf"
    random_start: bool = True

    @property
    def seeded(self) -> bool:  # type: ignore[override]  # a class attribute elsewhere
        return self.random_start

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"step": self.eps / 4 if self.step is None else self.step}

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        step = self.settings()["step"]
        adversarial = self.start(pixels, seeds) if self.random_start else pixels
        for _ in range(self.steps):
            gradient = loss_gradient(model, adversarial, labels)
            direction = gradient.sign() if self.norm == "linf" else unit(gradient)
            adversarial = self.project(adversarial + step * direction, pixels)
        return adversarial

    def start(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.norm == "linf":
            offset = self.eps * (2 * seeded_like(pixels, seeds, "uniform") - 1)
        else:
            direction = unit(seeded_like(pixels, seeds, "normal"))
            others = [seed + 1 for seed in seeds]  # a radius independent of the direction
            volume = seeded_like(pixels, others, "uniform")[:, :1, :1, :1]
            offset = self.eps * volume ** (1 / pixels[0].numel()) * direction
        return self.project(pixels + offset, pixels)


@dataclass(frozen=True, repr=False)
class MIM(BoundedAttack):
    """MI-FGSM: the sign of an accumulated, L1-normalised gradient (Dong et al. 2018, algorithm 1).

    ``step`` (alpha) defaults to eps / steps, ``decay`` is mu. A zero gradient adds nothing to the momentum.
    """

    eps: float = 1 / 255
    step: float | None = None
    steps: int = 10
    decay: float = 1.0

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"step": self.eps / self.steps if self.step is None else self.step}

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        step = self.settings()["step"]
        adversarial, momentum = pixels, torch.zeros_like(pixels)
        for _ in range(self.steps):
            gradient = loss_gradient(model, adversarial, labels)
            scale = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
            momentum = self.decay * momentum + gradient / scale.clamp_min(torch.finfo(scale.dtype).tiny)
            adversarial = self.project(adversarial + step * momentum.sign(), pixels)
        return adversarial


def unit(batch: Tensor) -> Tensor:
    """Each image divided by its L2 norm; a zero image stays zero."""
    length = norms(batch)
    return batch / length.clamp_min(torch.finfo(length.dtype).tiny)
