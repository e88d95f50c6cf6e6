"""A picture that needs no display, and how it is kept."""

from pathlib import Path
from typing import Any

from hf_nullspace.core.files import write_whole


def canvas(width: float, height: float = 3.6, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of ``width`` x ``height`` inches, and its axes as an array (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_png(figure: Any, path: Path | str, dpi: int = 150) -> Path:
    """The figure as a PNG, whole or not at all."""
    return write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
