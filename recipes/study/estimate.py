"""How long what is left of a study will take, roughly: passes of one image, divided by what finished pieces managed."""

from collections.abc import Sequence
from typing import Any

from study.pieces import Piece, Workshop

NOISE_STEPS = 225
"""Gradient steps per round that are assumed of Algorithm 1 (measured from A = 3 on a ViT of 1.2 M parameters)."""
SPEED = 550.0
"""Forward passes of one image per second that are assumed until a piece was timed."""


def work(piece: Piece, config: Any) -> float:
    """Forward passes of one image that a piece takes, roughly; ``config`` is the NullspaceConfig of its run."""
    if piece.planned is not None:
        return float(len(piece.places) * piece.planned.condition.cost)
    if config is None:
        return 0.0
    names = config.objective.split("+")
    views = len({view for name in names for view in _VIEWS.get(name, ("clean", "other"))})
    images = config.rounds * config.steps_per_round * config.global_batch_size
    attacks = sum(name in ("madry", "trades") for name in names)
    learns = bool({"nullspace", "permuted"} & set(names))
    if config.noise_learner == "boundary":
        each = 2 * config.noise_max_steps * config.noise_batch_size + config.noise_pool_images
    else:
        each = 3 * min(config.noise_max_steps, NOISE_STEPS) * config.noise_batch_size
    noise = config.rounds * ((each if learns else 0) + 10 * config.held_out_images)
    noisy = learns or "random" in names
    return float(images * (3 * views + 2 * config.attack_steps * attacks) + (noise if noisy else 0))


_VIEWS = {"madry": ("adversarial",), "trades": ("clean", "divergent"), "plain": ("clean", "again")}


def seconds_left(pieces: Sequence[tuple[Piece, float]], shop: Workshop) -> tuple[float, bool]:
    """Seconds that the unfinished of (piece, work) will take, and whether finished ones were there to measure by.

    Trainings and measurements run at speeds of their own.
    """
    total, measured = 0.0, False
    for trains in (True, False):
        mine = [(piece, load) for piece, load in pieces if (piece.planned is None) == trains and load]
        done = [(load, _seconds(found)) for piece, load in mine if (found := shop.finished(piece))]
        speed = sum(load for load, _ in done) / max(sum(seconds for _, seconds in done), 1e-9) if done else SPEED
        measured |= bool(done)
        total += sum(load for piece, load in mine if shop.finished(piece) is None) / speed
    return total, measured


def overview(pieces: Sequence[tuple[Piece, float]], shop: Workshop) -> list[str]:
    """A line for each training, and one for the measurements of a run on a slice, of (piece, work), in their order."""
    groups: dict[str, list[tuple[Piece, float]]] = {}
    for piece, load in pieces:
        name = f"train {piece.run}" if piece.slice is None else f"measure {piece.run} ({piece.slice.name})"
        groups.setdefault(name, []).append((piece, load))
    lines = []
    for name, mine in groups.items():
        left = [load for piece, load in mine if shop.finished(piece) is None]
        state = f"{len(mine) - len(left)} of {len(mine)} done, {sum(left):,.0f} passes left" if left else "finished"
        lines.append(f"{name}: {state}")
    return lines


def _seconds(found: dict[str, Any]) -> float:
    return float(found["seconds"] if "seconds" in found else (found["cost"] or {"seconds": 0.0})["seconds"])
