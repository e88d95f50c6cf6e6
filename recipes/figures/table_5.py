"""Table 5: influence of the noises along figure 3's fine-tuning (A.6)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from figures.experiment import Experiment, influence_and_match
from figures.figure_3 import METHOD, fine_tune, models_along
from figures.setting import Setting
from hf_nullspace.command_line import UsageError
from hf_nullspace.core import text
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.noise.artifact import NullspaceNoise, bank_file_name
from hf_nullspace.noise.probe import probing

# Table 5 of the paper, quoted: fine-tuning step -> influence of that round's noise (epsilon = 0.03).
TABLE_5 = {40: 0.028, 120: 0.027, 160: 0.026, 280: 0.029, 360: 0.028, 440: 0.029, 520: 0.027, 600: 0.025,
           680: 0.028, 760: 0.026}  # fmt: skip


def make(setting: Setting) -> None:
    """The influence of the noises that were trained on: where they stopped, and on images that nobody learned on."""
    setting.load(aligned=True)
    runs = []
    for seed in setting.seeds:
        folder, checkpoints, history = fine_tune(setting, METHOD, seed)
        models = models_along(setting, checkpoints)  # no noise was learned on the last one
        rows = [
            table_5_row(Experiment(setting, model), step, entry, folder)
            for entry, (step, model) in zip(history, models, strict=False)
        ]
        setting.say(f"\nSeed {seed}\n\n{table_5_lines(rows)}\n")
        runs.append(rows)
    epsilon = setting.config.epsilon
    found = {"images": len(setting.eval_set), "epsilon": epsilon, "runs": runs}
    setting.keep("table5", found, TABLE_5, partial(plot_table_5, runs, epsilon))


def table_5_row(experiment: Experiment, step: int, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A round's noise: its influence where it stopped, on held-out training images, and on the measured images.

    ``experiment`` has the model of ``step``, on which the noise was learned; ``entry`` is the round's in the history.
    """
    if entry["step"] != step:
        raise UsageError(f"round {entry['round']} was learned at step {entry['step']}, the model is of step {step}")
    noise = NullspaceNoise.load(folder / "noises" / bank_file_name(entry["round"]))
    with probing(experiment.model, experiment.batches) as probe:
        found = influence_and_match(probe, noise.tensor)
    kept = ("round", "step", "norm", "centred_norm", "noise_steps", "stopped")
    return {name: entry[name] for name in kept} | {
        "minibatch": entry["minibatch_influence"],
        "held_out": entry["influence"],
        "test": found["influence"],
        "match": found["match"],
    }


def table_5_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown; the paper's row is quoted below."""
    head = ("fine-tuning step", "last minibatch", "held-out images", "test images", "predictions kept, %")
    cells = [
        [
            str(row["step"]),
            f"{row['minibatch']:.4f}",
            "-" if row["held_out"] is None else f"{row['held_out']:.4f}",
            f"{row['test']:.4f}",
            f"{100 * row['match']:.1f}",
            f"{row['centred_norm']:.1f}",
        ]
        for row in rows
    ]
    quoted = ", ".join(f"{step}: {value:g}" for step, value in TABLE_5.items())
    lines = text.table([*head, "centred norm"], cells, align="r")
    return "\n".join(lines) + f"\n\nQuoted from the paper (ImageNet, epsilon 0.03), step: influence: {quoted}"


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
