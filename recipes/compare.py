"""Compare objectives from one checkpoint: does it help, against what, and at what price.

    accelerate launch recipes/compare.py --config recipes/configs/study-digits.yaml
    accelerate launch recipes/compare.py --config recipes/configs/study-cifar10.yaml --max_minutes 30

Every arm is an objective with its settings. First the learning rate of each, and how far its weights go from the
checkpoint's (--alphas), are chosen on the selection images with one seed; then every arm is trained with every seed and
measured on the report images, once. A study that was stopped goes on where it was. Writes results.json (with every
image's outcome), .md and pictures.
"""

import copy
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hf_nullspace import NullspaceConfig, NullspaceTrainer
from hf_nullspace.command_line import UsageError, parse, run
from hf_nullspace.core.files import only_run_in
from hf_nullspace.data.image_set import collate
from hf_nullspace.noise.artifact import model_hash
from hf_nullspace.training.base_model import train_base_model
from hf_nullspace.training.loading import (
    DataArguments,
    ModelArguments,
    evaluation_images,
    load_classifier,
    load_rows,
    training_images,
)
from hf_nullspace.training.preflight import check_images, disk_space_warning
from study.arguments import CompareArguments
from study.design import Run, Study, make_study, mapping_of
from study.images import ImageStore
from study.report import complete, write_study
from study.schedule import content_of, what_is_left, work_through
from study.tasks import Runner


def main() -> None:
    args, model_args, data_args = parse((CompareArguments, ModelArguments, DataArguments), str(__doc__))
    if args.render is not None:
        render(Path(args.render), Path(args.output_dir), args.resamples)
        return
    deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    study = make_study(args)
    if unknown := set(args.only) - {*study.arms, "before"}:
        raise UsageError(f"--only {', '.join(sorted(unknown))}: no such arm; arms: before, {', '.join(study.arms)}")
    with only_run_in(args.output_dir):
        work_on(study, args, model_args, data_args, deadline)


def work_on(
    study: Study,
    args: CompareArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    deadline: float | None,
) -> None:
    """Load, do the tasks that are left, report."""
    training = {"logging_steps": 40, "save_total_limit": 2} | mapping_of("training", args.training)
    output = Path(args.output_dir)

    # Load
    train_rows = load_rows(data_args, data_args.train_split)
    torch.manual_seed(args.seeds[0])
    classifier = load_classifier(model_args, train_rows, say)
    test_set = evaluation_images(
        load_rows(data_args, data_args.eval_split), classifier, None, skip_corrupt=data_args.skip_corrupt_images
    )
    for part in (study.report, study.selection):
        if part is not None and part.stop > len(test_set):
            raise UsageError(f"{part.name} {part.first}:{part.stop}, but the test split has {len(test_set)} images")

    def config_of(one: Run, folder: Path) -> NullspaceConfig:
        assert one.choice is not None
        own = {"learning_rate": one.choice.learning_rate, "seed": one.seed, "output_dir": str(folder)}
        machine = {"bf16": args.bf16, "use_cpu": args.use_cpu, "report_to": "none", "disable_tqdm": True}
        try:
            return NullspaceConfig(**machine, **(training | dict(study.arms[one.arm].settings) | own))
        except (TypeError, ValueError) as error:
            raise UsageError(f"arm {one.arm!r}: {error}") from error

    def data_of(arm: str) -> DataArguments:
        try:
            return replace(data_args, **study.arms[arm].data)
        except (TypeError, ValueError) as error:
            raise UsageError(f"arm {arm!r}: {error}") from error

    def trainer_of(one: Run, folder: Path) -> NullspaceTrainer:
        config = config_of(one, folder)
        config.save_strategy, config.save_steps = "steps", config.steps_per_round
        return NullspaceTrainer(
            copy.deepcopy(classifier.model),
            config,
            train_dataset=training_images(data_of(one.arm), train_rows, classifier, config.seed),
            data_collator=collate,
            processing_class=classifier.image_processor,
        )

    runs = study.report_runs(dict.fromkeys(study.arms, study.choices[0]))[1:]
    configs = [config_of(one, output / "base") for one in runs]
    images = training_images(data_args, train_rows, classifier, args.seeds[0])
    for arm in study.arms:
        data_of(arm)  # raises on a setting that is out of range
    for config in configs:
        check_images(config, len(images))
    if warning := disk_space_warning(classifier.model, configs[0], trainings=len(configs)):
        say(warning)
    if model_args.model_name_or_path is None:
        train_base_model(
            classifier, images, output / "base", configs[0], epochs=args.base_epochs,
            learning_rate=args.base_learning_rate, batch_size=args.base_batch_size, say=say,
        )  # fmt: skip
    base = model_hash(classifier.model)
    runner = Runner(
        output,
        ImageStore(output / "images", test_set, args.eval_seed),
        trainer_of,
        lambda: copy.deepcopy(classifier.model),
        lambda one: {"base": base, **asdict(data_of(one.arm))},
        device=configs[0].device,
        dtype="bf16" if args.eval_bf16 else "float32",
        batch_size=args.eval_batch_size,
        overwrite=args.overwrite,
        attn_implementation=model_args.attn_implementation,
    )

    # Work
    if args.dry_run:
        for line in what_is_left(study, runner, lambda one: config_of(one, output / one.folder)):
            say(line)
        return
    if not work_through(study, runner, only=args.only, deadline=deadline, say=say):
        return

    # Report
    described = {"settings": without_paths(asdict(args) | asdict(model_args) | asdict(data_args)), "base": base}
    content = content_of(study, runner, described | where_it_ran(configs[0]))
    show(write_study(complete(content, resamples=args.resamples), output))


def render(results: Path, output: Path, resamples: int) -> None:
    """Tables and pictures again from the outcomes of every image, which ``results`` holds."""
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "study" not in content:
            raise ValueError("it has no 'study'")
    except (OSError, ValueError) as error:
        raise UsageError(f"render={str(results)!r}: no results.json of a study ({error})") from error
    show(write_study(complete(content, resamples=resamples), output))


def show(paths: dict[str, Path]) -> None:
    say("\n" + paths["md"].read_text(encoding="utf-8"))
    say(f"Numbers: {paths['json']}. Pictures: {paths['cost']}, {paths['conditions']}")


def without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Folders of this machine by their last name alone: the results are for others to read."""
    return {
        name: Path(value).name if isinstance(value, str) and ("/" in value) and os.path.exists(value) else value
        for name, value in settings.items()  # os.path: text that is too long for a path is none
    }


def where_it_ran(config: NullspaceConfig) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if config.device.type == "cuda" else f"{platform.machine()} CPU"
    return {"commit": commit.stdout.strip(), "device": device, "threads": torch.get_num_threads()}


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run(main)
