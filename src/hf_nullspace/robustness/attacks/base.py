"""What every attack shares: its name, its threat model, seeded starts, and leaving the model as it was."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nullspace.core.settings import check_numbers
from hf_nullspace.models.frozen import frozen

# What the settings of all attacks may be, by name.
INTERVALS = {
    **dict.fromkeys(("steps", "binary_search_steps", "num_patch", "targets", "queries", "iterations"), "int [1, inf)"),
    **dict.fromkeys(("attention_layer", "sparse", "sparse_freeze"), "int [0, inf)"),
    **dict.fromkeys(("eps", "kappa", "decay", "attention_weight", "start"), "[0, inf)"),
    **dict.fromkeys(("step", "c", "lr"), "(0, inf)"),
}
CHOICES = {"norm": ("linf", "l2"), "mild": ("linf", "l2"), "choice": ("attention", "saliency", "random")}


@dataclass(frozen=True, repr=False)
class Attack(ABC):
    """From (model, pixels, labels) to adversarial pixels within the threat model; success is for the caller to judge.

    Subclasses are frozen dataclasses with ``repr=False``: the repr of this class is the condition's name in results,
    with every setting in it. A setting with which it would be no attack is a ``ValueError``.
    """

    seeded = False  # whether it draws random numbers, and so needs one seed per image
    soft_labels = False  # whether labels may be class probabilities (B, K)
    batch_dependent = False  # whether the result for an image depends on the others of its batch
    steps = 1  # forward and backward passes

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in fields(self):
            value, optional = getattr(self, field.name), field.default is None
            choices = (True, False) if isinstance(field.default, bool) else CHOICES.get(field.name, ())
            allowed = [repr(choice) for choice in choices]
            if value is None and optional:
                continue
            if isinstance(field.default, tuple) and isinstance(value, tuple):
                continue
            if value is None or isinstance(value, list | tuple) or (allowed and repr(value) not in allowed):
                expected = " or ".join(allowed) or "a number"
                raise ValueError(f"{name}: {field.name}={value!r}: expected {expected}")
        try:
            check_numbers(self, {f.name: INTERVALS[f.name] for f in fields(self) if f.name in INTERVALS})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def __call__(
        self, model: nn.Module, pixels: Tensor, labels: Tensor, *, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Adversarial pixels, (B, C, H, W) in [0, 1], for ``pixels`` of that shape and ``labels`` of shape (B,).

        ``model`` maps pixels to logits (a :class:`~hf_nullspace.robustness.pixel_model.PixelModel`). ``seeds`` is one
        integer per image, so that the result for an image does not depend on its batch; attacks that draw nothing
        ignore it. The model's mode and ``requires_grad`` flags are as before, also after an exception, and no
        parameter gets a ``.grad``.
        """
        soft = self.soft_labels and labels.is_floating_point() and labels.dim() == 2
        if labels.shape[: 1 if soft else None] != pixels.shape[:1]:
            raise ValueError(f"{tuple(labels.shape)} labels for {pixels.shape[0]} images; expected one label per image")
        if self.seeded and (seeds is None or len(seeds) != len(pixels)):
            got = "none" if seeds is None else len(seeds)
            raise ValueError(f"{self} draws random numbers: pass one seed per image ({len(pixels)}), got {got}")
        with frozen(model), torch.inference_mode(False), torch.enable_grad():
            pixels, labels = pixels.detach().clone(), labels.detach().clone()  # inference tensors cannot take part
            if not len(pixels):
                return pixels
            return self.project(self.perturb(model, pixels, labels, () if seeds is None else seeds), pixels).detach()

    @abstractmethod
    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """The attack itself; gradients are on, the model is in eval mode and its parameters need no gradient.

        ``seeds`` holds one integer per image if the attack is ``seeded``; otherwise it may be empty.
        """

    def project(self, adversarial: Tensor, pixels: Tensor) -> Tensor:
        """The nearest image to ``adversarial`` that the threat model allows around ``pixels``; here any in [0, 1]."""
        return adversarial.clamp(0, 1)

    def require(self) -> None:  # noqa: B027  (most need nothing)
        """Raise ``ImportError`` if an optional library that the attack needs is not installed."""

    @property
    def cost(self) -> float:
        """Rough price in forward passes (a backward counts as two), for the time left on progress bars."""
        return 3.0 * self.steps

    def settings(self) -> dict[str, Any]:
        """Every setting with its resolved value, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={readable(v)}' for k, v in self.settings().items())})"


def check_radius(attack: Attack, eps: float, norm: str) -> None:
    """Raise ``ValueError`` for an L-inf radius above 1: no pixel in [0, 1] is that far from another."""
    if norm == "linf" and eps > 1:
        raise ValueError(f"{type(attack).__name__}: eps={eps}: expected a radius for pixels in [0, 1], such as 8 / 255")


def readable(value: Any) -> str:
    """A setting as one writes it: 0.0313725... as ``8/255``."""
    if isinstance(value, float):
        levels = value * 255
        if value and abs(levels - round(levels, 3)) < 1e-9 and abs(value - round(value, 3)) > 1e-9:
            return f"{round(levels, 3):g}/255"
        return f"{value:g}"
    return repr(value)


def loss_gradient(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy with respect to ``pixels``, each image on its own (the sum over the batch)."""
    pixels = pixels.detach().requires_grad_()
    loss = F.cross_entropy(model(pixels), labels, reduction="sum")
    return torch.autograd.grad(loss, pixels)[0]


def likeliest(labels: Tensor) -> Tensor:
    """One class per image (B,), of classes (B,) or of class probabilities (B, K)."""
    return labels.argmax(1) if labels.dim() == 2 else labels


def seeded_like(pixels: Tensor, seeds: Sequence[int], kind: str) -> Tensor:
    """Random numbers shaped like ``pixels``, image b from ``seeds[b]`` alone: "uniform" in [0, 1) or "normal".

    Drawn on the CPU in float32, so that every device and dtype gets the same numbers.
    """
    draw = {"uniform": torch.rand, "normal": torch.randn}[kind]
    rows = [draw(pixels.shape[1:], generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(pixels)


def norms(batch: Tensor, *, over: int = 1) -> Tensor:
    """L2 norms over the dimensions from ``over`` on, which keep size 1: per image, or (2) per image and channel."""
    return batch.flatten(over).norm(dim=over).reshape(*batch.shape[:over], *[1] * (batch.dim() - over))


def within(adversarial: Tensor, pixels: Tensor, eps: float, norm: str, *, over: int = 1) -> Tensor:
    """The nearest to ``adversarial`` within ``eps`` of ``pixels``: per value ("linf"), or in ``norms`` ("l2")."""
    if norm == "linf":
        return torch.minimum(torch.maximum(adversarial, pixels - eps), pixels + eps)
    change = adversarial - pixels
    length = norms(change, over=over)
    return torch.where(length > eps, pixels + change * (eps / length), adversarial)


class Adam:
    """Adam's direction (Kingma & Ba 2015, their betas) for a batch from which finished images can leave."""

    def __init__(self, like: Tensor):
        self.mean, self.square, self.steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """What the learning rate multiplies, shaped like ``gradient``."""
        first, second = 0.9, 0.999
        self.steps += 1
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient.square()
        root = (self.square / (1 - second**self.steps)).sqrt()
        return self.mean / (1 - first**self.steps) / (root + 1e-8)

    def keep(self, rows: Tensor) -> None:
        """Forget the images outside ``rows`` (bool or indices)."""
        self.mean, self.square = self.mean[rows], self.square[rows]
