"""Settings of a nullspace fine-tuning run: TrainingArguments, and what the method adds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from transformers import TrainingArguments

from hf_nullspace.command_line import option
from hf_nullspace.core.settings import check_choices, check_numbers, check_output_dir
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.boundary import BoundarySettings
from hf_nullspace.training.adversarial import attack_settings, pyramid_settings
from hf_nullspace.training.losses import DIVERGENCES
from hf_nullspace.training.objectives import DISTRIBUTIONS, MIXES, check_objective, make_objective
from hf_nullspace.training.preflight import RANGES, check_trackers
from hf_nullspace.training.presets import PRESETS
from hf_nullspace.training.universal import PLACES

Settings = TypeVar("Settings", NoiseSettings, BoundarySettings)


def _preset(text: str) -> Any:
    """A field that gets its value from the preset: typed as it is after ``__post_init__``, when it is never None."""
    return option(None, f"{text} Default: from the preset.")


@dataclass(repr=False)  # TrainingArguments' own does not show the token
class NullspaceConfig(TrainingArguments):
    """TrainingArguments for :class:`NullspaceTrainer`, with the settings of Algorithm 1 of the paper.

    Fields with the default ``None`` here get their value from ``preset``; a value that is given wins. The length of a
    run is ``rounds`` x ``steps_per_round``; ``max_steps`` may be given instead of the rounds, or has to agree.

    Raises:
        ValueError: if settings contradict each other or are out of range; the message names them.
        NotADirectoryError: if ``output_dir`` is a file, or lies under one.
    """

    _group_title: ClassVar[str] = "Nullspace fine-tuning (Algorithm 1)"

    preset: str = option(
        "boundary",
        "Where unset fields come from: 'boundary', 'descent' (Algorithm 1, epsilon on held-out images), 'paper', or "
        "'robust' (no learned noise: 'fast', then 'interpolate').",
    )
    objective: str = _preset(
        "What a batch becomes: 'nullspace' (a second view with learned noise), the controls 'plain' (the "
        "same view twice), 'random' and 'permuted' (noise of the same influence), 'madry', 'trades' (adversarial "
        "training), 'fast' (a clean view and one of a single attack step), 'pyramid' (a clean view and one "
        "attacked at several scales), 'fgm' (noise along the gradient at the patch embeddings), 'universal' (one "
        "adversarial noise for all images), or several joined by '+'.",
    )
    rounds: int = _preset("K: how often a new noise is learned.")
    steps_per_round: int = _preset("S: optimizer steps between two noises.")
    global_batch_size: int = _preset("B: images per optimizer step over all processes and accumulation.")
    epsilon: float = _preset("Threshold on the noise's influence, in (0, 2].")
    noise_learner: str = _preset("'boundary': follow the edge of the epsilon region; 'descent': Algorithm 1.")
    noise_limit: float = _preset("A: the noise starts as U(-A, A); boundary: no token gets longer than that.")
    noise_learning_rate: float = _preset("Learning rate of the noise (AdamW, cosine over noise_max_steps).")
    noise_max_steps: int = _preset("T: the most gradient steps that one noise may take; boundary: takes all.")
    noise_weight_decay: float = _preset("Descent: AdamW's decay of the noise; anything above 0 shrinks it.")
    noise_loss: str = _preset("'l2': mean of ||z' - z|| (equation 10); 'squared_l2': of its square.")
    noise_stop_on: str = _preset("Descent: where epsilon has to be reached, 'held_out' or 'minibatch'.")
    noise_on_limit: str = _preset("Descent: after T steps outside of epsilon 'use', 'rescale' or 'error'.")
    noise_pool_images: int = _preset("Boundary: images with clean logits that are kept for a round; 0: fresh ones.")
    noises_at_once: int = _preset("Boundary: noises learned at once, each on its share of every batch.")
    noise_bank_size: int = _preset("Noises of a round: the new ones, and the newest of earlier rounds.")
    noise_mix: str = _preset("Which noise of the round an image gets: 'one', 'choice' or 'convex' (random).")
    noise_warm_start: bool = _preset("Whether learning starts from the last round's noises.")
    noise_batch_size: int = _preset("Images per noise step over all processes.")
    held_out_images: int = option(
        512, "Training images per round that the noise is not learned on, but its influence measured."
    )
    noise_distribution: str = option("uniform", "Objective 'random': 'uniform' or 'normal' noise.")
    attack_eps: str | None = option(
        None, "Adversarial objectives: L-inf radius, pixels in [0, 1]. Unset: 8/255; at each scale of a pyramid 6/255."
    )
    attack_step: str | None = option(
        None, "Adversarial objectives: a step. Unset: a quarter of attack_eps; 'fast': 1.25, 'pyramid': a sixth of it."
    )
    attack_steps: int | None = option(
        None, "Adversarial objectives: steps. Unset: 10; 'pyramid': 5; 'fast' always takes 1."
    )
    pyramid_scales: list[int] = option(
        [32, 16, 1], "'pyramid', 'universal': sides of the squares that change together, pixels of the model's image."
    )
    pyramid_multipliers: list[float] = option(
        [20.0, 10.0, 1.0], "'pyramid', 'universal': by what the changes at each scale are multiplied."
    )
    trades_beta: float = option(6.0, "Objective 'trades': weight of the divergence (beta).")
    consistency: float = option(
        0.0, "Weight of the divergence between the predictions of the clean view and of the noisy or attacked one."
    )
    consistency_loss: str = option("kl", "That divergence: 'kl' (as in TRADES) or 'js' (as in AugMix).")
    fgm_share: float = option(
        0.03, "Objective 'fgm': L2 norm of the noise of an image, as a share of its patch embeddings' centred norm."
    )
    universal_in: str = option(
        "embeddings", "'universal': noise on the patch 'embeddings', or in 'pixels', at the scales of 'pyramid'."
    )
    universal_share: float = option(
        0.2, "'universal' on embeddings: L2 norm of the noise at most, as a share of their centred norm."
    )
    universal_step: float = option(0.25, "'universal': how far the noise moves per step, as a share of its bound.")
    ema_decay: float | None = option(
        None, "Keep an exponential moving average of the weights with this decay per step, in (0, 1)."
    )
    ema_from: str | None = option(
        None, "Folder or Hub id of weights that this average starts from. Unset: the model's own."
    )

    interpolate: bool = _preset(
        "Afterwards go part of the way back: (1 - alpha) * checkpoint + alpha * fine-tuned, alpha by selection images."
    )

    learning_rate: float = _preset("Learning rate of the model.")
    weight_decay: float = _preset("AdamW's decay of the model.")
    max_grad_norm: float = _preset("Gradient clipping of the model; 0 is none.")
    lr_scheduler_type: str = _preset("Schedule of the model's learning rate.")
    warmup_steps: float = _preset("Warm-up of the model's learning rate.")
    max_steps: int = _preset("Optimizer steps; rounds x steps_per_round.")
    per_device_train_batch_size: int = _preset(
        "Images per device and micro-batch; global_batch_size / processes / accumulation."
    )
    num_train_epochs: float = option(None, "Not used: the length of a run is rounds x steps_per_round.")

    def __post_init__(self) -> None:
        check_choices(self, {"preset": PRESETS, "noise_distribution": DISTRIBUTIONS})
        check_choices(self, {"consistency_loss": DIVERGENCES, "universal_in": PLACES})
        for name in ("objective", "attack_eps"):
            if getattr(self, name) is None:
                setattr(self, name, PRESETS[self.preset][name])
        check_objective(self.objective)
        check_numbers(self, RANGES)
        attack_settings(self), pyramid_settings(self)  # raise on values out of range
        check_output_dir(self.output_dir)
        if self.ema_from is not None:
            self._check("ema_from", bool(self.ema_from), "a folder or an id on the Hub")
            self._check("ema_from", self.ema_decay is not None, "ema_decay beside it")
        self._settle_length()
        given = self.per_device_train_batch_size, self.global_batch_size
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.noise_settings()  # raises on values out of range
        make_objective(self.objective, self)  # raises on what its parts cannot do
        if self.needs_held_out():
            self._check("held_out_images", self.held_out_images >= 1, "at least 1: epsilon is tested on them")
        self.per_device_train_batch_size = self.per_device_train_batch_size or 1
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate 1.15 does not see the other processes, and each trains by itself
        super().__post_init__()
        check_trackers(list(self.report_to or []))
        self._settle_batch_size(*given)
        if self.noise_batch_size < self.world_size:
            raise ValueError(f"noise_batch_size={self.noise_batch_size} is less than one image per process")

    def _check(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    def _settle_batch_size(self, per_device: int | None, all_devices: int | None) -> None:
        """Make the two batch sizes agree, from what was given of them: B = per device x processes x accumulation."""
        count = self.world_size * self.gradient_accumulation_steps
        parts = f"{self.world_size} processes x {self.gradient_accumulation_steps} gradient_accumulation_steps"
        if per_device is None:
            if self.global_batch_size % count:
                raise ValueError(
                    f"global_batch_size={self.global_batch_size} is no multiple of {parts}; change one of them"
                )
            self.per_device_train_batch_size = self.global_batch_size // count
        elif all_devices is not None and all_devices != per_device * count:
            raise ValueError(
                f"global_batch_size={all_devices}, but per_device_train_batch_size={per_device} x {parts} is "
                f"{per_device * count}; give one of them"
            )
        else:
            self.global_batch_size = per_device * count

    def _settle_length(self) -> None:
        """Make rounds K, steps_per_round S and max_steps agree: K * S = max_steps."""
        preset = PRESETS[self.preset]
        given = self.max_steps if self.max_steps is not None and self.max_steps != -1 else None
        if given is None:
            if self.num_train_epochs is not None:
                raise ValueError(
                    f"num_train_epochs={self.num_train_epochs}: the length of a nullspace run is rounds x "
                    "steps_per_round; set those, or max_steps"
                )
            self.rounds = self.rounds or preset["rounds"]
            self.steps_per_round = self.steps_per_round or preset["steps_per_round"]
            self.max_steps = self.rounds * self.steps_per_round
        else:
            self._check("max_steps", given >= 1, "at least 1 step")
            if self.rounds is not None and self.steps_per_round is None:
                self.steps_per_round = max(given // self.rounds, 1)
            self.steps_per_round = self.steps_per_round or preset["steps_per_round"]
            self.rounds = self.rounds or max(given // self.steps_per_round, 1)
            if self.rounds * self.steps_per_round != given:
                raise ValueError(
                    f"max_steps={given} is not rounds={self.rounds} x steps_per_round={self.steps_per_round} "
                    f"(= {self.rounds * self.steps_per_round}); change one of them"
                )
        if self.num_train_epochs is None:
            self.num_train_epochs = 1.0  # the Trainer wants a number and max_steps overrides it
        self._settled_steps = self.max_steps

    def settle_after_trial(self) -> None:
        """Make the length of the run agree again, and check it, after a hyperparameter search has set fields.

        If the trial did not set ``max_steps``, it follows from rounds and steps per round.
        """
        unset: Any = None
        if self.max_steps == self._settled_steps:
            self.max_steps = unset
        else:
            self.rounds = unset
        self.num_train_epochs = unset
        check_numbers(self, RANGES)
        self._settle_length()
        self.noise_settings()

    def needs_held_out(self) -> bool:
        """Whether a round needs held-out images: to test epsilon on, or to scale a noise to it."""
        with_noise = {"nullspace", "random", "permuted"} & set(check_objective(self.objective))
        settings = self.noise_settings()
        if isinstance(settings, NoiseSettings) and not settings.needs_held_out and not self.interpolate:
            with_noise -= {"nullspace"}
        return bool(with_noise)

    def noise_settings(self) -> NoiseSettings | BoundarySettings:
        """The settings of one round's noise, for the learner that is chosen. Raises a ValueError out of range."""
        check_choices(self, {"noise_learner": ("boundary", "descent"), "noise_mix": MIXES})
        self._check("noise_bank_size", self.noise_bank_size >= self.noises_at_once, "at least noises_at_once")
        self._check("noises_at_once", 1 <= self.noises_at_once <= self.noise_batch_size, "1 to a batch")
        descent = self.descent_settings()  # raises on values out of range, for either learner
        if self.noise_learner == "descent":
            self._check("noises_at_once", self.noises_at_once == 1, "1, or noise_learner='boundary'")
            return descent
        fields = {"steps": "noise_max_steps", "pool_images": "noise_pool_images", "count": "noises_at_once"}
        return self._noise_settings(BoundarySettings, fields)

    def stream_settings(self) -> dict[str, Any]:
        """How the images of a noise are drawn, for :func:`hf_nullspace.training.noise_stream.noise_stream`."""
        return {
            "seed": self.seed if self.data_seed is None else self.data_seed,
            "batch_size": self.noise_batch_size,
            "held_out_images": self.held_out_images,
            "rank": self.process_index,
            "processes": self.world_size,
            "num_workers": self.dataloader_num_workers,
        }

    def descent_settings(self) -> NoiseSettings:
        """The settings of Algorithm 1, whichever learner is chosen. Raises a ValueError out of range."""
        names = ("max_steps", "weight_decay", "stop_on", "on_limit")
        check_choices(self, {"noise_stop_on": ("held_out", "minibatch"), "noise_on_limit": ("use", "rescale", "error")})
        return self._noise_settings(NoiseSettings, {name: f"noise_{name}" for name in names})

    def _noise_settings(self, kind: type[Settings], fields: dict[str, str]) -> Settings:
        """The fields that both learners have, and those of one: its name -> ours."""
        shared = {"noise_limit": "noise_limit", "learning_rate": "noise_learning_rate", "loss": "noise_loss"}
        values = {name: getattr(self, ours) for name, ours in (shared | fields | {"epsilon": "epsilon"}).items()}
        try:
            return kind(**values)
        except ValueError as error:
            raise ValueError(f"noise setting {error}") from None


@contextmanager
def changed(args: NullspaceConfig, **values: Any) -> Iterator[None]:
    """Inside, fields of ``args`` have other values."""
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def usable_config(args: Any) -> NullspaceConfig:
    """``args`` as the trainer takes them; ``None`` is all defaults.

    Raises:
        TypeError: if they are no NullspaceConfig.
        ValueError: if the process has several GPUs, which the Trainer would drive with DataParallel.
    """
    if args is None:
        args = NullspaceConfig(output_dir="outputs")
    if not isinstance(args, NullspaceConfig):
        raise TypeError(
            f"args is a {type(args).__name__}; expected a NullspaceConfig (TrainingArguments and the settings of the "
            "method): NullspaceConfig(output_dir=...)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported; "
            "start one process per GPU: accelerate launch --multi_gpu, or torchrun --nproc_per_node"
        )
    return args
