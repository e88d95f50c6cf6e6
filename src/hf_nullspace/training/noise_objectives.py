"""Objectives whose second view carries a noise on the patch embeddings: CE(z, y) + CE(z', y) (Algorithm 1, line 19).

They differ in how a round's noise is made, and in nothing else. A maker is a function from a :class:`Round` to a noise;
a new way to make noises is a new maker.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.noise.influence import permuted
from hf_nullspace.training.objectives import Batch, Objective, View, register_objective
from hf_nullspace.training.rounds import Made, Round

DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {"uniform": torch.rand, "normal": torch.randn}
"""Of the random control; both are scaled, so only the shape counts."""
MIXES = ("one", "choice", "convex")
"""How an image gets its noise from those of the round (:class:`NoisyView`)."""
_PERMUTATION = 1  # keeps its random numbers apart from those of the learned noise's start


class NoisyView(Objective):
    """Every batch twice, as it is and with the round's noise; ``make`` says where that comes from, ``mix`` which it is.

    A round may have several noises. "one" takes the first for all images; "choice" gives each image one of them at
    random; "convex" gives each image a convex combination of them with random weights (uniform on the simplex), which
    by the closure of the nullspace (A.5) stays within epsilon. What an image gets depends on (seed, step, place).
    """

    def __init__(self, make: Callable[[Round], Made], mix: str = "one") -> None:
        self.make, self.mix = make, mix

    def round_noise(self, round: Round) -> Made | None:
        return self.make(round)

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images), "noisy": View(batch.images, self._noise(batch))}

    def _noise(self, batch: Batch) -> Tensor | None:
        noises = batch.noises
        if noises is None or len(noises) == 1 or self.mix == "one":
            return None if noises is None else noises[:1]
        seeds = batch.seeds()
        if self.mix == "choice":
            return noises[torch.tensor([seed % len(noises) for seed in seeds])]
        drawn = np.stack([np.random.default_rng(seed).exponential(size=len(noises)) for seed in seeds])
        weights = torch.from_numpy(drawn / drawn.sum(1, keepdims=True)).to(noises)
        return torch.einsum("bm,mnd->bnd", weights, noises)

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["clean"]) + batch.cross_entropy(logits["noisy"])


def learned(round: Round) -> Made:
    """The paper's method: each round a noise that the present model cannot see."""
    return round.learn()


def random_noise(round: Round, distribution: str = "uniform") -> Made:
    """The control of table 3: one random vector (1, N, D) for all images, as visible as a learned one.

    It is scaled to the influence epsilon on the held-out images of the round. With ``bank_size`` M they are M vectors.
    """
    generator = torch.Generator().manual_seed(round.seed)
    shape = (1, round.shape.patches, round.shape.features)
    directions = [DISTRIBUTIONS[distribution](shape, generator=generator) for _ in range(round.bank_size)]
    if distribution == "uniform":
        directions = [2 * direction - 1 for direction in directions]
    return round.scaled(directions, f"random, {distribution}")


def permuted_noise(round: Round) -> Made:
    """The learned noises with their elements permuted (figure 2), scaled to epsilon on the held-out images."""
    noises, history = round.learn(alone=True)  # those of the round before are permuted
    generator = torch.Generator().manual_seed(derive_seed(round.seed, _PERMUTATION))
    made = round.scaled([permuted(noise.tensor, generator) for noise in noises], "learned, then permuted", history)
    return made._replace(noises=(*made.noises, *round.kept(round.bank_size - len(made.noises))))


register_objective("nullspace", lambda args: NoisyView(learned, args.noise_mix))
register_objective(
    "random", lambda args: NoisyView(lambda round: random_noise(round, args.noise_distribution), args.noise_mix)
)
register_objective("permuted", lambda args: NoisyView(permuted_noise, args.noise_mix))
