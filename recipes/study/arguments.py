"""The options of a study."""

from dataclasses import dataclass
from typing import ClassVar

from hf_nullspace.command_line import UsageError, option
from hf_nullspace.core.settings import check_numbers, check_output_dir
from hf_nullspace.training.base_model import BASE_RANGES


@dataclass
class CompareArguments:
    """The design of the study, and how much of it to do now."""

    _group_title: ClassVar[str] = "Study"

    output_dir: str = option("outputs/study", "Folder of the study; started again it goes on there.")
    arms: str = option(
        "{}",
        "Name -> fields of NullspaceConfig, 'crop_scale', 'horizontal_flip', 'augmentation' of its images, and 'seeds' "
        "or 'learning_rate_of' (mapping, or JSON).",
    )
    control: str = option("plain", "The arm that the others are compared with.")
    training: str = option("{}", "Fields of NullspaceConfig for all arms (mapping, or JSON).")
    seeds: list[int] = option([0, 1, 2], "Seeds of every arm; the first also chooses the learning rate.")
    learning_rates: list[float] = option([1e-4], "The grid that the learning rate of each arm is chosen from.")
    alphas: list[float] = option(
        [1.0], "The grid of shares of the way from the checkpoint to the tuned weights (WiSE-FT); 1 is the tuned model."
    )
    keep_clean: float | None = option(
        None, "Choose among what loses at most so many points of clean accuracy on the selection images."
    )
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
    overwrite: bool = option(False, "Retrain runs with changed settings.")
    render: str | None = option(
        None, "A results.json: write its tables and pictures into output_dir, and do nothing else."
    )

    def __post_init__(self) -> None:
        at_least_1 = dict.fromkeys(("selection_limit", "limit", "eval_batch_size", "resamples"), "int [1, inf)")
        seeds = dict.fromkeys(("seeds", "eval_seed"), "int [0, 4294967295]")
        check_numbers(
            self, BASE_RANGES | at_least_1 | seeds | {"learning_rates": "(0, inf)", "max_minutes": "[0, inf)"}
        )
        check_numbers(self, {"alphas": "[0, 1]", "keep_clean": "[0, inf)"})
        check_output_dir(self.output_dir)
        for name in ("seeds", "learning_rates", "alphas", "only"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UsageError(f"{name}={getattr(self, name)}: expected each once")
