"""The L2 attack of Carlini & Wagner (2017), with a fixed constant or a binary search over it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_nullspace.robustness.attacks.base import Adam, Attack

INSIDE = 0.999999  # keeps atanh finite at pixels 0 and 1


@dataclass(frozen=True, repr=False)
class CW(Attack):
    """Minimise ||x' - x||^2 + c * max(z_y - max_{j != y} z_j + kappa, 0) over x' = (tanh(w) + 1) / 2 with Adam.

    The result is the closest image on the way that is misclassified by at least ``kappa`` (in logits), and the image
    itself where there was none or where the model was wrong already. The distance is unbounded. With
    ``binary_search_steps`` > 1 the constant is searched per image, starting at ``c``: ten times more while the attack
    fails, then bisection (the paper: c=1e-3, 9 searches). ``abort_early`` stops an image with a loss not
    below its loss a tenth of the steps before, as the authors' code does for a batch. It is made for thousands of
    steps: with 50, one swing of the loss at the boundary ends an image that is still coming nearer. Such images leave
    the batch.
    """

    c: float = 1.0
    kappa: float = 0.0
    steps: int = 50
    lr: float = 0.01
    binary_search_steps: int = 1
    abort_early: bool = False

    @property
    def cost(self) -> float:
        return 3.0 * self.steps * self.binary_search_steps

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        best = pixels.clone()
        with torch.no_grad():
            right = ~beaten(model(pixels), labels, self.kappa)
        rows = right.nonzero().flatten()
        best_distance = torch.where(right, torch.inf, 0.0).to(pixels)
        c = torch.full_like(best_distance, self.c)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.binary_search_steps if len(rows) else 0):
            found, distance = self.descend(model, pixels[rows], labels[rows], c[rows])
            closer = distance < best_distance[rows]
            best[rows[closer]], best_distance[rows[closer]] = found[closer], distance[closer]
            success = distance.isfinite()
            high[rows[success]] = c[rows[success]]
            low[rows[~success]] = c[rows[~success]]
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        return best

    def descend(self, model: nn.Module, pixels: Tensor, labels: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Closest adversarial images for the constants ``c`` (B,), with squared distances (infinite where none)."""
        best, best_distance = pixels.clone(), torch.full_like(c, torch.inf)
        w = torch.atanh(INSIDE * (2 * pixels - 1))
        target = (w.tanh() + 1) / 2  # the image, as far as the box lets w say it
        adam = Adam(w)
        previous = torch.full_like(c, torch.inf)
        rows = torch.arange(len(pixels), device=pixels.device)  # images still in the batch
        for step in range(self.steps):
            point = w.detach().requires_grad_()
            adversarial = (point.tanh() + 1) / 2
            logits = model(adversarial)
            distance = (adversarial - target[rows]).square().flatten(1).sum(1)
            shortfall = (self.kappa - lead(logits, labels[rows])).clamp_min(0)
            loss = distance + c[rows] * shortfall.to(distance.dtype)
            (gradient,) = torch.autograd.grad(loss.sum(), point)

            w = w - self.lr * adam.direction(gradient)
            adversarial, logits, distance, loss = (t.detach() for t in (adversarial, logits, distance, loss))
            if self.abort_early and step % -(-self.steps // 10) == 0:
                falling = loss <= 0.9999 * previous
                if not falling.all():  # before this iterate can count, as in the authors' code
                    rows, w, adversarial, logits = rows[falling], w[falling], adversarial[falling], logits[falling]
                    distance, loss = distance[falling], loss[falling]
                    adam.keep(falling)
                previous = loss
            closer = beaten(logits, labels[rows], self.kappa) & (distance < best_distance[rows])
            best[rows[closer]] = adversarial[closer]
            best_distance[rows[closer]] = distance[closer]
            if not len(rows):
                break
        return best, best_distance


def lead(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the best wrong class leads the true one; (B,)."""
    wrong = logits.scatter(1, labels[:, None], -torch.inf)
    return wrong.amax(1) - logits.gather(1, labels[:, None]).squeeze(1)


def beaten(logits: Tensor, labels: Tensor, kappa: float) -> Tensor:
    """Which images are misclassified, by at least ``kappa``."""
    return (logits.argmax(1) != labels) & (lead(logits, labels) >= kappa)
