"""The paper's figures and tables, each by one command; on the built-in digits, or on any model and images.

    python recipes/reproduce.py figure2                                     (built-in digits, a minute or two)
    python recipes/reproduce.py figure3 --config recipes/configs/figures-cifar10.yaml --model_name_or_path M
    accelerate launch recipes/reproduce.py figure4 --model_name_or_path M --dataset_name D --noises RUN_OR_HUB_ID

    figure2   influence and matching predictions against the norm over lambda (equation 6), learned against permuted
    figure3   norm of the noise and robustness groups along fine-tuning, relative to the start, beside a plain control
    figure4   scaled noises, and the contour of linear combinations of pairs (A.5)
    table4    dimension of the patch embedding's nullspace (A.4); more of that: recipes/analyze.py
    table5    influence of the noises along figure 3's fine-tuning (A.6)

Tables 1 to 3 compare checkpoints: recipes/finetune.py makes one and its control, recipes/compare.py several arms and
seeds, recipes/evaluate_robustness.py measures any side by side. Writes FIGURE.json and FIGURE.png to --output_dir.
Finished points are kept in points/ and found again, unless model, data or settings changed. What the paper says is
printed beside, marked as quoted.
"""

import contextlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from figures import closure_pictures, influence_against_norm, progress, table_4
from figures.bench import embedding_norm
from figures.setting import FigureArguments, FigureConfig, Setting, claim, load_as_it_is
from hf_nullspace.command_line import UsageError, parse, run
from hf_nullspace.core.files import only_run_in
from hf_nullspace.noise.artifact import NullspaceNoise
from hf_nullspace.noise.bank import NoiseBank
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.records import Records, evaluate_resumably
from hf_nullspace.training.loading import DataArguments, ModelArguments

DIGITS = Path(__file__).parent / "configs" / "figures-digits.yaml"
ARMS = ("nullspace", progress.CONTROL)


def main() -> None:
    figure, words = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if figure not in FIGURES and "--help" not in sys.argv and "-h" not in sys.argv:
        raise UsageError(f"{figure or 'nothing'!r} is no figure; the first word is one of {', '.join(FIGURES)}")
    args, model_args, data_args, config = parse(
        (FigureArguments, ModelArguments, DataArguments, FigureConfig),
        str(__doc__),
        words if figure in FIGURES else ["--help"],
        default_config=lambda words: None if any("_name" in word.partition("=")[0] for word in words) else DIGITS,
    )
    state = PartialState()
    bar = Progress(shown=state.is_main_process and not config.disable_tqdm)
    with only_run_in(str(config.output_dir)), contextlib.closing(bar):  # an error stands on a line of its own
        FIGURES[figure](Setting(args, model_args, data_args, config, state, bar))


# ---- figure 2


def figure_2(setting: Setting) -> None:
    """Noises of growing norm, learned and permuted."""
    args = setting.args
    setting.load(aligned=False)
    settings = [
        replace(
            setting.config.descent_settings(),
            epsilon=None,
            max_steps=args.sweep_steps,
            noise_limit=args.sweep_limit,
            norm_weight=weight,
            norm=args.sweep_norm,
        )
        for weight in args.lambdas
    ]
    points = []
    with setting.bench(setting.classifier.model) as bench:
        for point in influence_against_norm.sweep(bench, settings, args.seeds, raw_permutation=args.raw_permutation):
            points.append(point)
            setting.say(influence_against_norm.line_of(point))
        scale = embedding_norm(bench)
    rows = influence_against_norm.curves(points)
    setting.say(f"\n{influence_against_norm.table(rows)}\n\nCentred norm of an image's own embeddings: {scale:.1f}")
    setting.say(f"Quoted from the paper: {influence_against_norm.QUOTED}\n")
    found = {"images": len(setting.eval_set), "points": points, "curves": rows, "embedding_norm": scale}
    picture = partial(influence_against_norm.plot_sweep, points, scale)
    setting.keep("figure2", found, influence_against_norm.QUOTED, picture)


# ---- figure 3 and table 5


def figure_3(setting: Setting) -> None:
    """The norm of the noise and the robustness groups along fine-tuning."""
    args, config = setting.args, setting.config
    conditions = args.conditions()
    setting.load(aligned=True)
    preprocessing = setting.classifier.preprocessing
    runs: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in ARMS}
    histories: list[list[dict[str, Any]]] = []
    steps_taken: list[int] = []
    for seed in range(config.seed, config.seed + args.runs):
        for arm in ARMS:
            checkpoints, history = fine_tune(setting, arm, seed)
            histories += [history] if history else []
            points = []
            for step, model in progress.models_along(setting.classifier, checkpoints, config.device):
                with setting.bench(model, steps_taken) as bench:
                    noises = progress.noise_sizes(bench, config.descent_settings(), args.noises_per_round)
                results, _ = evaluate_resumably(
                    Records(setting.output / "points"),
                    PixelModel(model, preprocessing.mean, preprocessing.std),
                    setting.eval_set,
                    {str(condition): condition for condition in conditions},
                    batch_size=config.per_device_eval_batch_size,
                    seed=config.seed,
                    dtype="float32",
                    progress=setting.bar,
                )
                points.append(progress.point(step, list(results.values()), conditions, noises))
                setting.say(progress.line_of(arm, seed, points[-1]))
            runs[arm].append(points)
    arms = {arm: progress.relative(points) for arm, points in runs.items()}
    last = progress.differences(runs[progress.CONTROL], runs["nullspace"])
    setting.say(f"\n{progress.progress_lines(arms)}\n\n{progress.differences_line(last)}")
    setting.say(f"Quoted from the paper: {progress.QUOTED}\n")
    rounds = [[{name: e[name] for name in e if name not in ("trace", "seconds")} for e in h] for h in histories]
    found = {"images": len(setting.eval_set), "arms": arms, "nullspace_minus_plain_in_points": last, "runs": runs}
    picture = partial(progress.plot_progress, arms, histories)
    setting.keep("figure3", found | {"rounds": rounds}, progress.QUOTED, picture)


def table_5(setting: Setting) -> None:
    """The influence of the noises that were trained on: where they stopped, and on images that nobody learned on."""
    setting.load(aligned=True)
    runs = []
    for seed in range(setting.config.seed, setting.config.seed + setting.args.runs):
        checkpoints, history = fine_tune(setting, "nullspace", seed)
        rows = []
        models = progress.models_along(setting.classifier, checkpoints, setting.config.device)
        for entry, (step, model) in zip(history, models, strict=False):  # no noise was learned on the last one
            with setting.bench(model) as bench:
                rows.append(progress.table_5_row(bench, step, entry, run_folder(setting, "nullspace", seed)))
        setting.say(f"\nSeed {seed}\n\n{progress.table_5_lines(rows)}\n")
        runs.append(rows)
    found = {"images": len(setting.eval_set), "epsilon": setting.config.epsilon, "runs": runs}
    setting.keep("table5", found, progress.TABLE_5, partial(progress.plot_table_5, runs, setting.config.epsilon))


def run_folder(setting: Setting, arm: str, seed: int) -> Path:
    """Where a fine-tuning of figure 3 and table 5 lies."""
    return setting.output / "runs" / f"{arm}-{seed}"


def fine_tune(setting: Setting, arm: str, seed: int) -> tuple[dict[int, Path], list[dict[str, Any]]]:
    """One fine-tuning with a checkpoint per round, or what an earlier start of this command left of it."""
    folder = run_folder(setting, arm, seed)
    with setting.state.main_process_first():
        claim(folder, {"training": setting.config.to_dict()})
    images = setting.images(seed)
    return progress.fine_tune(setting.classifier, setting.config, images, arm, seed, folder, setting.say)


# ---- figure 4


def figure_4(setting: Setting) -> None:
    """Scaled noises, and linear combinations of pairs."""
    args, config = setting.args, setting.config
    setting.load(aligned=False)
    grid = [step / args.grid for step in range(args.grid + 1)]
    with setting.bench(setting.classifier.model) as bench:
        if args.noises is None:
            settings = config.descent_settings()
            bank = setting.output / "banks" / bench.records.key(learning=bench.learning(settings))[:8]
            noises = closure_pictures.learned_bank(bench, settings, args.noise_count, bank)
        else:
            noises = list(NoiseBank.from_pretrained(args.noises))[: args.noise_count]
            setting.say(closure_pictures.whose(noises, bench))
        pairs = closure_pictures.pairs_of(len(noises), args.pairs, config.seed)

        def measured(noises: list[NullspaceNoise], contour: float | None) -> dict[str, Any]:
            scaled = closure_pictures.measure_scaling(bench, noises, grid)
            both = [(noises[one], noises[two]) for one, two in pairs]
            combined = closure_pictures.measure_pairs(bench, both, grid) if both else None
            return closure_pictures.summary(scaled, combined, contour)

        found = measured(noises, args.contour)
        setting.say(f"\n{closure_pictures.describe(found)}")
        if args.closure_control:
            found["control"] = measured(closure_pictures.permuted_controls(bench, noises), found["contour"])
            setting.say(f"Permuted, at the same influence:\n{closure_pictures.describe(found['control'])}")
    setting.say(f"Quoted from the paper: {closure_pictures.QUOTED}\n")
    setting.keep("figure4", found, closure_pictures.QUOTED, partial(closure_pictures.plot_closure, found))


# ---- table 4


def table_4_of_the_paper(setting: Setting) -> None:
    """The dimension of the nullspace of models and configurations."""
    args, model = setting.args, setting.model_args.model_name_or_path
    setting.say(table_4.HEADER)
    rows: list[dict[str, Any]] = []

    def load(name: str) -> nn.Module:
        return load_as_it_is(ModelArguments(model_name_or_path=name)).model

    for row in table_4.table_4([*args.table4, *([model] if model else [])], load, seed=setting.config.seed):
        rows.append(row)
        setting.say(table_4.line_of(row))
    setting.say(f"'paper' is quoted; {table_4.remark(rows) or 'all as in the paper'}")
    quoted = {f"{features}:{patch}": dimension for (features, patch), dimension in table_4.TABLE_4.items()}
    setting.keep("table4", {"rows": rows}, quoted, partial(table_4.plot_table_4, rows))


FIGURES = {
    "figure2": figure_2,
    "figure3": figure_3,
    "figure4": figure_4,
    "table4": table_4_of_the_paper,
    "table5": table_5,
}

if __name__ == "__main__":
    run(main)
