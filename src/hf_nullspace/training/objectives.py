"""What the second view of a training batch is. The trainer asks the objective; adding one needs no edit of the trainer.

Every objective trains on two views of each batch in one forward pass, CE(z, y) + CE(z', y) (Algorithm 1, line 19), so
that runs with different objectives cost the same and differ in nothing but the second view.
"""

from collections.abc import Callable
from typing import Protocol

from hf_nullspace.noise.artifact import NullspaceNoise


class Objective(Protocol):
    """Chooses the noise that the second view of each batch gets during a round."""

    def round_noise(self, learn: Callable[[], NullspaceNoise]) -> NullspaceNoise | None:
        """The noise of a round that begins; ``learn()`` learns one. ``None``: the second view is the first."""


class Nullspace:
    """The paper's method: each round, a noise that the present model cannot see."""

    def round_noise(self, learn: Callable[[], NullspaceNoise]) -> NullspaceNoise | None:
        return learn()


class Plain:
    """The control that the paper lacks: the same batches, steps and learning rate, two identical views, no noise."""

    def round_noise(self, learn: Callable[[], NullspaceNoise]) -> NullspaceNoise | None:
        return None


_OBJECTIVES: dict[str, Callable[[], Objective]] = {"nullspace": Nullspace, "plain": Plain}


def make_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective={name!r}: expected one of {', '.join(map(repr, _OBJECTIVES))}")
    return _OBJECTIVES[name]()
