"""Saliency maps of several images by several methods: as numbers, compared with the first image, and as a grid."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_nullspace.core.canvas import canvas, save_png
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
    plain = [name for name in methods if name in MAPS]
    parts = []
    for images, classes in zip(pixel_values.split(BATCH), targets.split(BATCH), strict=True):
        found = saliency_maps(model, images, plain, classes) if plain else {}
        if "lrp" in methods:
            found["lrp"] = lrp_map(model, images, classes)
        parts.append(found)
    return {name: torch.cat([found[name] for found in parts]) for name in methods}


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
    found = {name: correlation(one, one[:1]).tolist() for name, one in maps.items()}
    rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    return [{name: None if math.isnan(value) else value for name, value in row.items()} for row in rows]


def correlation_text(value: float | None) -> str:
    return "r undefined" if value is None else f"r = {value:.3f}"


def plot_grid(pixels: Tensor, titles: Sequence[str], maps: dict[str, Tensor], path: Path | str) -> Path:
    """A PNG: one row per image of ``pixels`` (B, C, H, W) in [0, 1], with its title, and its maps on it.

    ``maps`` are (B, h, w) by method; each is drawn from its smallest to its largest value, and from the second row on
    with its correlation with the first row's.
    """
    height, width = pixels.shape[-2:]
    correlations = correlations_with_first(maps)
    rows, columns = len(pixels), 1 + len(maps)
    figure, grid = canvas(2.1 * columns, 2.4 * rows * height / width + 0.2, rows, columns)
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
    return save_png(figure, path, dpi=110)
