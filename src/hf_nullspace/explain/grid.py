"""Saliency maps of several images by several methods: as numbers, held to the first image, and as a grid."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from hf_nullspace.core.files import write_whole
from hf_nullspace.explain.lrp import lrp_map
from hf_nullspace.explain.maps import MAPS, NoClsTokenError, check_has_cls, correlation, saliency_maps
from hf_nullspace.models.attention import NoAttentionWeightsError, pre_norm_layers

TITLES = {"raw": "raw attention", "rollout": "rollout", "grad_cam": "Grad-CAM", "generic": "generic relevance",
          "lrp": "LRP"}  # fmt: skip
BATCH = 8


def all_maps(model: nn.Module, pixel_values: Tensor, methods: Sequence[str], targets: Tensor) -> dict[str, Tensor]:
    """Maps (B, h, w) of ``pixel_values`` (B, C, H, W) by method, names of ``TITLES``, in the order of ``methods``.

    ``targets`` (B,) are the classes that are explained. Raises what ``saliency_maps`` and ``lrp_map`` raise.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in methods}
    plain = [name for name in methods if name in MAPS]
    for images, classes in zip(pixel_values.split(BATCH), targets.split(BATCH), strict=True):
        found = saliency_maps(model, images, plain, classes) if plain else {}
        if "lrp" in methods:
            found["lrp"] = lrp_map(model, images, classes)
        for name in methods:
            parts[name].append(found[name])
    return {name: torch.cat(maps) for name, maps in parts.items()}


def methods_for(model: nn.Module, methods: Sequence[str]) -> tuple[list[str], str | None]:
    """Those of ``methods`` that can explain this model, and why the others cannot (None if all can)."""
    try:
        check_has_cls(model)
        if "lrp" in methods:
            pre_norm_layers(model)
    except NoClsTokenError as error:
        return [], str(error)
    except NoAttentionWeightsError as error:
        return [name for name in methods if name != "lrp"], str(error)
    return list(methods), None


def correlations_with_first(maps: dict[str, Tensor]) -> list[dict[str, float | None]]:
    """For every image, by method, the Pearson correlation of its map with that of the first image, in [-1, 1].

    ``maps`` are (B, h, w) by method. None where one of the two maps is constant: then a correlation means nothing.
    """
    found = {name: correlation(one, one[:1].expand_as(one)).tolist() for name, one in maps.items()}
    count = len(next(iter(found.values()), []))
    return [
        {name: None if math.isnan(values[index]) else values[index] for name, values in found.items()}
        for index in range(count)
    ]


def correlation_text(value: float | None) -> str:
    return "r undefined" if value is None else f"r = {value:.3f}"


def plot_grid(pixels: Tensor, titles: Sequence[str], maps: dict[str, Tensor], path: Path | str) -> Path:
    """A PNG: one row per image of ``pixels`` (B, C, H, W) in [0, 1], with its title, and its maps on it.

    ``maps`` are (B, h, w) by method; each is drawn from its smallest to its largest value, and from the second row on
    with its correlation with the first row's.
    """
    height, width = pixels.shape[-2:]
    correlations = correlations_with_first(maps)
    columns = 1 + len(maps)
    figure = Figure(figsize=(2.1 * columns, 2.4 * len(pixels) * height / width + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(pixels), columns, squeeze=False)
    for row, line in enumerate(grid):
        picture = pixels[row].permute(1, 2, 0).expand(-1, -1, 3).numpy()
        for axes in line:
            axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
            axes.set_axis_off()
        line[0].set_title(titles[row], fontsize="small")
        for name, axes in zip(maps, line[1:], strict=True):
            heat = maps[name][row].numpy()
            axes.imshow(heat, extent=(0, width, height, 0), interpolation="nearest", cmap="turbo", alpha=0.55)
            compared = f": {correlation_text(correlations[row][name])}" if row else ""
            axes.set_title(TITLES[name] + compared, fontsize="small")
    return write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
