"""Adversarial training, with the attack inside of every training step: Madry, TRADES (table 2), a single step ("fast").

Attacks live in pixels in [0, 1]. While one runs, the model is in eval mode and frozen, and no noise is added to its
embeddings; no parameter gets a gradient from it. Its random numbers depend on (seed, step, the image's place in the
batch) alone, so a resumed run, and one on more processes, attacks the same images in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from hf_nullspace.core.settings import fraction
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.attacks.base import Attack, seeded_like
from hf_nullspace.robustness.attacks.gradient import PGD, BoundedAttack
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.training.losses import divergence
from hf_nullspace.training.objectives import Batch, BesideClean, Objective, View, consistency_of, register_objective
from hf_nullspace.training.pyramid import PyramidPGD

_OUTSIDE = 0.01  # how far from [0, 1] pixels may be rounded that came in bfloat16


@dataclass(frozen=True, repr=False)
class DivergencePGD(BoundedAttack):
    """The inner attack of TRADES (Zhang et al. 2019): ascend KL(clean || adversarial) from x + 0.001 N(0, 1).

    L-inf; the labels play no part. ``step`` defaults to eps / 4.
    """

    eps: float = 8 / 255
    step: float | None = None
    steps: int = 10
    start: float = 0.001
    seeded = True

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"step": self.eps / 4 if self.step is None else self.step}

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int] | None) -> Tensor:
        assert seeds is not None
        step = self.settings()["step"]
        with torch.no_grad():
            clean = model(pixels).softmax(-1)
        adversarial = (pixels + self.start * seeded_like(pixels, seeds, "normal")).clamp(0, 1)
        for _ in range(self.steps):
            adversarial = adversarial.detach().requires_grad_()
            loss = kl_div(log_softmax(model(adversarial), -1), clean, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
            adversarial = self.project(adversarial.detach() + step * gradient.sign(), pixels)
        return adversarial


@dataclass(frozen=True, repr=False)
class RandomStartFGSM(PGD):
    """One step along the sign of the gradient from a uniform start in the ball (Wong et al. 2020, algorithm 3).

    L-inf; ``step`` (alpha) defaults to the paper's 1.25 eps, and the projection brings what is too far back to eps.
    """

    steps: int = 1

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"step": 1.25 * self.eps if self.step is None else self.step}


class Adversarial(Objective):
    """What they have in common: a view that an attack made."""

    needs_pixels = True

    def __init__(self, attack: Attack) -> None:
        self.attack = attack

    def adversarial(self, batch: Batch) -> Tensor:
        """The attacked images, as the model takes them, in the dtype of the batch."""
        assert batch.preprocessing is not None
        pixels = pixels_of(batch.images, batch.preprocessing)
        model = PixelModel(batch.model, batch.preprocessing.mean, batch.preprocessing.std)
        attacked = self.attack(model, pixels, batch.labels, seeds=batch.seeds())
        return batch.preprocessing.normalize(attacked).to(batch.images.dtype)


class Madry(Adversarial):
    """Min-max on adversarial images only: CE(z_adv, y) (Madry et al. 2018). One view per image."""

    def views(self, batch: Batch) -> dict[str, View]:
        return {"adversarial": View(self.adversarial(batch))}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["adversarial"])


class AttackedBesideClean(Adversarial, BesideClean):
    """CE(z, y) + CE(z_adv, y): the clean view and an adversarial one, which ``name`` names.

    ``consistency`` are the settings of :class:`BesideClean`.
    """

    def __init__(self, attack: Attack, name: str, **consistency: Any) -> None:
        Adversarial.__init__(self, attack)
        BesideClean.__init__(self, name, **consistency)

    def other(self, batch: Batch) -> View:
        return View(self.adversarial(batch))


class Trades(Adversarial):
    """CE(z, y) + beta * KL(p || p_adv), the clean side not detached (Zhang et al. 2019)."""

    def __init__(self, attack: Attack, beta: float) -> None:
        super().__init__(attack)
        self.beta = beta

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images), "divergent": View(self.adversarial(batch))}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        apart = divergence(logits["clean"], logits["divergent"])
        return batch.cross_entropy(logits["clean"]) + self.beta * batch.mean(apart)


def pixels_of(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels in [0, 1], float32 or wider, of what the model takes.

    Raises:
        ValueError: if they lie outside: the images were normalised by something else than the image processor.
    """
    pixels = preprocessing.denormalize(images.to(torch.promote_types(torch.float32, images.dtype)))
    low, high = (value.item() for value in torch.aminmax(pixels))
    if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):
        raise ValueError(
            f"the training images are pixels in [{low:.4g}, {high:.4g}] by the mean {preprocessing.mean} and std "
            f"{preprocessing.std} of the image processor; expected [0, 1]: the images were normalised in another way, "
            "and an attack in pixels needs the same one"
        )
    return pixels.clamp(0, 1)


def attack_settings(args: Any) -> dict[str, Any]:
    """What a run sets of ``eps``, ``step`` and ``steps`` of its attack, as numbers for pixels in [0, 1].

    Raises:
        ValueError: if one is no number, or out of range.
    """
    numbers: dict[str, Any] = {} if args.attack_steps is None else {"steps": args.attack_steps}
    for name in ("attack_eps", "attack_step"):
        value = getattr(args, name)
        try:
            numbers |= {} if value is None else {name.removeprefix("attack_"): fraction(value)}
        except ValueError as error:
            raise ValueError(f"{name}={error}") from None
    if not 0 <= numbers.get("eps", 0) <= 1:
        raise ValueError(f"attack_eps={args.attack_eps!r}: expected a radius for pixels in [0, 1], such as 8/255")
    if not numbers.get("step", 1) > 0:
        raise ValueError(f"attack_step={args.attack_step!r}: expected a positive number")
    return numbers


def pyramid_settings(args: Any) -> dict[str, Any]:
    """Scales and multipliers of the objective "pyramid". Raises a ValueError if they are not as many."""
    found = {"scales": args.pyramid_scales, "multipliers": args.pyramid_multipliers}
    lists = [value for value in found.values() if isinstance(value, list | tuple) and value]
    if len(lists) < 2 or len(lists[0]) != len(lists[1]):
        given = ", ".join(f"pyramid_{name}={value!r}" for name, value in found.items())
        raise ValueError(f"{given}: expected two lists, with one multiplier for each scale")
    return {name: tuple(value) for name, value in found.items()}


def madry(args: Any) -> Objective:
    """``objective="madry"``, with the attack of the run's settings."""
    return Madry(PGD(**attack_settings(args)))


def trades(args: Any) -> Objective:
    """``objective="trades"``, with the attack of the run's settings."""
    return Trades(DivergencePGD(**attack_settings(args)), args.trades_beta)


def fast(args: Any) -> Objective:
    """``objective="fast"``: a clean view, and one step of FGSM from a random start, at the radius of the settings."""
    attack = RandomStartFGSM(**attack_settings(args) | {"steps": 1})
    return AttackedBesideClean(attack, "fast", **consistency_of(args))


def pyramid(args: Any) -> Objective:
    """``objective="pyramid"``: L(x) + lambda L(x_adv) (equation 3 of Herrmann et al. 2022) with lambda = 1."""
    attack = PyramidPGD(**attack_settings(args), **pyramid_settings(args))
    return AttackedBesideClean(attack, "pyramid", **consistency_of(args))


register_objective("madry", madry)
register_objective("trades", trades)
register_objective("fast", fast)
register_objective("pyramid", pyramid)
