"""The attack of pyramid adversarial training (Herrmann et al. 2022): a perturbation at several scales.

At a coarse scale s all pixels of a square of s x s have the same change, per channel, which may be large: such a change
keeps the object. Single pixels may change a little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_nullspace.core.seeds import generator_of
from hf_nullspace.robustness.attacks.base import Attack, likeliest


@dataclass(frozen=True, repr=False)
class PyramidPGD(Attack):
    """x_adv = C(x + sum over s of m_s C_eps(delta_s)) (equation 4), C the clipping to pixels in [0, 1] and to +-eps.

    From delta = 0, ``steps`` steps of ``step`` along the sign of the gradient at every scale lower the cross-entropy of
    a random other class (PGD on a random target, as the paper has it: ascending the loss of the true label would leak
    it). ``step`` defaults to eps / 6: 1/255 for the paper's 6/255. ``scales`` are in pixels of the image as the model
    takes it; the paper's are for 224 x 224. Where one does not divide a side, the last squares are cut; one that is no
    smaller than the image is one value per channel.
    """

    eps: float = 6 / 255
    step: float | None = None
    steps: int = 5
    scales: tuple[int, ...] = (32, 16, 1)
    multipliers: tuple[float, ...] = (20.0, 10.0, 1.0)
    seeded = True
    soft_labels = True

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"step": self.eps / 6 if self.step is None else self.step}

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        step, targets = self.settings()["step"], None
        deltas = [pixels.new_zeros(*pixels.shape[:2], *cells(pixels.shape[2:], scale)) for scale in self.scales]
        for _ in range(self.steps):
            for delta in deltas:
                delta.requires_grad_()
            logits = model((pixels + self.perturbation(deltas, pixels)).clamp(0, 1))
            targets = other_classes(likeliest(labels), logits.shape[1], seeds) if targets is None else targets
            gradients = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), deltas)
            moved = [delta.detach() - step * each.sign() for delta, each in zip(deltas, gradients, strict=True)]
            deltas = [delta.clamp(-self.eps, self.eps) for delta in moved]
        return pixels + self.perturbation(deltas, pixels)

    def perturbation(self, deltas: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """The sum over the scales, shaped like ``pixels``; ``deltas[i]`` is (B, C, ceil(H / s), ceil(W / s))."""
        parts = zip(self.scales, self.multipliers, deltas, strict=True)
        return torch.stack([factor * enlarged(delta, scale, pixels.shape[2:]) for scale, factor, delta in parts]).sum(0)


def cells(size: Sequence[int], scale: int) -> tuple[int, int]:
    """How many squares of side ``scale`` cover an image of ``size`` (height, width)."""
    return -(-size[0] // scale), -(-size[1] // scale)


def enlarged(delta: Tensor, scale: int, size: Sequence[int]) -> Tensor:
    """Every value of ``delta`` (B, C, h, w) as a square of side ``scale``, cut to ``size`` (height, width)."""
    rows = delta.repeat_interleave(scale, dim=2)[:, :, : size[0]]
    return rows.repeat_interleave(scale, dim=3)[..., : size[1]]


def other_classes(labels: Tensor, classes: int, seeds: Sequence[int]) -> Tensor:
    """A class for each image that is not its own, uniform over the others, image b from ``seeds[b]``.

    ``labels`` are classes (B,), or their probabilities (B, K), of which the most likely one is the image's own.
    """
    own = labels.argmax(1) if labels.dim() == 2 else labels
    draws = [torch.randint(1, classes, (), generator=generator_of(int(seed))) for seed in seeds]
    return (own + torch.stack(draws).to(own.device)) % classes
