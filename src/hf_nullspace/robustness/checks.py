"""Doubt your own evaluation: checks that fail when a robustness number is not what it seems.

The list follows Carlini et al., "On Evaluating Adversarial Robustness" (2019). The suite runs it on a few images; a
failed check marks the numbers it concerns as unreliable.
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

Survivors = Callable[[float, int], int]  # (radius, steps) -> images that the model still gets right under PGD


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
    seeds = [seed + b for b in range(len(pixels))]

    @cache
    def survivors(radius: float, steps: int) -> int:
        return right(model, PGD(radius, steps=steps)(model, pixels, labels, seeds=seeds), labels)

    checks: list[tuple[str, str, Callable[[], tuple[bool, str]]]] = [
        ("input range", "all", lambda: input_range(pixels)),
        ("range guarded", "all", lambda: range_guarded(model, pixels)),
        ("logits, not probabilities", "all", lambda: logits_not_probabilities(model, pixels)),
        ("deterministic", "all", lambda: deterministic(model, pixels)),
        ("better than chance", "all", lambda: better_than_chance(model, pixels, labels)),
        ("gradients", "attacks", lambda: gradients(model, pixels, labels)),
        ("accuracy falls to 0 as eps grows", "attacks", lambda: falls_to_zero(survivors, eps, len(labels))),
        ("more steps are not weaker", "attacks", lambda: more_steps(survivors, eps, len(labels))),
        ("gradients beat noise", "attacks", lambda: beats_noise(model, pixels, labels, seeds, eps, survivors)),
    ]
    results = [eval_mode(model)]
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        for name, concerns, check in checks:
            try:
                passed, detail = check()
            except Exception as error:  # whatever the model raises is the answer
                passed, detail = False, f"{type(error).__name__}: {error}"
            results.append(Check(name, passed, detail, concerns))
    return results


def unreliable(checks: Sequence[Check], *, attack: bool) -> list[str]:
    """Names of the failed checks that concern a number."""
    return [check.name for check in checks if not check.passed and (attack or check.concerns == "all")]


def eval_mode(model: nn.Module) -> Check:
    """Attacks and the suite switch to eval mode themselves; a model that was given in train mode is worth a look."""
    noisy = [m for m in model.modules() if m.training and isinstance(m, NOISY) and getattr(m, "p", 1) > 0]
    kinds = ", ".join(sorted({type(module).__name__ for module in noisy}))
    return Check(
        "eval mode", not noisy, f"{len(noisy)} modules train ({kinds})" if noisy else "no active dropout or batch norm"
    )


NOISY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def input_range(pixels: Tensor) -> tuple[bool, str]:
    low, high = pixels.min().item(), pixels.max().item()
    spread = pixels.std().item()
    return 0 <= low < 0.5 < high <= 1 and spread > 0.02, f"pixels lie in [{low:.3f}, {high:.3f}], spread {spread:.3f}"


def range_guarded(model: PixelModel, pixels: Tensor) -> tuple[bool, str]:
    try:
        model(pixels[:1] * 2 - 1 - 1e-3)
    except ValueError:
        return True, "normalised input is refused"
    return False, "the model took values below 0"


def logits_not_probabilities(model: PixelModel, pixels: Tensor) -> tuple[bool, str]:
    with torch.no_grad():
        logits = model(pixels)
    sums = logits.sum(1)
    are_probabilities = bool((logits >= 0).all() and (sums - 1).abs().max() < 1e-3)
    are_logs = bool((logits <= 0).all() and (logits.logsumexp(1)).abs().max() < 1e-3)
    if not logits.isfinite().all():
        return False, "not finite"
    if are_probabilities:
        return False, "every row is non-negative and sums to 1: a softmax inside the model masks gradients"
    return True, f"{'log-probabilities' if are_logs else 'logits'} in [{logits.min():.2f}, {logits.max():.2f}]"


def deterministic(model: PixelModel, pixels: Tensor) -> tuple[bool, str]:
    with torch.no_grad():
        gap = (model(pixels) - model(pixels)).abs().max().item()
    return gap < 1e-4, f"two forwards differ by {gap:.2g}"


def better_than_chance(model: PixelModel, pixels: Tensor, labels: Tensor) -> tuple[bool, str]:
    with torch.no_grad():
        logits = model(pixels)
    share = (logits.argmax(1) == labels).float().mean().item()
    return share > 2 / logits.shape[
        1
    ] or share > 0.9, f"{100 * share:.0f}% of {len(labels)} images, {logits.shape[1]} classes"


def gradients(model: PixelModel, pixels: Tensor, labels: Tensor) -> tuple[bool, str]:
    gradient = loss_gradient(model, pixels, labels)
    zero = (gradient.flatten(1).abs().amax(1) == 0).sum().item()
    share = (gradient == 0).float().mean().item()
    fine = bool(gradient.isfinite().all()) and zero == 0 and share < 0.5
    return fine, f"zero for {zero} of {len(pixels)} images, {100 * share:.0f}% of all values zero"


def falls_to_zero(survivors: Survivors, eps: float, n: int) -> tuple[bool, str]:
    some, none = survivors(eps, 10), survivors(0.5, 10)
    return none <= 0.05 * n and none <= some, f"of {n} images {some} right at {eps * 255:g}/255, {none} at 127.5/255"


def more_steps(survivors: Survivors, eps: float, n: int) -> tuple[bool, str]:
    few, many = survivors(eps, 2), survivors(eps, 10)
    return many <= few + max(1, 0.02 * n), f"{few} right after 2 steps, {many} after 10"


def beats_noise(
    model: PixelModel, pixels: Tensor, labels: Tensor, seeds: Sequence[int], eps: float, survivors: Survivors
) -> tuple[bool, str]:
    noisy = (pixels + eps * (2 * seeded_like(pixels, seeds, "uniform") - 1).sign()).clamp(0, 1)
    by_noise, by_gradient = right(model, noisy, labels), survivors(eps, 10)
    return by_gradient <= by_noise, f"{by_noise} right under random signs, {by_gradient} under PGD"


def right(model: PixelModel, pixels: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((model(pixels).argmax(1) == labels).sum())
