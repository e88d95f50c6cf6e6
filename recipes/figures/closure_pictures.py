"""Figure 4: is the set of epsilon-noises nearly a linear space? Scaled noises, and combinations of pairs (A.5)."""

import hashlib
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from figures.bench import Bench
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.artifact import NullspaceNoise, bank_file_name, load_noise_bank
from hf_nullspace.noise.calibration import scale_to_influence
from hf_nullspace.noise.closure import Combinations, Scaling, combinations, scaling
from hf_nullspace.noise.influence import permuted

QUOTED = (
    "98 noises of epsilon 0.03, influence 0.035 to 0.042 on the validation set: the influence of alpha v is less than "
    "alpha epsilon, and alpha_1 + alpha_2 = 1 lies well within the contour 0.035 (mean of 10 pairs)"
)


def learned_bank(bench: Bench, settings: NoiseSettings, count: int, folder: Path) -> list[NullspaceNoise]:
    """``count`` noises of the model, each from a start of its own; kept in ``folder`` one by one."""
    missing = [index for index in range(count) if not (folder / bank_file_name(index)).exists()]
    for index in bench.each(missing, lambda: bench.cost(settings)):
        noise, _ = bench.learn(settings, index, f"noise {index + 1} of {count}")
        if bench.config.process_index == 0:
            noise.save(folder / bank_file_name(index))
    if bench.config.world_size > 1:
        torch.distributed.barrier()
    return load_noise_bank(folder)[:count]


def whose(noises: Sequence[NullspaceNoise], bench: Bench) -> str:
    """Whether the noises were learned on the weights of the bench's model, in words."""
    others = sum(noise.provenance.model_sha256 != bench.model_sha256 for noise in noises)
    if not others:
        return f"{len(noises)} noises of this model"
    return (
        f"{others} of {len(noises)} noises were learned on other weights; their influence on this model is not epsilon"
    )


def pairs_of(count: int, pairs: int, seed: int) -> list[tuple[int, int]]:
    """``pairs`` different pairs of ``count`` noises, drawn from ``seed``; all of them if there are fewer."""
    every = list(itertools.combinations(range(count), 2))
    return every if pairs >= len(every) else sorted(random.Random(seed).sample(every, pairs))


def measure_scaling(bench: Bench, noises: Sequence[NullspaceNoise], factors: Sequence[float]) -> Scaling:
    """The influence of every noise times every factor; a finished point per noise."""
    rows = []
    for noise in bench.each(noises, lambda: len(factors) * bench.images):

        def make(tensor: Tensor = noise.tensor) -> dict[str, Any]:
            bench.bar.begin("scaling")
            step = bench.counter(len(factors))
            found = scaling(bench.model, bench.batches, [tensor], factors, hook=bench.hook, on_step=step)
            return {"influence": found.influence[0].tolist(), "images": found.images}

        rows.append(bench.kept(make, figure=4, noise=digest(noise), factors=list(factors)))
    return Scaling(tuple(factors), _stacked(rows), rows[0]["images"])


def measure_pairs(
    bench: Bench, pairs: Sequence[tuple[NullspaceNoise, NullspaceNoise]], alphas: Sequence[float]
) -> Combinations:
    """The influence of alpha_1 v_1 + alpha_2 v_2 over the grid; a finished point per pair."""
    surfaces = []
    for pair in bench.each(pairs, lambda: len(alphas) ** 2 * bench.images):

        def make(pair: tuple[NullspaceNoise, NullspaceNoise] = pair) -> dict[str, Any]:
            bench.bar.begin("combining pairs")
            tensors = [(pair[0].tensor, pair[1].tensor)]
            step = bench.counter(len(alphas) ** 2)
            found = combinations(bench.model, bench.batches, tensors, alphas, alphas, hook=bench.hook, on_step=step)
            return {"influence": found.influence[0].tolist(), "images": found.images}

        key = [digest(noise) for noise in pair]
        surfaces.append(bench.kept(make, figure=4, noises=key, alphas=list(alphas)))
    return Combinations(tuple(alphas), tuple(alphas), _stacked(surfaces), surfaces[0]["images"])


def permuted_controls(bench: Bench, noises: Sequence[NullspaceNoise]) -> list[NullspaceNoise]:
    """Every noise with its elements permuted and scaled down to the influence that it has itself on the images."""
    controls = []
    with bench.probe() as probe:
        for index, noise in enumerate(bench.each(noises, lambda: 20 * bench.images)):
            generator = torch.Generator().manual_seed(derive_seed(bench.config.seed, index, 4))
            other = permuted(noise.tensor, generator)

            def make(noise: Tensor = noise.tensor, other: Tensor = other) -> float:
                bench.bar.begin("permuted noises")
                own = probe.held_out_influence(noise.to(probe.device))
                return scale_to_influence(
                    lambda share: probe.held_out_influence(share * other.to(probe.device)), own, tolerance=1e-3
                ).factor

            factor = bench.kept(make, figure=4, permuted=digest(noise), index=index)
            controls.append(NullspaceNoise(factor * other, noise.grid))
    return controls


def digest(noise: NullspaceNoise) -> str:
    """A name for the noise's numbers."""
    return hashlib.sha256(noise.tensor.float().contiguous().numpy().tobytes()).hexdigest()[:16]


def _stacked(found: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([entry["influence"] for entry in found], dtype=torch.float64)


def summary(scaled: Scaling, combined: Combinations | None, contour: float | None = None) -> dict[str, Any]:
    """The two claims of A.5 in numbers, and all influences, for JSON.

    ``contour`` is the influence whose contour the convex combinations should stay within. Unset, it is the smallest
    influence of the noises on these images, as the paper's 0.035 is the smallest of its own (0.035 to 0.042).
    """
    own = scaled.influence[:, scaled.factors.index(1.0)]
    level = float(own.min()) if contour is None else contour
    found: dict[str, Any] = {
        "images": scaled.images,
        "noises": len(own),
        "influence": {"mean": float(own.mean()), "low": float(own.min()), "high": float(own.max())},
        "scaling": {
            "factors": list(scaled.factors),
            "influence": scaled.influence.tolist(),
            "mean": scaled.mean.tolist(),
            "share_below_proportion": scaled.share_below_proportion(),
            "largest_share_of_proportion": _largest_share(scaled),
        },
        "contour": level,
        "combinations": None,
    }
    if combined is not None:
        line = combined.convex()
        found["combinations"] = {
            "pairs": len(combined.influence),
            "alphas": list(combined.alphas_1),
            "influence": combined.influence.tolist(),
            "mean": combined.mean.tolist(),
            "convex": line,
            "largest_inside": max(value for one, two, value in line if 0 < one < 1),
            "share_inside_contour": sum(value <= level for one, _, value in line if 0 < one < 1)
            / sum(0 < one < 1 for one, _, _ in line),
        }
    return found


def _largest_share(scaled: Scaling) -> float:
    """The largest of mean influence(alpha v) / (alpha * mean influence(v)) over 0 < alpha < 1; below 1 is the claim."""
    whole = float(scaled.mean[scaled.factors.index(1.0)])
    pairs = zip(scaled.factors, scaled.mean.tolist(), strict=True)
    return max(value / (factor * whole) for factor, value in pairs if 0 < factor < 1)


def describe(found: dict[str, Any]) -> str:
    """The claims of A.5 and what was found, in a few lines."""
    own, scaled, pairs = found["influence"], found["scaling"], found["combinations"]
    lines = [
        f"{found['noises']} noises on {found['images']} images: influence {own['mean']:.4f} "
        f"[{own['low']:.4f}, {own['high']:.4f}]",
        f"Scaling: influence(alpha v) <= alpha influence(v) in {100 * scaled['share_below_proportion']:.1f}% of all "
        f"noises and alphas; of the means, at most {scaled['largest_share_of_proportion']:.3f} of it",
    ]
    if pairs is not None:
        lines.append(
            f"Convex combinations of {pairs['pairs']} pairs: mean influence up to {pairs['largest_inside']:.4f}; "
            f"{100 * pairs['share_inside_contour']:.0f}% of the points inside the contour {found['contour']:.4f}"
        )
    return "\n".join(lines)


def plot_closure(found: dict[str, Any], path: Path) -> Path:
    """Left the scaling of every noise and the line alpha * influence; right the mean surface, contour, convex line."""
    columns = 1 if found["combinations"] is None else 2
    figure, (axes,) = canvas(4.5 * max(columns, 1.5), columns=columns)
    scaled, level = found["scaling"], found["contour"]
    for row in scaled["influence"]:
        axes[0].plot(scaled["factors"], row, color="C0", alpha=0.25, linewidth=0.8)
    axes[0].plot(scaled["factors"], scaled["mean"], color="C0", marker=".", label="mean influence of alpha v")
    proportional = [factor * found["influence"]["mean"] for factor in scaled["factors"]]
    axes[0].plot(scaled["factors"], proportional, "k--", linewidth=1, label="alpha x mean influence of v")
    if control := found.get("control"):
        axes[0].plot(control["scaling"]["factors"], control["scaling"]["mean"], "C3.:", label="permuted noises instead")
    axes[0].set(xlabel="alpha", ylabel="influence (MSE probability)", title=f"scaling, {found['noises']} noises")
    axes[0].legend(fontsize="small")
    if (pairs := found["combinations"]) is not None:
        alphas, mean = pairs["alphas"], pairs["mean"]
        image = axes[1].contourf(alphas, alphas, list(zip(*mean, strict=True)), levels=12, cmap="viridis")
        figure.colorbar(image, ax=axes[1], label="mean influence")
        if min(map(min, mean)) < level < max(map(max, mean)):
            axes[1].contour(alphas, alphas, list(zip(*mean, strict=True)), levels=[level], colors="red")
        axes[1].plot([], [], color="red", label=f"contour {level:.3g}")
        if control:
            other = list(zip(*control["combinations"]["mean"], strict=True))
            axes[1].contour(alphas, alphas, other, levels=[level], colors="red", linestyles=":")
            axes[1].plot([], [], ":", color="red", label="the same, permuted")
        axes[1].plot([0, 1], [1, 0], "w--", linewidth=1.2, label="alpha 1 + alpha 2 = 1")
        axes[1].set(xlabel="alpha 1", ylabel="alpha 2", title=f"combinations, {pairs['pairs']} pairs", aspect="equal")
        axes[1].legend(fontsize="small", loc="upper right", framealpha=0.6, facecolor="grey")
    return save_png(figure, path, dpi=110)
