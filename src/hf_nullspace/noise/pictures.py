"""Pictures of noises: the nearest change of an image, the norm of every patch, a bank over its rounds, the learning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.pixels import pixel_preimage


def plot_noise(
    tensor: Tensor, grid: tuple[int, int], path: Path | str, model: nn.Module | None = None, image_processor: Any = None
) -> dict[str, float]:
    """A noise (1, N, D) over a grid (h, w) as a PNG: the norm of every patch; with its ``model`` also its preimage.

    The preimage is the least-squares one (:func:`pixel_preimage`), in pixels of [0, 1] if the image processor is given
    and else in ``pixel_values``, drawn around grey and stretched to the full range. Returns what was drawn of it, empty
    without a model: ``largest``, the largest entry, and ``residual``, which part of the noise no image can cause.

    Raises:
        NotAViTError, ValueError: if the noise is not of this model.
    """
    columns = 2 if model is not None else 1
    figure, (axes,) = canvas(4.2 * columns, columns=columns)
    drawn: dict[str, float] = {}
    if model is not None:
        preimage = pixel_preimage(PatchNullspace.from_model(model), tensor, grid)
        if image_processor is not None:
            change = preimage.pixels(Preprocessing.from_processor(image_processor).std)[0]
        else:
            change = preimage.pixel_values()[0]
        drawn = {"largest": float(change.abs().max()), "residual": preimage.residual}
        shown = 0.5 + change / (2 * drawn["largest"] or 1.0)
        grey = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0} if len(shown) == 1 else {}
        axes[0].imshow(shown[:3].permute(1, 2, 0).squeeze(-1).numpy(), interpolation="nearest", **grey)
        axes[0].set_title(
            f"nearest change of an image, from -{drawn['largest']:.3g} to {drawn['largest']:.3g}",
            fontsize=9,
        )
    norms = torch.linalg.vector_norm(tensor[0].detach().cpu().double(), dim=-1).reshape(grid)
    shades = axes[-1].imshow(norms.numpy(), interpolation="nearest", vmin=0.0)
    axes[-1].set_title("norm of the noise on every patch", fontsize=9)
    figure.colorbar(shades, ax=axes[-1])
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    save_png(figure, path)
    return drawn


def plot_bank(configs: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """Influence, norm and centred norm of every noise of a bank over its number, as a PNG.

    ``configs`` are those of the noises (:meth:`NullspaceNoise.config`); an influence that was not measured is left out.
    """
    figure, ((influence, norm),) = canvas(8.4, columns=2)
    known = [(k, config["provenance"]["influence"]) for k, config in enumerate(configs)]
    points = [(k, value) for k, value in known if value is not None]
    influence.plot([k for k, _ in points], [value for _, value in points], "o-")
    epsilons = {config["provenance"]["epsilon"] for config in configs} - {None}
    for epsilon in sorted(epsilons):
        influence.axhline(epsilon, color="black", linestyle="--", linewidth=1, label=f"epsilon = {epsilon:g}")
    influence.set(xlabel="noise", ylabel="influence on held-out images", ylim=(0, None))
    for name in ("norm", "centred_norm"):
        norm.plot(range(len(configs)), [config[name] for config in configs], "o-", label=name.replace("_", " "))
    norm.set(xlabel="noise", ylabel="norm", ylim=(0, None))
    for ax in (influence, norm):
        ax.xaxis.get_major_locator().set_params(integer=True)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
    return save_png(figure, path)


def plot_history(rounds: Sequence[dict[str, Any]], epsilon: float | None, path: Path | str) -> Path:
    """Influence and centred norm over the noise steps, one line per round, as a PNG.

    ``rounds`` are entries of ``nullspace_history.json`` (:meth:`NoiseHistory.summary`).
    """
    figure, ((influence, norm),) = canvas(9, columns=2)
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
    return save_png(figure, path)
