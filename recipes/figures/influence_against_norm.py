"""Figure 2: how large a noise may grow before a model sees it: equation 6 over lambda, learned against permuted.

For every lambda and seed a noise is learned with equation 6 from U(-A, A); its influence and the share of predictions
that stay are measured on images that it was not learned on, and again after its elements were permuted: the same size
in another direction.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from figures.bench import Bench, influence_and_match
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.influence import centred_norm, permuted

# Section 2.3 says it in words; figure 2 has no numbers to read off.
QUOTED = "all being fairly benign to the model's predictions; the permuted noise significantly degrades them"


def sweep(
    bench: Bench, settings: Sequence[NoiseSettings], seeds: int, *, raw_permutation: bool = False
) -> Iterator[dict[str, Any]]:
    """One point after the other: every setting (one lambda each) with every seed; finished ones are not learned again.

    Seed i means the same start, the same batches and the same permutation for every lambda. ``raw_permutation``
    permutes the elements as they are, as the paper does (:func:`noise.influence.permuted`).
    """
    work = [(setting, index) for setting in settings for index in range(seeds)]
    with bench.probe() as probe:
        for setting, index in bench.each(work, lambda: bench.cost(settings[0])):

            def make(setting: NoiseSettings = setting, index: int = index) -> dict[str, Any]:
                noise, history = bench.learn(setting, index, f"lambda {setting.norm_weight:g}, seed {index}")
                tensor = noise.tensor.to(probe.device)
                generator = torch.Generator().manual_seed(derive_seed(bench.config.seed, index, 2))
                other = permuted(tensor, generator, raw=raw_permutation)
                return {
                    "lambda": setting.norm_weight,
                    "seed": index,
                    "steps": history.steps,
                    "learned": sizes(tensor) | influence_and_match(probe, tensor),
                    "permuted": sizes(other) | influence_and_match(probe, other),
                }

            yield bench.kept(make, figure=2, learning=bench.learning(setting), index=index, raw=raw_permutation)


def line_of(point: dict[str, Any]) -> str:
    """One finished point in words."""
    learned, other = point["learned"], point["permuted"]
    return (
        f"lambda {point['lambda']:g}, seed {point['seed']}: centred norm {learned['centred_norm']:.2f}; learned: "
        f"influence {learned['influence']:.4f}, match {100 * learned['match']:.1f}%; permuted: "
        f"{other['influence']:.4f}, {100 * other['match']:.1f}%"
    )


def sizes(noise: torch.Tensor) -> dict[str, float]:
    """Raw and centred norm."""
    return {"norm": float(torch.linalg.vector_norm(noise)), "centred_norm": float(centred_norm(noise))}


def curves(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per lambda, ascending: of both noises, mean, smallest and largest over the seeds of every number."""
    rows = []
    for weight in sorted({point["lambda"] for point in points}):
        mine = [point for point in points if point["lambda"] == weight]
        row: dict[str, Any] = {"lambda": weight, "seeds": len(mine)}
        for kind in ("learned", "permuted"):
            row[kind] = {}
            for name in ("norm", "centred_norm", "influence", "match"):
                values = [point[kind][name] for point in mine]
                row[kind][name] = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The curves for a terminal and a page, as Markdown: mean over the seeds, spread in brackets."""

    def cell(found: dict[str, float], digits: int, factor: float = 1.0) -> str:
        mean, low, high = (f"{factor * found[name]:.{digits}f}" for name in ("mean", "low", "high"))
        return mean if low == high else f"{mean} [{low}, {high}]"

    lines = [
        "| lambda | norm | centred norm | match, learned, % | match, permuted, % | influence, learned | permuted |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        learned, other = row["learned"], row["permuted"]
        cells = [
            f"{row['lambda']:g}",
            cell(learned["norm"], 1),
            cell(learned["centred_norm"], 1),
            cell(learned["match"], 1, 100),
            cell(other["match"], 1, 100),
            cell(learned["influence"], 4),
            cell(other["influence"], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_sweep(points: Sequence[dict[str, Any]], embeddings: float, path: Path) -> Path:
    """(a) matching predictions and (b) influence against the centred norm, (c) the norm against lambda.

    ``embeddings`` is the norm of the images' own patch embeddings, drawn as the scale.
    """
    figure, ((match, influence, norm),) = canvas(13.5, columns=3)
    rows = curves(points)
    for kind, style, colour in (("learned", "-", "C0"), ("permuted", "--", "C3")):
        x = [row[kind]["centred_norm"]["mean"] for row in rows]
        for axes, name, factor in ((match, "match", 100), (influence, "influence", 1)):
            axes.plot(x, [factor * row[kind][name]["mean"] for row in rows], style, color=colour, label=kind)
            axes.plot(
                [point[kind]["centred_norm"] for point in points],
                [factor * point[kind][name] for point in points],
                ".",
                color=colour,
                alpha=0.5,
            )
    for axes in (match, influence):
        axes.axvline(embeddings, color="grey", linestyle=":", linewidth=1, label="an image's own embeddings")
    match.set(xlabel="centred norm of the noise", ylabel="equal predictions in %", ylim=(0, 102), title="(a)")
    influence.set(xlabel="centred norm of the noise", ylabel="influence (MSE probability)", title="(b)")
    influence.set_ylim(bottom=0)
    for name, label in (("centred_norm", "centred"), ("norm", "raw")):
        norm.plot([row["lambda"] for row in rows], [row["learned"][name]["mean"] for row in rows], ".-", label=label)
    norm.set(xlabel="lambda", ylabel="norm of the learned noise", title="(c)")
    norm.set_xscale("symlog", linthresh=min([row["lambda"] for row in rows if row["lambda"] > 0], default=1.0))
    norm.set_ylim(bottom=0)
    for axes in (match, influence, norm):
        axes.legend(fontsize="small")
    return save_png(figure, path, dpi=110)
