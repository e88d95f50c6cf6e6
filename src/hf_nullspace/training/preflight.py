"""Checks before a training: ranges of settings, trackers, enough images, space on the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

RANGES = {
    "rounds": "int [1, inf)",
    "steps_per_round": "int [1, inf)",
    "global_batch_size": "int [1, inf)",
    "noise_batch_size": "int [1, inf)",
    "held_out_images": "int [0, inf)",
    "trades_beta": "[0, inf)",
    "attack_steps": "int [1, inf)",
    "fgm_share": "[0, inf)",
    "pyramid_scales": "int [1, inf)",
    "pyramid_multipliers": "[0, inf)",
    "universal_share": "[0, inf)",
    "universal_step": "(0, inf)",
    "ema_decay": "(0, 1)",
    "learning_rate": "[0, inf)",
    "weight_decay": "[0, inf)",
    "max_grad_norm": "[0, inf)",
    "warmup_steps": "[0, inf)",
    "per_device_train_batch_size": "int [1, inf)",
    "per_device_eval_batch_size": "int [1, inf)",
    "gradient_accumulation_steps": "int [1, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, inf)",
    "label_smoothing_factor": "[0, 1]",
    "logging_steps": "[0, inf)",
    "save_steps": "(0, inf)",
    "eval_steps": "[0, inf)",
    "seed": "int [0, 4294967295]",
    "data_seed": "int [0, 4294967295]",
    "dataloader_num_workers": "int [0, inf)",
}
"""Intervals of numbers in NullspaceConfig, those of TrainingArguments included (:mod:`~hf_nullspace.core.settings`)."""
_FINDS_OUT_ITSELF = ("azure_ml", "flyte")  # transformers cannot say whether these are installed


def check_trackers(names: Sequence[str]) -> None:
    """Check what TrainingArguments made of ``report_to``.

    Raises:
        ValueError: if a tracker is not known, or not installed.
    """
    ready = {*get_available_reporting_integrations(), *_FINDS_OUT_ITSELF}
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to={name!r}: expected 'none', 'all' or some of {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in ready:
            raise ValueError(f"report_to={name!r}: it is not installed here; install the tracker, or choose 'none'")


BATCHES = ("global_batch_size", "noise_batch_size")


def check_images(config: Any, images: int, batches: Sequence[str] = BATCHES) -> None:
    """Check that ``images`` training images are enough for the ``batches`` and the held-out images of ``config``.

    Raises:
        ValueError: if a batch would not be full, or too few images are left to hold out.
    """
    if not images:
        raise ValueError("the training set is empty; check the split's name and the data files")
    for name in batches:
        if getattr(config, name) > images:
            raise ValueError(
                f"{name}={getattr(config, name)}, but there are {images} training images; choose at most {images}"
            )
    if config.needs_held_out():
        held_out_of(images, config.held_out_images, config.world_size)


def held_out_of(images: int, wanted: int, processes: int) -> int:
    """How many of ``images`` training images are held out from the noise: at most a quarter of them.

    Raises:
        ValueError: if some are wanted and not every process gets one.
    """
    if wanted > 0 and images < 4:
        raise ValueError(
            f"the training set has {images} images, of which at most a quarter can be held out "
            f"(held_out_images={wanted}); use 4 images or more"
        )
    held_out = min(wanted, images // 4)
    if 0 < held_out < processes:
        raise ValueError(
            f"{held_out} held-out images (of {images}) are less than one for each of {processes} processes; raise "
            "held_out_images, or use more data or fewer processes"
        )
    return held_out


def disk_space_warning(model: nn.Module, config: Any, trainings: int = 1) -> str | None:
    """A warning if the disk may not hold what ``trainings`` write to ``config.output_dir``; None if it does.

    An estimate: the weights and Adam's two moments in every checkpoint that is kept and in the one being written, and
    the weights once more at the end.
    """
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    each = weights if config.save_only_model else 3 * weights
    saves = _saves(config)
    kept = min(config.save_total_limit or saves, saves)
    needed = trainings * (weights + (each * (kept + 1) if saves else 0))
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return (
        f"warning: about {needed / 1e9:.2g} GB may be written to {config.output_dir} ({kept} checkpoints kept), and "
        f"the disk has {free / 1e9:.2g} GB left; a smaller save_total_limit or save_only_model needs less"
    )


def _saves(config: Any) -> int:
    """How many checkpoints a training writes."""
    if config.save_strategy == "no":
        return 0
    if config.save_strategy == "epoch":
        return max(int(config.num_train_epochs), 1)
    every = config.save_steps if config.save_steps >= 1 else max(config.save_steps * config.max_steps, 1)
    return max(int(config.max_steps / every), 1)
