"""An empty picture without a display, and how it is kept."""

from pathlib import Path
from typing import Any

from hf_nullspace.files import write_whole


def canvas(count: int) -> tuple[Any, list[Any]]:
    """A figure with ``count`` axes side by side, and the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * max(count, 1.5), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save(figure: Any, path: Path, dpi: int = 150) -> Path:
    """The figure as a PNG, whole or not at all."""
    return write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
