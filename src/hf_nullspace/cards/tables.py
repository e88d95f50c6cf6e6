"""The sections of a card that are made of numbers: results with intervals, the verdict in words, settings, cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml
from transformers import TrainingArguments

from hf_nullspace.cards.run_folder import Report, RunFolder
from hf_nullspace.core.text import cell, code, escape, table
from hf_nullspace.noise.history import ENDINGS
from hf_nullspace.robustness.attacks.base import readable
from hf_nullspace.robustness.plans import ATTACKS
from hf_nullspace.robustness.plots import cell as corruption_cell
from hf_nullspace.robustness.report import UNRELIABLE, grouped, signed
from hf_nullspace.robustness.suite import ConditionResult

MOST_ROWS = 40  # longer tables fold their corruption cells away
_NOT_PROTOCOL = {"fingerprints", "versions", "corruption", "severity", "attack", "settings"}
# Of TrainingArguments, what decides the result; the rest belongs to the machine or to logging.
_TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "seed",
    "data_seed",
)  # fmt: skip
_OF_THE_TRAINER = {item.name for item in fields(TrainingArguments)}
_PASSES = {
    "forward": "passes of one image: forward",
    "backward_to_input": "passes of one image: backward to the input",
    "backward_to_parameters": "passes of one image: backward to the parameters",
    "forward_equivalents": "all passes as forward passes",
    "seconds": "seconds of the fine-tuning (wall clock)",
}


def compared(report: Report) -> list[str]:
    """The checkpoints that the subject is compared with: the first, and its control (or the last) of several others."""
    others = [name for name in report.results if name != report.subject]
    return others if len(others) <= 2 else [others[0], report.control if report.control in others[1:] else others[-1]]


def result_tables(report: Report) -> tuple[str, str]:
    """Markdown tables in %: all rows, or, of a long table, the corruption cells in the second one."""
    names, against = list(report.results), compared(report)
    header = ["condition", "images", *names, *(f"{report.subject} - {other}" for other in against)]
    first = report.results[names[0]]
    folds = len(first) > MOST_ROWS
    rest: list[list[str]] = []
    cells: list[list[str]] = []
    for index, result in enumerate(first):
        (cells if folds and corruption_cell(result) else rest).append(condition_row(report, index, against))
    blank = [""] * len(against)
    for title in dict.fromkeys(title for found in report.averages.values() for title in found):
        shown = []
        for name in names:
            value = report.averages.get(name, {}).get(title)
            doubt = any(report.doubts(name, result) for result in report.results[name])
            shown.append("" if value is None else f"{value:.2f}{_mark(doubt)}")
        rest.append([cell(title), "", *shown, *blank])
    rest += [[cell(title), "", *["missing"] * len(names), *blank] for title in grouped(report.missing)]
    header = [cell(title) for title in header]
    return _table(header, rest), _table(header, cells) if cells else ""


def condition_row(report: Report, index: int, against: list[str]) -> list[str]:
    """Every checkpoint's accuracy with its Wilson interval, then the paired differences with theirs."""
    row = {name: results[index] for name, results in report.results.items()}
    subject = row[report.subject]
    scores = [f"{result.score}{_mark(report.doubts(name, result))}" for name, result in row.items()]
    doubt = any(report.doubts(name, row[name]) for name in (*against, report.subject))
    changes = [signed(report.change(other, index)) + _mark(doubt) for other in against]
    return [cell(subject.condition), str(subject.n), *scores, *changes]


def _mark(doubt: Any) -> str:
    return f" {UNRELIABLE}" if doubt else ""


def verdict(report: Report) -> list[str]:
    """What the table says about the subject, in sentences: against the control first, then against the others."""
    if len(report.results) == 1:
        only = code(report.subject)
        return [f"Only {only} was measured: these numbers say nothing about what the fine-tuning changed."]
    others = sorted(compared(report), key=lambda name: name != report.control)
    sentences = [comparison(report, other) for other in others]
    if report.control is None:
        sentences.append(
            "There is no control (the same fine-tuning without noise), so nobody knows what the noise did."
        )
    return sentences


def comparison(report: Report, other: str) -> str:
    """The subject against one checkpoint, counting intervals that lie on one side of zero."""
    control = ", the control (the same fine-tuning without noise)" if other == report.control else ""
    against = f"Against {code(other)}{control}"
    changes = [
        (f"{escape(result.condition)} ({100 * change.value:+.2f})", change)
        for index, result in enumerate(report.results[report.subject])
        if not report.doubts(report.subject, result) and not report.doubts(other, report.results[other][index])
        for change in [report.change(other, index)]
    ]
    if not changes:
        return f"{against}: no condition could be compared; the checks of the evaluation failed."
    better = [name for name, change in changes if change.low > 0]
    worse = [name for name, change in changes if change.high < 0]
    count, same = len(changes), len(changes) - len(better) - len(worse)
    if same == count:
        every = "the interval contains zero" if count == 1 else f"all {count} intervals contain zero"
        return f"{against}: **no difference was measured**; {every}."
    sides = {"better": better, "worse": worse}
    parts = [f"{word} in {len(names)} ({_shortened(names, 12)})" for word, names in sides.items() if names]
    rest = f"; in the other {same} no difference was measured (the interval contains zero)" if same else ""
    text = f"{against}, of {count} conditions (points): {', '.join(parts)}{rest}."
    return text + " About one interval of 95% in twenty excludes zero by chance."


def protocols(report: Report) -> list[str]:
    """One line for every way in which images were measured, with what a reader needs in order to repeat it."""
    ways: dict[str, list[str]] = {}
    for result in report.results[report.subject]:
        ways.setdefault(describe(result), []).append(result.condition)
    lines = [f"Images: {escape(images)}."] if (images := report.context.get("images")) else []
    return lines + [f"{escape(_shortened(conditions, 3))}: {escape(way)}." for way, conditions in ways.items()]


def describe(result: ConditionResult) -> str:
    """The protocol of one result as words: how it was perturbed, how the images were prepared, the seed."""
    known = result.protocol
    words = [] if {"attack", "generated"} & known.keys() else ["the images as they are"]
    if "attack" in known:
        settings = ", ".join(f"{key} {readable(value)}" for key, value in known.get("settings", {}).items())
        words = [f"attack {known['attack']}" + (f" ({settings})" if settings else "")]
    words += [f"{key} {_value(value)}" for key, value in known.items() if key not in _NOT_PROTOCOL]
    return "; ".join([*words, f"seed {result.seed}"])


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shortened(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def doubts(report: Report) -> list[str]:
    """The failed checks, what is missing and why, and what is only a part."""
    lines = [
        f"{UNRELIABLE} {escape(name)}: unreliable, the check *{escape(check.name)}* failed: {escape(check.detail)}"
        for name, answers in report.checks.items()
        for check in answers
        if not check.passed
    ]
    lines += [f"Missing: {escape(title)}: {escape(why)}" for title, why in grouped(report.missing).items()]
    noted = {str(r.protocol["note"]) for results in report.results.values() for r in results if "note" in r.protocol}
    return lines + [f"Note: {escape(note)}" for note in sorted(noted)]


def attacks_not_measured(reports: Iterable[Report]) -> list[str]:
    """The attacks that this package has and no report used."""
    results = [result for report in reports for found in report.results.values() for result in found]
    used = {str(result.protocol.get("attack", "")).partition("(")[0] for result in results}
    return [name for name in ATTACKS if name not in used]


def settings_table(run: RunFolder) -> str:
    """The settings that decide what was trained; "" where nothing recorded them."""
    training, data = run.settings.get("training", {}), run.settings.get("data", {})
    noise = run.noise.get("provenance", {}).get("settings", {})
    rows: dict[str, str] = {}
    if training:
        shown = _shown(training)
        rows["objective"] = shown["objective"]
        rows["length"] = "{rounds} rounds x {steps_per_round} steps of {global_batch_size} images".format(**shown)
        rows["optimizer"] = (
            "{optim}, learning rate {learning_rate} ({lr_scheduler_type}), weight decay {weight_decay}, gradient norm "
            "clipped at {max_grad_norm} (0: not)"
        ).format(**shown)
        rows["precision"] = "bf16" if training.get("bf16") else "fp16" if training.get("fp16") else "float32"
        rows["seed"] = shown["seed"]
        if training.get("ema_decay"):
            start = f", started from {shown['ema_from']}" if training.get("ema_from") else ""
            rows["averaged weights (EMA), in `ema/`"] = f"decay {shown['ema_decay']} per step{start}"
    if run.interpolation:
        rows["interpolated with the checkpoint"] = interpolated(run)
    if data:
        crop = data.get("crop_scale", 1)
        augmentation = [f"random crop of at least {crop:g} of the area"] if crop < 1 else []
        augmentation += ["flip"] if data.get("horizontal_flip") else []
        augmentation += filter(None, (data.get("augmentation") or "").split("+"))
        rows["augmentation"] = " and ".join(augmentation) or "none"
    shown = _shown(noise)
    if "made" in noise:
        rows["noise"] = f"{shown['made']}, scaled to the influence epsilon on held-out images"
    elif noise.get("learner") == "boundary":
        rows["noise"] = (
            "follows the boundary of epsilon {epsilon} for {steps} steps, learning rate {learning_rate}, loss {loss}, "
            "{count} at once, clean logits of {pool_images} images kept"
        ).format(**shown)
    elif noise:
        rows["noise"] = (
            "epsilon {epsilon}, start U(-A, A) with A = {noise_limit}, learning rate {learning_rate}, at most "
            "{max_steps} steps, loss {loss}, weight decay {weight_decay}"
        ).format(**shown)
        rows["stopping test"] = "on {stop_on} images; past the last step: {on_limit}".format(**shown)
    if noise and training.get("noise_mix", "one") != "one":
        rows["noises of a round"] = "{noise_bank_size}, mixed by {noise_mix}".format(**_shown(training))
    return _table(["setting", "value"], rows.items()) if rows else ""


def interpolated(run: RunFolder) -> str:
    """Which alpha was chosen, from which, on which images; and which for the report's other models."""
    found = run.interpolation
    grid = ", ".join(f"{point['alpha']:g}" for point in found["alphas"])
    text = (
        f"alpha = {found['alpha']:g} (0 is the checkpoint, 1 the fine-tuned weights), chosen from {grid} on "
        f"{found['count']} images ({found['images']}): {found['rule']}"
    )
    all_alphas = {name: alpha for report in run.reports for name, alpha in report.context.get("alpha", {}).items()}
    others = [f"{name} {alpha:g}" for name, alpha in all_alphas.items() if name != run.objective]
    return cell(f"{text}. By the same rule: {', '.join(others)}" if others else text)


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: cell(_value(value)) for key, value in values.items()}


def settings_yaml(run: RunFolder) -> str:
    """What ``recipes/finetune.py --config`` takes in order to run it again; "" for a run of another script."""
    groups = run.settings
    if not {"recipe", "data", "training"} <= set(groups):
        return ""
    model = groups.get("model", {})
    own_model = model.get("model_name_or_path") is None  # the run trained its base model itself
    chosen = {
        **{key: value for key, value in model.items() if own_model or key.startswith("model_")},
        **groups["data"],
        **{key: value for key, value in groups["recipe"].items() if own_model or not key.startswith("base_")},
        **{key: value for key, value in groups["training"].items() if key in _TRAINING or key not in _OF_THE_TRAINER},
    }
    given = {key: value for key, value in chosen.items() if value is not None and key != "overwrite"}
    return yaml.safe_dump(given, sort_keys=False, width=110)


def cost_table(run: RunFolder) -> str:
    """What it took: steps, images, noise steps, seconds as recorded, passes where they were counted (training.cost)."""
    training = run.settings.get("training", {})
    rows: dict[str, str] = {}
    if training:
        steps, batch = training["max_steps"], training["global_batch_size"]
        rows["optimizer steps"] = f"{steps:,}"
        rows["training images"] = f"at most {steps * batch:,}, each in two views"
    if run.history:
        taken = [entry["noise_steps"] for entry in run.history]
        ends = [entry["stopped"] for entry in run.history]
        counted = {end: ends.count(end) for end in [*ENDINGS, *ends] if end in ends}
        outcome = ", ".join(f"{count} {ENDINGS.get(end) or cell(end)}" for end, count in counted.items())
        rows["noises"] = f"{len(taken)}: {outcome}"
        each = f"{min(taken)}" if min(taken) == max(taken) else f"{min(taken)} to {max(taken)}"
        rows["noise steps"] = f"{sum(taken):,} ({each} per noise)"
        if training.get("noise_batch_size"):
            rows["images through noise steps"] = f"{sum(taken) * training['noise_batch_size']:,}"
        influences = [entry["influence"] for entry in run.history if entry.get("influence") is not None]
        if influences:
            rows["influence on held-out images"] = f"{min(influences):.4f} to {max(influences):.4f}"
        norms = [entry["centred_norm"] for entry in run.history]
        rows["centred norm of the noises"] = f"{min(norms):.2f} to {max(norms):.2f}"
        rows["seconds for the noises"] = f"{sum(entry['seconds'] for entry in run.history):.0f} (wall clock)"
    rows |= {name: f"{run.cost[key]:,.0f}" for key, name in _PASSES.items() if key in run.cost}
    for report in run.reports:
        seconds = sum(result.seconds for result in report.results[report.subject])
        rows[f"seconds for measuring {code(report.subject)} ({report.file})"] = f"{seconds:.0f} (wall clock)"
    return _table(["cost", ""], rows.items()) if rows else ""


def _table(head: list[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(head, rows))
