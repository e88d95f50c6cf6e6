"""Compare objectives from one checkpoint: does it help, against what, and at what price.

    accelerate launch recipes/compare.py --config recipes/configs/study-digits.yaml
    accelerate launch recipes/compare.py --config recipes/configs/study-cifar10.yaml --max_minutes 30
    accelerate launch recipes/compare.py --config recipes/configs/study-cifar10.yaml --dry_run

Every arm is an objective with its settings. First the learning rate of each is chosen on the selection images with one
seed; then the smallest difference that can be seen is written down (selection.json); then every arm is trained with
every seed and measured on the report images, once. A study that was stopped or killed goes on where it was. Two
processes may share one, each with --only ARM .... Writes results.json (with every image's outcome), .md and pictures.
"""

import copy
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from hf_nullspace import NullspaceConfig, NullspaceTrainer
from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import only_run_in
from hf_nullspace.core.settings import check_numbers, check_output_dir
from hf_nullspace.noise.artifact import model_hash
from hf_nullspace.training.base_model import BASE_RANGES, train_base_model
from hf_nullspace.training.data import collate
from hf_nullspace.training.loading import (
    DataArguments,
    ModelArguments,
    evaluation_images,
    load_classifier,
    load_rows,
    training_images,
)
from hf_nullspace.training.preflight import check_images, lack_of_room
from study.design import Run, Study, make_study, mapping_of
from study.images import ImageStore
from study.report import complete, write_study
from study.schedule import content_of, overview, schedule_of, seconds_left, work, work_through
from study.tasks import Runner


@dataclass
class CompareArguments:
    """The design of the study, and how much of it to do now."""

    _group_title: ClassVar[str] = "Study"

    output_dir: str = option("outputs/study", "Folder of the study; started again it goes on there.")
    arms: str = option("{}", "Name -> fields of NullspaceConfig, and 'seeds' or 'learning_rate_of' (mapping, or JSON).")
    control: str = option("plain", "The arm that the others are compared with.")
    training: str = option("{}", "Fields of NullspaceConfig for all arms (mapping, or JSON).")
    seeds: list[int] = option([0, 1, 2], "Seeds of every arm; the first also chooses the learning rate.")
    learning_rates: list[float] = option([1e-4], "The grid that the learning rate of each arm is chosen from.")
    conditions: list[str] = option(["clean"], "What is measured: entries as in a suite's YAML.")
    average: list[str] = option(
        ["clean", "FGSM(eps=1/255", "PGD(eps=1/255", "cells"],
        "Conditions (or how they begin) in the average, and 'cells': the mean of the generated corruptions.",
    )
    report: str = option("0:8000", "Test images that are reported, FIRST:STOP.")
    selection: str | None = option(None, "Test images that learning rates are chosen on, FIRST:STOP.")
    selection_limit: int | None = option(None, "At most so many images of the selection per condition.")
    limit: int | None = option(None, "At most so many report images of a condition that has no limit of its own.")
    eval_seed: int = option(0, "Seed of corruptions and random starts.")
    eval_batch_size: int = option(256, "Images per forward pass of a measurement.")
    bf16: bool = option(False, "Train in bfloat16 (autocast).")
    eval_bf16: bool = option(False, "Measure in bfloat16 (autocast).")
    use_cpu: bool = option(False, "Do not use a GPU.")
    base_epochs: float = option(30, "Small ViT, where no model is named: epochs of its training.")
    base_learning_rate: float = option(2e-3, "Small ViT: learning rate of its training.")
    base_batch_size: int = option(64, "Small ViT: images per step of its training.")
    resamples: int = option(2000, "Bootstrap samples of the intervals.")
    only: list[str] = option([], "Do only these arms now ('before' is the checkpoint itself).")
    max_minutes: float | None = option(None, "Begin nothing after so many minutes; a training ends at a checkpoint.")
    dry_run: bool = option(False, "Print what is finished, what is left and an estimate of the time; do nothing.")
    overwrite: bool = option(False, "Train runs anew whose settings have changed.")
    render: str | None = option(
        None, "A results.json: write its tables and pictures into output_dir, and do nothing else."
    )

    def __post_init__(self) -> None:
        at_least_1 = dict.fromkeys(("selection_limit", "limit", "eval_batch_size", "resamples"), "int [1, inf)")
        seeds = dict.fromkeys(("seeds", "eval_seed"), "int [0, 4294967295]")
        check_numbers(
            self, BASE_RANGES | at_least_1 | seeds | {"learning_rates": "(0, inf)", "max_minutes": "[0, inf)"}
        )
        check_output_dir(self.output_dir)
        for name in ("seeds", "learning_rates", "only"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UsageError(f"{name}={getattr(self, name)}: expected each once")


def main() -> None:
    args, model_args, data_args = parse((CompareArguments, ModelArguments, DataArguments), str(__doc__))
    if args.render is not None:
        render(Path(args.render), Path(args.output_dir), args.resamples)
        return
    deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    study = make_study(
        args.arms,
        control=args.control,
        seeds=args.seeds,
        learning_rates=args.learning_rates,
        conditions=args.conditions,
        average=args.average,
        report=args.report,
        selection=args.selection,
        selection_limit=args.selection_limit,
        limit=args.limit,
        seed=args.eval_seed,
    )
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
        own = {"learning_rate": one.learning_rate, "seed": one.seed, "output_dir": str(folder)}
        machine = {"bf16": args.bf16, "use_cpu": args.use_cpu, "report_to": "none", "disable_tqdm": True}
        try:
            return NullspaceConfig(**machine, **(training | dict(study.arms[one.arm].settings) | own))
        except (TypeError, ValueError) as error:
            raise UsageError(f"arm {one.arm!r}: {error}") from error

    def images_of(seed: int) -> Any:
        return training_images(data_args, train_rows, classifier, seed)

    def trainer_of(one: Run, folder: Path) -> NullspaceTrainer:
        config = config_of(one, folder)
        config.save_strategy, config.save_steps = "steps", config.steps_per_round
        return NullspaceTrainer(
            copy.deepcopy(classifier.model),
            config,
            train_dataset=images_of(config.seed),
            data_collator=collate,
            processing_class=classifier.image_processor,
        )

    runs = study.report_runs(dict.fromkeys(study.arms, args.learning_rates[0]))[1:]
    configs = [config_of(one, output / "base") for one in runs]
    images = images_of(args.seeds[0])
    for config in configs:
        check_images(config, len(images))
    if warning := lack_of_room(classifier.model, configs[0], trainings=len(configs)):
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
        shared_settings={"base": base, "data": asdict(data_args)},
        device=configs[0].device,
        dtype="bf16" if args.eval_bf16 else "float32",
        batch_size=args.eval_batch_size,
        overwrite=args.overwrite,
        attn_implementation=model_args.attn_implementation,
    )

    # Work
    if args.dry_run:
        show_what_is_left(study, runner, lambda one: None if one.seed is None else config_of(one, output / one.folder))
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


def show_what_is_left(study: Study, runner: Runner, config_of: Callable[[Run], NullspaceConfig | None]) -> None:
    """The tasks in their order, and the time that those take which are not finished."""
    schedule = schedule_of(study, runner)
    if schedule.chosen is None:
        say("The learning rates are not chosen yet; the report's are shown with the middle one")
    tasks = list(dict.fromkeys(schedule.selection + schedule.report))
    loads = [(task, work(task, config_of(task.run))) for task in tasks]
    for line in overview(loads, runner):
        say(line)
    seconds, timed = seconds_left(loads, runner)
    left = sum(runner.finished(task) is None for task in tasks)
    basis = "by the speed of the finished tasks" if timed else "nothing was timed yet"
    say(f"{left} of {len(tasks)} tasks left, about {seconds / 60:.0f} minutes ({basis})")


def where_it_ran(config: NullspaceConfig) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if config.device.type == "cuda" else f"{platform.machine()} CPU"
    return {"commit": commit.stdout.strip(), "device": device, "threads": torch.get_num_threads()}


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run(main)
