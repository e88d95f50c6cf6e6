"""Objectives whose second view carries a noise on the patch embeddings: CE(z, y) + CE(z', y) (Algorithm 1, line 19).

They differ in how a round's noise is made, and in nothing else. A maker is a function from a :class:`Round` to a noise;
a new way to make noises is a new maker.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_nullspace.noise.influence import permuted
from hf_nullspace.noise.learning import derive_seed
from hf_nullspace.training.objectives import Batch, Objective, View, register_objective
from hf_nullspace.training.rounds import Made, Round

DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {"uniform": torch.rand, "normal": torch.randn}
"""Of the random control; both are scaled, so only the shape counts."""
_PERMUTATION = 1  # keeps its random numbers apart from those of the learned noise's start


class NoisyView(Objective):
    """Every batch twice, as it is and with the round's noise; ``make`` says where that comes from."""

    def __init__(self, make: Callable[[Round], Made]) -> None:
        self.make = make

    def round_noise(self, round: Round) -> Made | None:
        return self.make(round)

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images), "noisy": View(batch.images, batch.noise)}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["clean"]) + batch.cross_entropy(logits["noisy"])


def learned(round: Round) -> Made:
    """The paper's method: each round a noise that the present model cannot see."""
    return round.learn()


def random_noise(round: Round, distribution: str = "uniform") -> Made:
    """The control of table 3: one random vector (1, N, D) for all images, as visible as a learned one.

    It is scaled to the influence epsilon on the held-out images of the round.
    """
    generator = torch.Generator().manual_seed(round.seed)
    shape = (1, round.shape.patches, round.shape.features)
    direction = DISTRIBUTIONS[distribution](shape, generator=generator)
    return round.scaled(2 * direction - 1 if distribution == "uniform" else direction, f"random, {distribution}")


def permuted_noise(round: Round) -> Made:
    """The learned noise with its elements permuted (figure 2), scaled to the influence epsilon on held-out images."""
    noise, history = round.learn()
    generator = torch.Generator().manual_seed(derive_seed(round.seed, _PERMUTATION))
    return round.scaled(permuted(noise.tensor, generator), "learned, then permuted", history)


register_objective("nullspace", lambda args: NoisyView(learned))
register_objective("random", lambda args: NoisyView(lambda round: random_noise(round, args.noise_distribution)))
register_objective("permuted", lambda args: NoisyView(permuted_noise))
