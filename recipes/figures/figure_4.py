"""Figure 4: is the set of epsilon-noises nearly a linear space? Scaled noises, and combinations of pairs (A.5)."""

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from figures.experiment import Experiment
from figures.setting import Setting
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.seeds import generator_of
from hf_nullspace.noise.artifact import NullspaceNoise, bank_file_name, load_noise_bank
from hf_nullspace.noise.bank import NoiseBank
from hf_nullspace.noise.calibration import scale_into
from hf_nullspace.noise.closure import Combinations, Scaling, combinations, scaling
from hf_nullspace.noise.influence import permuted
from hf_nullspace.noise.probe import Probe, probing

QUOTED = (
    "98 noises of epsilon 0.03, influence 0.035 to 0.042 on the validation set: the influence of alpha v is less than "
    "alpha epsilon, and alpha_1 + alpha_2 = 1 lies well within the contour 0.035 (mean of 10 pairs)"
)


def make(setting: Setting) -> None:
    """Scaled noises, and linear combinations of pairs."""
    args = setting.args
    setting.load(aligned=False)
    grid = [step / args.grid for step in range(args.grid + 1)]
    experiment = Experiment(setting, setting.classifier.model)
    if args.noises is None:
        noises = learned_bank(experiment, args.noise_count)
    else:
        noises = list(NoiseBank.from_pretrained(args.noises))[: args.noise_count]
        setting.say(origin(noises, experiment))
    pairs = pairs_of(len(noises), args.pairs, setting.config.seed)

    def measured(noises: Sequence[NullspaceNoise], contour: float | None) -> dict[str, Any]:
        scaled = measure_scaling(experiment, noises, grid)
        both = [(noises[one], noises[two]) for one, two in pairs]
        return summary(scaled, measure_pairs(experiment, both, grid) if both else None, contour)

    found = measured(noises, args.contour)
    setting.say(f"\n{describe(found)}")
    if args.closure_control:
        found["control"] = measured(permuted_controls(experiment, noises), found["contour"])
        setting.say(f"Permuted, at the same influence:\n{describe(found['control'])}")
    setting.say(f"Quoted from the paper: {QUOTED}\n")
    setting.keep("figure4", found, QUOTED, partial(plot_closure, found))


def learned_bank(experiment: Experiment, count: int) -> list[NullspaceNoise]:
    """``count`` noises of the model, each from a start of its own; kept one by one."""
    config, settings = experiment.config, experiment.config.descent_settings()
    records = experiment.setting.records
    folder = experiment.setting.output / "banks" / records.key(learning=experiment.learning(settings))[:8]
    missing = [index for index in range(count) if not (folder / bank_file_name(index)).exists()]
    for index in experiment.each(missing, lambda: experiment.cost(settings)):
        noise, _ = experiment.learn(settings, index, f"noise {index + 1} of {count}")
        if config.process_index == 0:
            noise.save(folder / bank_file_name(index))
    experiment.setting.state.wait_for_everyone()
    return load_noise_bank(folder)[:count]


def origin(noises: Sequence[NullspaceNoise], experiment: Experiment) -> str:
    """Whether the noises were learned on the weights of the model, in words."""
    others = sum(noise.provenance.model_sha256 != experiment.model_sha256 for noise in noises)
    if not others:
        return f"{len(noises)} noises of this model"
    return (
        f"{others} of {len(noises)} noises were learned on other weights; their influence on this model is not epsilon"
    )


def pairs_of(count: int, pairs: int, seed: int) -> list[tuple[int, int]]:
    """``pairs`` different pairs of ``count`` noises, drawn from ``seed``; all of them if there are fewer."""
    every = list(itertools.combinations(range(count), 2))
    return every if pairs >= len(every) else sorted(random.Random(seed).sample(every, pairs))


def measure_scaling(experiment: Experiment, noises: Sequence[NullspaceNoise], factors: list[float]) -> Scaling:
    """The influence of every noise times every factor; a finished point per noise."""
    measure = partial(scaling, factors=factors)
    keys = [{"noise": digest(noise), "factors": factors} for noise in noises]
    tensors = [noise.tensor for noise in noises]
    influence, images = _influences(experiment, "scaling", tensors, keys, len(factors), measure)
    return Scaling(tuple(factors), influence, images)


def measure_pairs(
    experiment: Experiment, pairs: Sequence[tuple[NullspaceNoise, NullspaceNoise]], alphas: list[float]
) -> Combinations:
    """The influence of alpha_1 v_1 + alpha_2 v_2 over the grid; a finished point per pair."""
    measure = partial(combinations, alphas_1=alphas, alphas_2=alphas)
    keys = [{"noises": [digest(one), digest(two)], "alphas": alphas} for one, two in pairs]
    tensors = [(one.tensor, two.tensor) for one, two in pairs]
    influence, images = _influences(experiment, "combining pairs", tensors, keys, len(alphas) ** 2, measure)
    return Combinations(tuple(alphas), tuple(alphas), influence, images)


def _influences(
    experiment: Experiment,
    title: str,
    items: Sequence[Any],
    keys: Sequence[dict[str, Any]],
    evaluations: int,
    measure: Callable[..., Scaling | Combinations],
) -> tuple[Tensor, int]:
    """What ``measure`` finds for each item, stacked, and the number of images; a finished point per item."""

    def point(item: Any) -> dict[str, Any]:
        found = measure(experiment.model, experiment.batches, [item], on_step=experiment.counter(title, evaluations))
        return {"influence": found.influence[0].tolist(), "images": found.images}

    work = experiment.each(list(zip(items, keys, strict=True)), lambda: evaluations * experiment.images)
    points = [experiment.kept(partial(point, item), figure=4, **key) for item, key in work]
    return torch.tensor([each["influence"] for each in points], dtype=torch.float64), points[0]["images"]


def permuted_controls(experiment: Experiment, noises: Sequence[NullspaceNoise]) -> list[NullspaceNoise]:
    """Every noise with its elements permuted and scaled down to the influence that it has itself on the images."""
    controls = []
    with probing(experiment.model, experiment.batches) as probe:
        for index, noise in enumerate(experiment.each(noises, lambda: 20 * experiment.images)):
            other = permuted(noise.tensor, generator_of(experiment.config.seed, index, 4))
            measure = partial(_factor, experiment, probe, noise.tensor, other)
            factor = experiment.kept(measure, figure=4, permuted=digest(noise), index=index)
            controls.append(NullspaceNoise(factor * other, noise.grid))
    return controls


def _factor(experiment: Experiment, probe: Probe, noise: Tensor, other: Tensor) -> float:
    """The factor, at most 1, that gives ``other`` the influence of ``noise``."""
    experiment.bar.begin("permuted noises")
    own = probe.held_out_influence(noise.to(probe.device))
    other = other.to(probe.device)
    return scale_into(lambda share: probe.held_out_influence(share * other), own, largest=1.0, tolerance=1e-5).factor


def digest(noise: NullspaceNoise) -> str:
    """A name for the noise's numbers."""
    return hashlib.sha256(noise.tensor.float().contiguous().numpy().tobytes()).hexdigest()[:16]


def summary(scaled: Scaling, combined: Combinations | None, contour: float | None = None) -> dict[str, Any]:
    """The two claims of A.5 in numbers, and all influences, for JSON.

    ``contour`` is an influence; the convex combinations should stay within its contour. Unset, it is the smallest
    influence of the noises on these images, as the paper's 0.035 is the smallest of its own (0.035 to 0.042).
    """
    own = scaled.influence[:, scaled.factors.index(1.0)]
    level = float(own.min()) if contour is None else contour
    whole = float(scaled.mean[scaled.factors.index(1.0)])
    means = zip(scaled.factors, scaled.mean.tolist(), strict=True)
    found: dict[str, Any] = {
        "images": scaled.images,
        "noises": len(own),
        "influence": {"mean": float(own.mean()), "low": float(own.min()), "high": float(own.max())},
        "scaling": {
            "factors": list(scaled.factors),
            "influence": scaled.influence.tolist(),
            "mean": scaled.mean.tolist(),
            "share_below_proportion": scaled.share_below_proportion(),
            # of mean influence(alpha v) / (alpha * mean influence(v)); below 1 is the claim
            "largest_share_of_proportion": max(value / (factor * whole) for factor, value in means if 0 < factor < 1),
        },
        "contour": level,
        "combinations": None,
    }
    if combined is not None:
        line = combined.convex()
        inside = [value for one, _, value in line if 0 < one < 1]
        found["combinations"] = {
            "pairs": len(combined.influence),
            "alphas": list(combined.alphas_1),
            "influence": combined.influence.tolist(),
            "mean": combined.mean.tolist(),
            "convex": line,
            "largest_inside": max(inside),
            "share_inside_contour": sum(value <= level for value in inside) / len(inside),
        }
    return found


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
    scaled, level, pairs, control = found["scaling"], found["contour"], found["combinations"], found.get("control")
    figure, (axes,) = canvas(6.75 if pairs is None else 9, columns=1 if pairs is None else 2)
    for row in scaled["influence"]:
        axes[0].plot(scaled["factors"], row, color="C0", alpha=0.25, linewidth=0.8)
    axes[0].plot(scaled["factors"], scaled["mean"], color="C0", marker=".", label="mean influence of alpha v")
    proportional = [factor * found["influence"]["mean"] for factor in scaled["factors"]]
    axes[0].plot(scaled["factors"], proportional, "k--", linewidth=1, label="alpha x mean influence of v")
    if control:
        axes[0].plot(control["scaling"]["factors"], control["scaling"]["mean"], "C3.:", label="permuted noises instead")
    axes[0].set(xlabel="alpha", ylabel="influence (MSE probability)", title=f"scaling, {found['noises']} noises")
    axes[0].legend(fontsize="small")
    if pairs is not None:
        alphas, mean = pairs["alphas"], np.transpose(pairs["mean"])
        image = axes[1].contourf(alphas, alphas, mean, levels=12, cmap="viridis")
        figure.colorbar(image, ax=axes[1], label="mean influence")
        if mean.min() < level < mean.max():
            axes[1].contour(alphas, alphas, mean, levels=[level], colors="red")
        axes[1].plot([], [], color="red", label=f"contour {level:.3g}")
        if control:
            other = np.transpose(control["combinations"]["mean"])
            axes[1].contour(alphas, alphas, other, levels=[level], colors="red", linestyles=":")
            axes[1].plot([], [], ":", color="red", label="the same, permuted")
        axes[1].plot([0, 1], [1, 0], "w--", linewidth=1.2, label="alpha 1 + alpha 2 = 1")
        axes[1].set(xlabel="alpha 1", ylabel="alpha 2", title=f"combinations, {pairs['pairs']} pairs", aspect="equal")
        axes[1].legend(fontsize="small", loc="upper right", framealpha=0.6, facecolor="grey")
    return save_png(figure, path, dpi=110)
