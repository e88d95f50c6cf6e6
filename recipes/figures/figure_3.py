"""Figure 3: robustness groups and norms of noises at every round's checkpoint, with and without the noise."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import set_seed

from figures.experiment import Experiment
from figures.setting import Setting, claim
from hf_nullspace.core import text
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.data.image_set import collate
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.records import evaluate_resumably, from_bits, record
from hf_nullspace.robustness.scores import paired_mean_difference
from hf_nullspace.robustness.suite import Attacked, Clean, Condition, ConditionResult
from hf_nullspace.training.checkpoints import HISTORY_NAME, last_complete_checkpoint, missing_from
from hf_nullspace.training.trainer import NullspaceTrainer

GROUPS = ("clean", "adversarial", "corruption")
METHOD, CONTROL = "nullspace", "plain"
FIRST_INDEX = 1000  # noises that are learned to measure a norm have starts that no round of the training has
QUOTED = "the norm gradually increases along the fine-tuning, and with it the scores in both groups (figure 3)"


def make(setting: Setting) -> None:
    """The norm of the noise and the robustness groups along fine-tuning."""
    setting.load(aligned=True)
    runs: dict[str, list[list[dict[str, Any]]]] = {METHOD: [], CONTROL: []}
    histories = []
    steps_taken: list[int] = []
    for seed in setting.seeds:
        for arm in runs:
            _, checkpoints, history = fine_tune(setting, arm, seed)
            histories += [history] if history else []
            points = []
            for step, model in models_along(setting, checkpoints):
                points.append(point(Experiment(setting, model, steps_taken), step))
                setting.say(line_of(arm, seed, points[-1]))
            runs[arm].append(points)
    arms = {arm: relative(points) for arm, points in runs.items()}
    last = differences(runs[CONTROL], runs[METHOD])
    setting.say(f"\n{progress_lines(arms)}\n\n{differences_line(last)}\nQuoted from the paper: {QUOTED}\n")
    rounds = [[{name: e[name] for name in e if name not in ("trace", "seconds")} for e in h] for h in histories]
    found = {"images": len(setting.eval_set), "arms": arms, "nullspace_minus_plain_in_points": last, "runs": runs}
    setting.keep("figure3", found | {"rounds": rounds}, QUOTED, partial(plot_progress, arms, histories))


def fine_tune(setting: Setting, objective: str, seed: int) -> tuple[Path, dict[int, Path], list[dict[str, Any]]]:
    """A fine-tuning with a checkpoint after every round, or what an earlier start of this command left to do of it.

    Returns:
        its folder, optimizer step -> checkpoint, and the history of the rounds' noises (empty for the control).
    """
    config, folder = setting.config, setting.output / "runs" / f"{objective}-{seed}"
    with setting.state.main_process_first():
        claim(folder, {"training": config.to_dict()})
    args = copy.copy(config)
    args.objective, args.output_dir, args.seed, args.data_seed = objective, str(folder), seed, seed
    args.push_to_hub = False
    rounds, steps = int(config.rounds or 0), int(config.steps_per_round or 0)
    args.save_strategy, args.save_steps, args.save_total_limit = "steps", steps, None
    checkpoints = {step: folder / f"checkpoint-{step}" for step in range(steps, rounds * steps + 1, steps)}
    if any(missing_from(path, args.world_size) for path in checkpoints.values()):
        setting.say(f"Fine-tuning ({objective}, seed {seed}): {rounds} rounds x {steps} steps")
        set_seed(seed)
        trainer = NullspaceTrainer(
            copy.deepcopy(setting.classifier.model),
            args,
            train_dataset=setting.images(seed),
            data_collator=collate,
            processing_class=setting.classifier.image_processor,
        )
        last = last_complete_checkpoint(folder, args.world_size)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.accelerator.wait_for_everyone()
    path = checkpoints[rounds * steps] / HISTORY_NAME
    return folder, checkpoints, json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def models_along(setting: Setting, checkpoints: Mapping[int, Path]) -> Iterator[tuple[int, nn.Module]]:
    """(step, model in eval mode): the start, then every checkpoint."""
    start, device = setting.classifier.model, setting.config.device
    yield 0, start.to(device).eval()
    for step, folder in sorted(checkpoints.items()):
        yield step, type(start).from_pretrained(str(folder), config=start.config).to(device).eval()


def group_of(condition: Condition) -> str:
    """One of ``GROUPS``. The paper's adversarial group also has DAmageNet, its OOD group shifted sets of ImageNet."""
    return {Clean: "clean", Attacked: "adversarial"}.get(type(condition), "corruption")


def point(experiment: Experiment, step: int) -> dict[str, Any]:
    """What is kept of one checkpoint: sizes of noises, every condition with its bits, the groups' means."""
    setting, config = experiment.setting, experiment.config
    noises = noise_sizes(experiment)
    conditions = setting.args.conditions()
    preprocessing = setting.classifier.preprocessing
    results, _ = evaluate_resumably(
        setting.records,
        PixelModel(experiment.model, preprocessing.mean, preprocessing.std),
        setting.eval_set,
        {str(condition): condition for condition in conditions},
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
        dtype="float32",
        progress=setting.bar,
    )
    return summary(step, list(results.values()), conditions, noises)


def noise_sizes(experiment: Experiment) -> list[dict[str, Any]]:
    """Norms and influence of noises of the model; the starts are the same for every model."""
    settings, count = experiment.config.descent_settings(), experiment.setting.args.noises_per_round

    def measure(index: int) -> dict[str, Any]:
        noise, history = experiment.learn(settings, index, f"noise {index - FIRST_INDEX + 1} of {count}")
        names = ("norm", "centred_norm", "influence", "minibatch_influence", "noise_steps", "stopped")
        entry = history.summary(noise.tensor)
        return {name: entry[name] for name in names}

    work = experiment.each(range(FIRST_INDEX, FIRST_INDEX + count), lambda: experiment.cost(settings))
    learning = experiment.learning(settings)
    return [experiment.kept(partial(measure, index), figure=3, learning=learning, index=index) for index in work]


def summary(
    step: int, results: Sequence[ConditionResult], conditions: Sequence[Condition], noises: Any
) -> dict[str, Any]:
    """What is kept of one checkpoint: every condition with its bits, and the groups' means in [0, 1]."""
    kept = ("condition", "n", "correct", "score", "correct_bits")
    entries = [
        {"group": group_of(condition)} | {name: record(result)[name] for name in kept}
        for condition, result in zip(conditions, results, strict=True)
    ]
    groups = {name: float(np.mean([e["score"] for e in entries if e["group"] == name])) for name in GROUPS}
    groups["average"] = float(np.mean(list(groups.values())))
    return {"step": step, "groups": groups, "noises": noises, "conditions": entries}


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
    for group in GROUPS:
        first, second = (
            [from_bits(e["correct_bits"], e["n"]) for run in runs for e in run[-1]["conditions"] if e["group"] == group]
            for runs in (before, after)
        )
        change = paired_mean_difference(first, second)
        found[group] = {"value": 100 * change.value, "low": 100 * change.low, "high": 100 * change.high}
    return found


def differences_line(last: Mapping[str, Mapping[str, float]]) -> str:
    """The differences of the last checkpoints in words."""
    parts = (f"{group} {text.with_interval(**interval)}" for group, interval in last.items())
    return f"nullspace - plain at the end, in points: {', '.join(parts)}"


def progress_lines(arms: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The relative values of all arms as Markdown."""
    names = list(next(iter(arms.values()))[0]["relative"])
    rows = [
        [arm, str(row["step"]), *(f"{row['relative'].get(name, float('nan')):.3f}" for name in names)]
        for arm, rows in arms.items()
        for row in rows
    ]
    return "\n".join(text.table(["arm", "step", *names], rows))


def plot_progress(
    arms: Mapping[str, Sequence[dict[str, Any]]], rounds: Sequence[Sequence[Mapping[str, Any]]], path: Path
) -> Path:
    """Left the groups, right the norms, relative to the start; thick the method, thin the control.

    ``rounds`` are the histories of the method's runs: the norms of the noises that it trained on, as dots.
    """
    figure, ((groups, norms),) = canvas(9, columns=2)
    figure.set_figheight(4.6)  # the legends stand below
    for arm, rows in arms.items():
        style: dict[str, Any] = {"linestyle": "-", "linewidth": 2.2, "alpha": 1.0, "marker": "."}
        if arm == CONTROL:
            style = {"linestyle": "--", "linewidth": 0.9, "alpha": 0.8}
        steps = [row["step"] for row in rows]
        for axes, names in ((groups, (*GROUPS, "average")), (norms, ("centred_norm", "norm"))):
            for place, name in enumerate(name for name in names if name in rows[0]["relative"]):
                label, color = f"{name.replace('_', ' ')}, {arm}", "black" if name == "average" else f"C{place}"
                axes.plot(steps, [row["relative"][name] for row in rows], color=color, label=label, **style)
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
