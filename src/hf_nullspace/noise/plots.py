"""The course of noise learning as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_nullspace.core.files import write_whole


def plot_history(rounds: Sequence[dict[str, Any]], epsilon: float | None, path: Path | str) -> Path:
    """Influence and centred norm over the noise steps, one line per round, as a PNG.

    ``rounds`` are entries of ``nullspace_history.json`` (:meth:`NoiseHistory.summary`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    influence, norm = figure.subplots(1, 2)
    colours = [f"C{index}" if len(rounds) <= 10 else (0.1, 0.3, 0.2 + 0.8 * index / len(rounds))
               for index in range(len(rounds))]  # fmt: skip
    for colour, entry in zip(colours, rounds, strict=True):
        steps = [index * entry["trace_stride"] for index in range(len(entry["trace"]["influence"]))]
        marker = "o" if len(steps) < 3 else None
        label = f"round {entry['round']}" if len(rounds) <= 10 and "round" in entry else None
        influence.plot(steps, entry["trace"]["influence"], color=colour, marker=marker, label=label)
        norm.plot(steps, entry["trace"]["centred_norm"], color=colour, marker=marker)
    if epsilon is not None:
        influence.axhline(epsilon, color="black", linestyle="--", linewidth=1, label=f"epsilon = {epsilon:g}")
    influence.set(xlabel="noise step", ylabel="influence on the minibatch", yscale="log")
    norm.set(xlabel="noise step", ylabel="centred norm of the noise")
    norm.set_ylim(0, 1.1 * norm.get_ylim()[1])
    for axes in (influence, norm):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if influence.get_legend_handles_labels()[0]:
        influence.legend(fontsize="small")
    return write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
