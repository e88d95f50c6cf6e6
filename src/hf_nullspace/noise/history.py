"""What happened while a noise was learned, and how it ended: the same words in histories, provenances and cards."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_nullspace.core.processes import rank_and_world_size
from hf_nullspace.noise.influence import centred_norm

logger = logging.getLogger(__name__)

ENDINGS = {
    "epsilon": "reached epsilon",
    "calibrated": "scaled to epsilon on held-out images",
    "rescaled": "were scaled into epsilon",
    "steps": "ended outside epsilon",
    "start": "began inside epsilon, so that nothing was learned",
    "bound": "as long as allowed, and still below epsilon",
    "unreachable": "below epsilon, which no length of the noise has",
}
"""The values of ``stopped``, each with its meaning on a card, for one noise or several."""
NO_NOISE = ("unreachable", "bound", "start")
"""Endings that say that the model hardly reacts to the noise, or that it was not learned. They warn."""
LEAST = 0.96
"""The least share of epsilon that a noise scaled to epsilon has as its influence."""
_ADVICE = {
    "rescaled": "{steps} noise steps did not reach epsilon={epsilon}; the noise is scaled into it",
    "steps": "{steps} noise steps did not reach epsilon={epsilon}; the noise is used as it is",
    "start": "the noise began with an influence of {influence:.3g}, inside epsilon={epsilon}: no step was taken and "
    "nothing was learned; raise noise_limit (A), lower epsilon, or train the model first",
    "bound": "every token of the noise is as long as noise_limit (A) allows, and its influence is {influence:.3g}, "
    "below epsilon={epsilon}: the model hardly reacts to it; train it first, raise noise_limit, or lower epsilon",
    "unreachable": "no length of the noise has an influence near epsilon={epsilon}; it is used with {influence:.3g}: "
    "lower epsilon, or train the model first",
}


@dataclass
class NoiseHistory:
    """The course of one noise (of several: their mean influence and loss, the first one's norms), step by step."""

    influence: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    centred_norm: list[float] = field(default_factory=list)
    steps: int = 0
    """Gradient steps that were taken."""
    stopped: str = ""
    """Why it ended: one of :data:`ENDINGS`; of several noises one that warns, if there is one."""
    held_out_influence: float | None = None
    seconds: float = 0.0

    def record(self, noise: Tensor, influence: Sequence[float], loss: Sequence[float]) -> None:
        """Add a minibatch: the norms of ``noise`` (1, N, D), influence and loss of each of the M noises."""
        self.influence.append(sum(influence) / len(influence))
        self.loss.append(sum(loss) / len(loss))
        self.norm.append(float(torch.linalg.vector_norm(noise)))
        self.centred_norm.append(float(centred_norm(noise)))

    def summary(self, noise: Tensor, points: int = 200) -> dict[str, Any]:
        """What is logged and kept of a round, ready for JSON: the result, and at most ``points`` of each curve."""
        stride = max(-(-len(self.influence) // points), 1)
        curves = ("influence", "loss", "norm", "centred_norm")
        return {
            "noise_steps": self.steps,
            "stopped": self.stopped,
            "influence": self.held_out_influence,
            "minibatch_influence": self.influence[-1] if self.influence else None,
            "norm": float(torch.linalg.vector_norm(noise)),
            "centred_norm": float(centred_norm(noise)),
            "seconds": self.seconds,
            "trace_stride": stride,
            "trace": {name: [float(f"{value:.6g}") for value in getattr(self, name)[::stride]] for name in curves},
        }


def scaled_ending(influence: float, epsilon: float, *, at_bound: bool, least: float = LEAST) -> str:
    """The ending of a noise that was scaled to epsilon; ``at_bound``: it has the largest length that is allowed."""
    if influence >= least * epsilon:
        return "calibrated"
    return "bound" if at_bound else "unreachable"


def worst(endings: Sequence[str]) -> str:
    """The ending of several noises: one of those that warn, if there is one."""
    return next((word for word in NO_NOISE if word in endings), endings[0])


def warn(ending: str, influence: float, epsilon: float | None, steps: int, round: int | None) -> None:
    """Warn on the main process if the ending is not the wanted one; ``round`` is named in the warning."""
    if epsilon is not None and ending in _ADVICE and rank_and_world_size()[0] == 0:
        text = _ADVICE[ending].format(influence=influence, epsilon=epsilon, steps=steps)
        logger.warning(text if round is None else f"round {round}: {text}")
