"""How a noise ended: the words of ``stopped`` in histories, provenances and cards, the same for every way to make one.

The last three say that the noise is none: the model hardly reacts to it, or it was not learned. They warn.
"""

import logging
from collections.abc import Sequence

from hf_nullspace.core.processes import rank_and_world_size

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
"""What each word means, as a card says it of one noise or of several."""
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
NO_NOISE = ("unreachable", "bound", "start")
LEAST = 0.96
"""The share of epsilon that the influence of a noise that was scaled to epsilon has at least."""


def scaled_ending(influence: float, epsilon: float, *, at_bound: bool, least: float = LEAST) -> str:
    """The word for a noise that was scaled to epsilon as far as that goes.

    ``at_bound``: whether it has the largest length that is allowed. ``least``: the share of epsilon that is enough.
    """
    if influence >= least * epsilon:
        return "calibrated"
    return "bound" if at_bound else "unreachable"


def worst(endings: Sequence[str]) -> str:
    """The word for several noises: one of those that warn, if there is one."""
    return next((word for word in NO_NOISE if word in endings), endings[0])


def warn(ending: str, influence: float, epsilon: float | None, steps: int, round: int | None) -> None:
    """Warn on the main process if a noise that ended so is not what was wished for; ``round`` names it, if known."""
    if epsilon is not None and ending in _ADVICE and rank_and_world_size()[0] == 0:
        text = _ADVICE[ending].format(influence=influence, epsilon=epsilon, steps=steps)
        logger.warning(text if round is None else f"round {round}: {text}")
