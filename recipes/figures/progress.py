"""Figure 3 and table 5: what changes along fine-tuning, round by round, with and without the noise.

At every round's checkpoint the robustness groups are measured, and noises are learned from the same starts and batches
at every checkpoint of both arms, so that what differs between two norms is the model.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from figures.bench import Bench, influence_and_match
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.artifact import NullspaceNoise, bank_file_name
from hf_nullspace.robustness.records import from_bits, record
from hf_nullspace.robustness.scores import paired_mean_difference
from hf_nullspace.robustness.suite import Attacked, Clean, Condition, ConditionResult
from hf_nullspace.training.checkpoints import HISTORY_NAME, last_complete_checkpoint, missing_from
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.data import collate
from hf_nullspace.training.loading import Classifier
from hf_nullspace.training.trainer import NullspaceTrainer

GROUPS = ("clean", "adversarial", "corruption")
CONTROL = "plain"
FIRST_INDEX = 1000  # noises that are learned to measure a norm have starts that no round of the training has

# Table 5 of the paper, quoted: fine-tuning step -> influence of that round's noise (epsilon = 0.03).
TABLE_5 = {40: 0.028, 120: 0.027, 160: 0.026, 280: 0.029, 360: 0.028, 440: 0.029, 520: 0.027, 600: 0.025,
           680: 0.028, 760: 0.026}  # fmt: skip
QUOTED = "the norm gradually increases along the fine-tuning, and with it the scores in both groups (figure 3)"


def group_of(condition: Condition) -> str:
    """One of ``GROUPS``. The paper's adversarial group also has DAmageNet, its OOD group shifted sets of ImageNet."""
    return (
        "clean" if isinstance(condition, Clean) else "adversarial" if isinstance(condition, Attacked) else "corruption"
    )


def fine_tune(
    classifier: Classifier,
    config: NullspaceConfig,
    train_set: Any,
    objective: str,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[dict[int, Path], list[dict[str, Any]]]:
    """A fine-tuning with a checkpoint after every round, or what is left to do of it.

    Returns:
        optimizer step -> checkpoint, and the history of the rounds' noises (empty for the control).
    """
    args = copy.copy(config)
    args.objective, args.output_dir, args.seed, args.data_seed = objective, str(folder), seed, seed
    args.push_to_hub = False
    args.save_strategy, args.save_steps, args.save_total_limit = "steps", config.steps_per_round, None  # type: ignore
    rounds, steps = int(config.rounds or 0), int(config.steps_per_round or 0)
    checkpoints = {step: folder / f"checkpoint-{step}" for step in range(steps, rounds * steps + 1, steps)}
    if any(missing_from(path, args.world_size) for path in checkpoints.values()):
        say(f"Fine-tuning ({objective}, seed {seed}): {rounds} rounds x {steps} steps")
        set_seed(seed)
        trainer = NullspaceTrainer(
            copy.deepcopy(classifier.model),
            args,
            train_dataset=train_set,
            data_collator=collate,
            processing_class=classifier.image_processor,
        )
        last = last_complete_checkpoint(folder, args.world_size)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.accelerator.wait_for_everyone()
    path = checkpoints[rounds * steps] / HISTORY_NAME
    return checkpoints, json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def models_along(
    classifier: Classifier, checkpoints: Mapping[int, Path], device: torch.device
) -> Iterator[tuple[int, nn.Module]]:
    """(step, model in eval mode): the start, then every checkpoint."""
    start: Any = classifier.model
    yield 0, start.to(device).eval()
    for step, folder in sorted(checkpoints.items()):
        yield step, type(start).from_pretrained(str(folder), config=start.config).to(device).eval()


def noise_sizes(bench: Bench, settings: NoiseSettings, count: int) -> list[dict[str, Any]]:
    """Norms and influence of ``count`` noises of the bench's model; the starts are the same for every model."""
    found = []
    for index in bench.each(range(FIRST_INDEX, FIRST_INDEX + count), lambda: bench.cost(settings)):

        def make(index: int = index) -> dict[str, Any]:
            noise, history = bench.learn(settings, index, f"noise {index - FIRST_INDEX + 1} of {count}")
            entry = history.summary(noise.tensor)
            names = ("norm", "centred_norm", "influence", "minibatch_influence", "noise_steps", "stopped")
            return {name: entry[name] for name in names}

        found.append(bench.kept(make, figure=3, learning=bench.learning(settings), index=index))
    return found


def point(
    step: int, results: Sequence[ConditionResult], conditions: Sequence[Condition], noises: Any
) -> dict[str, Any]:
    """What is kept of one checkpoint: every condition with its bits, and the groups' means in [0, 1]."""
    scores: dict[str, list[float]] = {group: [] for group in GROUPS}
    for condition, result in zip(conditions, results, strict=True):
        scores[group_of(condition)].append(result.score.value)
    groups = {group: float(np.mean(values)) for group, values in scores.items() if values}
    kept = ("condition", "n", "correct", "score", "correct_bits")
    return {
        "step": step,
        "groups": groups | {"average": float(np.mean(list(groups.values())))},
        "noises": noises,
        "conditions": [{"group": group_of(c)} | {name: record(r)[name] for name in kept}
                       for c, r in zip(conditions, results, strict=True)],
    }  # fmt: skip


def line_of(arm: str, seed: int, found: Mapping[str, Any]) -> str:
    """One finished checkpoint in words."""
    groups = ", ".join(f"{name} {100 * value:.1f}" for name, value in found["groups"].items())
    sizes = ", ".join(f"{noise['centred_norm']:.1f}" for noise in found["noises"])
    return f"{arm}, seed {seed}, step {found['step']}: {groups}; centred norm {sizes or 'not measured'}"


def relative(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per step: the means over the runs of every group and of both norms, divided by their value at step 0."""
    rows = []
    for points in zip(*runs, strict=True):
        names = points[0]["groups"]
        values = {name: float(np.mean([p["groups"][name] for p in points])) for name in names}
        for size in ("norm", "centred_norm"):
            if points[0]["noises"]:
                values[size] = float(np.mean([noise[size] for p in points for noise in p["noises"]]))
        rows.append({"step": points[0]["step"], "value": values})
    for row in rows:
        start = rows[0]["value"]
        row["relative"] = {name: value / start[name] for name, value in row["value"].items() if start[name]}
    return rows


def differences(
    before: Sequence[Sequence[dict[str, Any]]], after: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, Any]:
    """Accuracy of the last checkpoint ``after`` minus ``before`` per group, in points, with 95% intervals over images.

    Both are runs of points, in the same order of seeds; images are resampled jointly for all conditions and seeds.
    """
    found = {}
    groups: dict[str, tuple[list[Any], list[Any]]] = {}
    for one, two in zip(before, after, strict=True):
        for a, b in zip(one[-1]["conditions"], two[-1]["conditions"], strict=True):
            rows = groups.setdefault(a["group"], ([], []))
            rows[0].append(from_bits(a["correct_bits"], a["n"]))
            rows[1].append(from_bits(b["correct_bits"], b["n"]))
    for group, (first, second) in groups.items():
        interval = paired_mean_difference(first, second)
        found[group] = {name: 100 * getattr(interval, name) for name in ("value", "low", "high")}
    return found


def table_5_row(bench: Bench, step: int, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A round's noise: its influence where it stopped, on held-out training images, and on the bench's images.

    ``bench`` has the model of ``step``, on which the noise was learned; ``entry`` is the round's in the history.
    """
    if entry["step"] != step:
        raise ValueError(f"round {entry['round']} was learned at step {entry['step']}, the model is of step {step}")
    noise = NullspaceNoise.load(folder / "noises" / bank_file_name(entry["round"]))
    with bench.probe() as probe:
        found = influence_and_match(probe, noise.tensor.to(probe.device))
    kept = ("round", "step", "norm", "centred_norm", "noise_steps", "stopped")
    return {name: entry[name] for name in kept} | {
        "minibatch": entry["minibatch_influence"],
        "held_out": entry["influence"],
        "test": found["influence"],
        "match": found["match"],
    }


def differences_line(last: Mapping[str, Mapping[str, float]]) -> str:
    """The differences of the last checkpoints in words."""
    parts = (f"{group} {d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" for group, d in last.items())
    return f"nullspace - plain at the end, in points: {', '.join(parts)}"


def table_5_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown; the paper's row is quoted below."""
    lines = [
        "| fine-tuning step | last minibatch | held-out images | test images | predictions kept, % | centred norm |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        held = "-" if row["held_out"] is None else f"{row['held_out']:.4f}"
        lines.append(
            f"| {row['step']} | {row['minibatch']:.4f} | {held} | {row['test']:.4f} | {100 * row['match']:.1f} | "
            f"{row['centred_norm']:.1f} |"
        )
    quoted = ", ".join(f"{step}: {value:g}" for step, value in TABLE_5.items())
    return "\n".join(lines) + f"\n\nQuoted from the paper (ImageNet, epsilon 0.03), step: influence: {quoted}"


def progress_lines(arms: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The relative values of all arms as Markdown."""
    names = list(next(iter(arms.values()))[0]["relative"])
    lines = [f"| arm | step | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    for arm, rows in arms.items():
        for row in rows:
            cells = " | ".join(f"{row['relative'].get(name, float('nan')):.3f}" for name in names)
            lines.append(f"| {arm} | {row['step']} | {cells} |")
    return "\n".join(lines)


def plot_progress(
    arms: Mapping[str, Sequence[dict[str, Any]]], rounds: Sequence[Sequence[Mapping[str, Any]]], path: Path
) -> Path:
    """Left the groups, right the norms, relative to the start; thick the method, thin the control.

    ``rounds`` are the histories of the method's runs: the norms of the noises that it trained on, as dots.
    """
    figure, ((groups, norms),) = canvas(9, columns=2)
    figure.set_figheight(4.6)  # the legends stand below
    for arm, rows in arms.items():
        width, alpha = (0.9, 0.8) if arm == CONTROL else (2.2, 1.0)
        steps = [row["step"] for row in rows]
        for axes, names in ((groups, (*GROUPS, "average")), (norms, ("centred_norm", "norm"))):
            for place, name in enumerate(name for name in names if name in rows[0]["relative"]):
                axes.plot(
                    steps,
                    [row["relative"][name] for row in rows],
                    color="black" if name == "average" else f"C{place}",
                    linestyle="--" if arm == CONTROL else "-",
                    linewidth=width,
                    alpha=alpha,
                    marker="." if arm != CONTROL else None,
                    label=f"{name.replace('_', ' ')}, {arm}",
                )
    for history in rounds:
        start = history[0]["centred_norm"]
        norms.plot([e["step"] for e in history], [e["centred_norm"] / start for e in history], "kx", markersize=5)
    if rounds:
        norms.plot([], [], "kx", markersize=5, label="centred norm, the rounds' own noises")
    for axes, title in ((groups, "accuracy of the groups"), (norms, "norm of the noise")):
        axes.axhline(1, color="grey", linewidth=0.6)
        axes.set(xlabel="fine-tuning step", ylabel="relative to the start", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return save_png(figure, path, dpi=110)


def plot_table_5(runs: Sequence[Sequence[Mapping[str, Any]]], epsilon: float | None, path: Path) -> Path:
    """Influence of every round's noise over the fine-tuning steps; the paper's row, quoted, as crosses."""
    figure, ((axes,),) = canvas(6.75)
    for rows in runs:
        steps = [row["step"] for row in rows]
        for place, (name, label) in enumerate(
            (("minibatch", "last minibatch"), ("held_out", "held-out training images"), ("test", "test images"))
        ):
            if all(row[name] is not None for row in rows):
                axes.plot(steps, [row[name] for row in rows], ".-", color=f"C{place}", label=label)
    axes.plot([], [], "kx", label="paper (quoted; its own steps)")
    last = max(row["step"] for rows in runs for row in rows)
    axes.plot([s for s in TABLE_5 if s <= last], [v for s, v in TABLE_5.items() if s <= last], "kx")
    if epsilon is not None:
        axes.axhline(epsilon, color="black", linestyle="--", linewidth=1, label=f"epsilon = {epsilon:g}")
    axes.set(xlabel="fine-tuning step", ylabel="influence (MSE probability)")
    axes.set_ylim(bottom=0)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize="small")
    return save_png(figure, path, dpi=110)
