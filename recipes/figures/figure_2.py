"""Figure 2: how large a noise may grow before a model sees it: equation 6 over lambda, learned against permuted.

Permuting its elements gives a noise of the same size in another direction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from figures.experiment import Experiment, embedding_norm, influence_and_match
from figures.setting import Setting
from hf_nullspace.core import text
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.seeds import generator_of
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.influence import centred_norm, permuted
from hf_nullspace.noise.probe import Probe, probing

# Section 2.3 says it in words; figure 2 has no numbers to read off.
QUOTED = "all being fairly benign to the model's predictions; the permuted noise significantly degrades them"


def make(setting: Setting) -> None:
    """Noises of growing norm, learned and permuted."""
    setting.load(aligned=False)
    experiment = Experiment(setting, setting.classifier.model)
    points = []
    with probing(experiment.model, experiment.batches) as probe:
        for point in sweep(experiment, probe):
            points.append(point)
            setting.say(line_of(point))
        scale = embedding_norm(probe)
    rows = curves(points)
    setting.say(f"\n{table(rows)}\n\nCentred norm of an image's own embeddings: {scale:.1f}")
    setting.say(f"Quoted from the paper: {QUOTED}\n")
    found = {"images": len(setting.eval_set), "points": points, "curves": rows, "embedding_norm": scale}
    setting.keep("figure2", found, QUOTED, partial(plot_sweep, points, scale))


def sweep(experiment: Experiment, probe: Probe) -> Iterator[dict[str, Any]]:
    """One point after the other: every lambda with every seed; finished ones are not learned again.

    Seed i means the same start, the same batches and the same permutation for every lambda.
    """
    args = experiment.setting.args
    base = replace(
        experiment.config.descent_settings(),
        epsilon=None,
        max_steps=args.sweep_steps,
        noise_limit=args.sweep_limit,
        norm=args.sweep_norm,  # type: ignore[arg-type]  # checked with the other options
    )
    work = [(replace(base, norm_weight=weight), index) for weight in args.lambdas for index in range(args.seeds)]
    for settings, index in experiment.each(work, lambda: experiment.cost(base)):
        depends_on = {"learning": experiment.learning(settings), "index": index, "raw": args.raw_permutation}
        yield experiment.kept(partial(_point, experiment, probe, settings, index), figure=2, **depends_on)


def _point(experiment: Experiment, probe: Probe, settings: NoiseSettings, index: int) -> dict[str, Any]:
    result, history = experiment.learn(settings, index, f"lambda {settings.norm_weight:g}, seed {index}")
    learned = result.tensor.to(probe.device)
    generator = generator_of(experiment.config.seed, index, 2)
    other = permuted(learned, generator, raw=experiment.setting.args.raw_permutation)
    point: dict[str, Any] = {"lambda": settings.norm_weight, "seed": index, "steps": history.steps}
    for kind, noise in (("learned", learned), ("permuted", other)):
        sizes = {"norm": float(torch.linalg.vector_norm(noise)), "centred_norm": float(centred_norm(noise))}
        point[kind] = sizes | influence_and_match(probe, noise)
    return point


def line_of(point: dict[str, Any]) -> str:
    """One finished point in words."""
    learned, other = point["learned"], point["permuted"]
    return (
        f"lambda {point['lambda']:g}, seed {point['seed']}: centred norm {learned['centred_norm']:.2f}; learned: "
        f"influence {learned['influence']:.4f}, match {100 * learned['match']:.1f}%; permuted: "
        f"{other['influence']:.4f}, {100 * other['match']:.1f}%"
    )


def curves(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per lambda, ascending: of both noises, mean, smallest and largest over the seeds of every number."""
    rows = []
    for weight in sorted({point["lambda"] for point in points}):
        mine = [point for point in points if point["lambda"] == weight]
        row: dict[str, Any] = {"lambda": weight, "seeds": len(mine), "learned": {}, "permuted": {}}
        for kind in ("learned", "permuted"):
            for name in ("norm", "centred_norm", "influence", "match"):
                values = [point[kind][name] for point in mine]
                row[kind][name] = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The curves as Markdown: mean over the seeds, spread in brackets."""

    def cell(found: dict[str, float], digits: int, factor: float = 1.0) -> str:
        mean, low, high = (f"{factor * found[name]:.{digits}f}" for name in ("mean", "low", "high"))
        return mean if low == high else f"{mean} [{low}, {high}]"

    head = ("lambda", "norm", "centred norm", "match, learned, %", "match, permuted, %", "influence, learned")
    cells = [
        [
            f"{row['lambda']:g}",
            cell(row["learned"]["norm"], 1),
            cell(row["learned"]["centred_norm"], 1),
            cell(row["learned"]["match"], 1, 100),
            cell(row["permuted"]["match"], 1, 100),
            cell(row["learned"]["influence"], 4),
            cell(row["permuted"]["influence"], 3),
        ]
        for row in rows
    ]
    return "\n".join(text.table([*head, "permuted"], cells, align="r"))


def plot_sweep(points: Sequence[dict[str, Any]], embeddings: float, path: Path) -> Path:
    """(a) matching predictions and (b) influence against the centred norm, (c) the norm against lambda.

    ``embeddings`` is the norm of the images' own patch embeddings, drawn as the scale.
    """
    figure, ((match, influence, norm),) = canvas(13.5, columns=3)
    rows = curves(points)
    for kind, style, colour in (("learned", "-", "C0"), ("permuted", "--", "C3")):
        means = [row[kind]["centred_norm"]["mean"] for row in rows]
        each = [point[kind]["centred_norm"] for point in points]
        for axes, name, factor in ((match, "match", 100), (influence, "influence", 1)):
            axes.plot(means, [factor * row[kind][name]["mean"] for row in rows], style, color=colour, label=kind)
            axes.plot(each, [factor * point[kind][name] for point in points], ".", color=colour, alpha=0.5)
    for axes in (match, influence):
        axes.axvline(embeddings, color="grey", linestyle=":", linewidth=1, label="an image's own embeddings")
    match.set(xlabel="centred norm of the noise", ylabel="equal predictions in %", ylim=(0, 102), title="(a)")
    influence.set(xlabel="centred norm of the noise", ylabel="influence (MSE probability)", title="(b)")
    for name, label in (("centred_norm", "centred"), ("norm", "raw")):
        norm.plot([row["lambda"] for row in rows], [row["learned"][name]["mean"] for row in rows], ".-", label=label)
    norm.set(xlabel="lambda", ylabel="norm of the learned noise", title="(c)")
    norm.set_xscale("symlog", linthresh=min([row["lambda"] for row in rows if row["lambda"] > 0], default=1.0))
    for axes in (influence, norm):
        axes.set_ylim(bottom=0)
    for axes in (match, influence, norm):
        axes.legend(fontsize="small")
    return save_png(figure, path, dpi=110)
