"""Checks that fail when a robustness number is not what it seems; a failed one marks the numbers that it concerns.

The list follows Carlini et al., "On Evaluating Adversarial Robustness" (2019).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from hf_nullspace.models.frozen import frozen
from hf_nullspace.robustness.attacks.base import loss_gradient, seeded_like
from hf_nullspace.robustness.attacks.gradient import PGD
from hf_nullspace.robustness.pixel_model import PixelModel

Answer = tuple[bool, str]  # whether the check passed, and what it saw
Survivors = Callable[[float, int], int]  # (radius, steps) -> images that the model still gets right under PGD
Dropout, BatchNorm = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Check:
    """One doubt and its answer; ``concerns`` is "all" numbers or those of "attacks"."""

    name: str
    passed: bool
    detail: str
    concerns: str = "all"

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.detail}"


def run_checks(
    model: PixelModel, pixels: Tensor, labels: Tensor, *, eps: float = 8 / 255, seed: int = 0
) -> list[Check]:
    """All checks on a batch ``pixels`` (B, C, H, W) in [0, 1] with ``labels`` (B,); B around 32 is enough.

    A check that cannot run (an exception in the model) fails with the exception's text. The model is left as it was.
    """
    n, seeds = len(labels), [seed + b for b in range(len(pixels))]

    @torch.no_grad()
    def logits() -> Tensor:
        return model(pixels)

    def right(images: Tensor) -> int:
        with torch.no_grad():
            return int((model(images).argmax(1) == labels).sum())

    @cache
    def survivors(radius: float, steps: int) -> int:
        return right(PGD(radius, steps=steps)(model, pixels, labels, seeds=seeds))

    def under_random_signs() -> int:
        signs = (2 * seeded_like(pixels, seeds, "uniform") - 1).sign()
        return right((pixels + eps * signs).clamp(0, 1))

    about_all: dict[str, Callable[[], Answer]] = {
        "input range": lambda: input_range(pixels),
        "range guarded": lambda: range_guarded(model, pixels),
        "logits, not probabilities": lambda: logits_not_probabilities(logits()),
        "deterministic": lambda: deterministic(logits(), logits()),
        "better than chance": lambda: better_than_chance(logits(), labels),
    }
    about_attacks: dict[str, Callable[[], Answer]] = {
        "gradients": lambda: gradients(loss_gradient(model, pixels, labels)),
        "accuracy falls to 0 as eps grows": lambda: falls_to_zero(survivors, eps, n),
        "more steps are not weaker": lambda: more_steps(survivors, eps, n),
        "gradients beat noise": lambda: beats_noise(under_random_signs(), survivors(eps, 10)),
    }
    results = [Check("eval mode", *eval_mode(model))]  # before `frozen` changes it
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        for concerns, checks in (("all", about_all), ("attacks", about_attacks)):
            for name, check in checks.items():
                try:
                    passed, detail = check()
                except Exception as error:  # whatever the model raises is the answer
                    passed, detail = False, f"{type(error).__name__}: {error}"
                results.append(Check(name, passed, detail, concerns))
    return results


def unreliable(checks: Sequence[Check], *, attack: bool) -> list[str]:
    """Names of the failed checks that concern a number."""
    return [check.name for check in checks if not check.passed and (attack or check.concerns == "all")]


def eval_mode(model: nn.Module) -> Answer:
    """Attacks and the suite switch to eval mode themselves; a model that was given in train mode is worth a look."""
    training = [module for module in model.modules() if module.training]
    noisy = [m for m in training if isinstance(m, BatchNorm) or (isinstance(m, Dropout) and m.p > 0)]
    kinds = ", ".join(sorted({type(module).__name__ for module in noisy}))
    return not noisy, f"{len(noisy)} modules train ({kinds})" if noisy else "no active dropout or batch norm"


def input_range(pixels: Tensor) -> Answer:
    low, high, spread = pixels.min().item(), pixels.max().item(), pixels.std().item()
    return 0 <= low < 0.5 < high <= 1 and spread > 0.02, f"pixels lie in [{low:.3f}, {high:.3f}], spread {spread:.3f}"


def range_guarded(model: PixelModel, pixels: Tensor) -> Answer:
    try:
        model(pixels[:1] * 2 - 1 - 1e-3)
    except ValueError:
        return True, "normalised input is refused"
    return False, "the model took values below 0"


def logits_not_probabilities(logits: Tensor) -> Answer:
    if not logits.isfinite().all():
        return False, "not finite"
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:
        return False, "every row is non-negative and sums to 1: a softmax inside the model masks gradients"
    logs = (logits <= 0).all() and logits.logsumexp(1).abs().max() < 1e-3
    return True, f"{'log-probabilities' if logs else 'logits'} in [{logits.min():.2f}, {logits.max():.2f}]"


def deterministic(first: Tensor, second: Tensor) -> Answer:
    gap = (first - second).abs().max().item()
    return gap < 1e-4, f"two forwards differ by {gap:.2g}"


def better_than_chance(logits: Tensor, labels: Tensor) -> Answer:
    classes, share = logits.shape[1], (logits.argmax(1) == labels).float().mean().item()
    return share > 2 / classes or share > 0.9, f"{100 * share:.0f}% of {len(labels)} images, {classes} classes"


def gradients(gradient: Tensor) -> Answer:
    zero = (gradient.flatten(1).abs().amax(1) == 0).sum().item()
    share = (gradient == 0).float().mean().item()
    sound = bool(gradient.isfinite().all()) and zero == 0 and share < 0.5
    return sound, f"zero for {zero} of {len(gradient)} images, {100 * share:.0f}% of all values zero"


def falls_to_zero(survivors: Survivors, eps: float, n: int) -> Answer:
    some, none = survivors(eps, 10), survivors(0.5, 10)
    return none <= 0.05 * n and none <= some, f"of {n} images {some} right at {eps * 255:g}/255, {none} at 127.5/255"


def more_steps(survivors: Survivors, eps: float, n: int) -> Answer:
    few, many = survivors(eps, 2), survivors(eps, 10)
    return many <= few + max(1, 0.02 * n), f"{few} right after 2 steps, {many} after 10"


def beats_noise(by_noise: int, by_gradient: int) -> Answer:
    return by_gradient <= by_noise, f"{by_noise} right under random signs, {by_gradient} under PGD"
