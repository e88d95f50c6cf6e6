"""NullspaceTrainer: the Hugging Face Trainer, with a noise learned between the steps (Algorithm 1).

Every S optimizer steps a noise v is learned that the present model cannot see; until the next one, every batch goes
through the model twice in one forward pass, as it is and with v on its patch embeddings: CE(z, y) + CE(z', y).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_nullspace.core.files import make_lasting, one_clear_error, read_json, write_json
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise, unwrap
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.artifact import WEIGHTS_NAME, NullspaceNoise, load_noise_bank, save_noise_bank
from hf_nullspace.training.checkpoints import (
    HISTORY_NAME,
    checkpoint_to_resume,
    complete_checkpoint,
    load_weights,
    restore_noises,
)
from hf_nullspace.training.config import NullspaceConfig, usable_config
from hf_nullspace.training.cost import NAME as COST_NAME
from hf_nullspace.training.cost import Cost
from hf_nullspace.training.ema import FOLDER as EMA_FOLDER
from hf_nullspace.training.ema import EmaCallback
from hf_nullspace.training.noise_stream import clear_error_of_an_empty_stream
from hf_nullspace.training.objectives import (
    Batch,
    check_head,
    check_labels,
    forward_views,
    make_objective,
    mean_over_images,
    view_loss,
)
from hf_nullspace.training.preflight import check_images
from hf_nullspace.training.private_methods import check_private_methods
from hf_nullspace.training.publishing import PublishingTrainer
from hf_nullspace.training.round_trainer import RoundTrainer

check_private_methods()

BANK_NAME = "nullspace_bank"
"""Folder of a checkpoint whose round has several noises; the first of them is the one beside the model, too."""


class NullspaceTrainer(PublishingTrainer, RoundTrainer):
    """A drop-in Trainer for image classifiers with a patch embedding; ``args`` is a :class:`NullspaceConfig`.

    Everything else is the Trainer's: evaluation and prediction see the clean model; resuming, accumulation, mixed
    precision, ``torch_compile``, several processes, callbacks and the Hub work as usual. Beside the Trainer's files it
    writes ``noises/round-000.safetensors`` ..., ``nullspace_history.json``, and the noise into every checkpoint.

    Args:
        patch_embedding: the module whose output are the patch embeddings, for a model that is not known.

    Raises:
        NotAViTError: if the model has no patch embedding.
        ValueError: if the head is not single-label classification.
        TypeError: if ``args`` is not a NullspaceConfig.
    """

    args: NullspaceConfig
    model: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: NullspaceConfig | None = None,
        *positional: Any,
        patch_embedding: nn.Module | None = None,
        **named: Any,
    ) -> None:
        args = usable_config(args)
        self._patch_embedding = patch_embedding
        self._hook: PatchEmbeddingNoise | None = None
        self.noises: tuple[NullspaceNoise, ...] = ()
        self.history: list[dict[str, Any]] = []
        self.run: str | None = None  # the identity of the run, for its checkpoints
        self.cost = Cost()
        self._round: int | None = None
        self._place = (-1, 0)  # optimizer step, micro-batch within it
        self._resumed: Path | None = None
        self._start: dict[str, Tensor] | None = None
        self._compiled: nn.Module | None = None
        if model is not None:
            self._attach(model)
        super().__init__(model, args, *positional, **named)
        if self.train_dataset is not None and hasattr(self.train_dataset, "__len__"):
            check_images(self.args, len(self.train_dataset))
        self._objective = make_objective(self.args.objective, self.args)  # `objective` is the Trainer's, in a search
        self._preprocessing = self._pixels_known() if self._objective.needs_pixels else None
        self._given_optimizer = self.optimizer
        self.ema: EmaCallback | None = None
        if self.args.ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
                raise ValueError("ema_decay needs a whole transformers model per process: no FSDP, DeepSpeed or PEFT")
            self.ema = EmaCallback(self.model, self.args.ema_decay, self.args.ema_from)
            self.add_callback(self.ema)
        self.add_callback(_RunBegins(self))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._attach(model)
        return model

    def _attach(self, model: nn.Module) -> None:
        """Put the hook on the model, before anything is compiled; refuse heads that the loss is not made for."""
        check_head(getattr(unwrap(model), "config", None))
        if self._hook is not None:
            self._hook.remove()
        self._hook = PatchEmbeddingNoise(model, self._patch_embedding)

    def _pixels_known(self) -> Preprocessing:
        """How images are normalised: an attack in pixels has to know."""
        if self.processing_class is None:
            raise ValueError(
                f"objective={self.args.objective!r} attacks images in pixels: pass processing_class=image_processor, "
                "which knows their mean and std"
            )
        return Preprocessing.from_processor(self.processing_class)

    # ---- one batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        with clear_error_of_an_empty_stream():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step; the first micro-batch of every S-th optimizer step learns the round's noise before it."""
        if "labels" not in inputs:
            raise ValueError(f"training rows have {sorted(inputs)} but no 'labels'; name the label column")
        if self.compute_loss_func is None:
            check_labels(inputs["labels"], getattr(getattr(unwrap(self.model), "config", None), "num_labels", None))
        step = self.state.global_step
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        round_ = step // self.args.steps_per_round  # type: ignore[operator]
        if round_ != self._round:
            self.noises = self._learn(model, round_)
            self._round = round_
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Training: the objective's loss over its views (line 19). Evaluation: the Trainer's."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self._hook is not None
        labels, name = inputs["labels"], getattr(unwrap(self.model), "main_input_name", "pixel_values")
        batch = Batch(
            images=inputs[name],
            labels=labels,
            noises=torch.cat([noise.tensor for noise in self.noises]) if self.noises else None,
            model=self.cost.counted(self._model_to_ask(model)),
            cross_entropy=lambda logits: self._view_loss(logits, labels, num_items_in_batch),
            mean=lambda values: mean_over_images(values, labels, num_items_in_batch),
            seeds=lambda: self._image_seeds(len(labels)),
            preprocessing=self._preprocessing,
        )
        with self.cost.during("attack"):
            views = self._objective.views(batch)
        together = self.args.device.type != "cpu"
        logits = forward_views(self.cost.counted(model), self._hook, inputs, views, name, together=together)
        loss = self._objective.loss(logits, batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # undo the mean that DDP takes over processes
        return (loss, ImageClassifierOutput(logits=next(iter(logits.values())))) if return_outputs else loss

    def _image_seeds(self, count: int) -> list[int]:
        """One seed per image of this micro-batch, the same however the batch is spread over processes."""
        step, micro = self._place
        first = (micro * self.args.world_size + self.args.process_index) * count
        return [derive_seed(self.args.seed, max(step, 0), first + index) for index in range(count)]

    def _view_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        """The loss of one view; a ``compute_loss_func`` of the user is asked for each view."""
        if self.compute_loss_func is not None:
            outputs = ImageClassifierOutput(logits=logits)
            return self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        return view_loss(logits, labels, num_items_in_batch, self.args.label_smoothing_factor)

    # ---- checkpoints

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """The Trainer's; ``resume_from_checkpoint=True`` takes the last checkpoint that is whole.

        Raises:
            NoCheckpointError: if there is none, or the one that is named is not whole.
        """
        self._in_trial, self._start = trial, None
        output, processes = str(self.args.output_dir), self.args.world_size
        self._resumed = checkpoint_to_resume(resume_from_checkpoint, output, processes)
        return super().train(str(self._resumed) if self._resumed else None, trial, ignore_keys_for_eval)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """The Trainer's, when a training loop begins: for the first time, or again after out of memory."""
        if self.hp_search_backend is not None:
            self.args.settle_after_trial()
        if args.auto_find_batch_size and self._start is None:
            self._start = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        elif args.auto_find_batch_size and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.model.load_state_dict(self._start)  # upstream goes on with what the failed loop left
            self.optimizer = self._given_optimizer
        self._epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        finished = self._resumed is not None and _step_of(self._resumed) >= max_steps
        # A finished run has no epoch left: upstream (5.23) would train one step more, in the middle of an epoch.
        return (0 if finished else self._epochs, *others, max_steps)

    def _begin(self) -> None:
        """A run begins: afresh, also when ``auto_find_batch_size`` begins again; or goes on from a checkpoint."""
        self.state.num_train_epochs = self._epochs
        self.noises, self._round, self.history, self._place = (), None, [], (-1, 0)
        self.cost.start()
        if self.ema is not None:
            self.ema.start(self.model, self._resumed)
        if self._resumed is not None:
            self._restore(self._resumed)

    def _restore(self, checkpoint: Path) -> None:
        if (checkpoint / HISTORY_NAME).exists():
            self.history = read_json(checkpoint / HISTORY_NAME)
            if self.args.should_save:
                restore_noises(checkpoint, self._run_folder, self.history)
        if (checkpoint / COST_NAME).exists():
            self.cost.start(read_json(checkpoint / COST_NAME))
        if (checkpoint / WEIGHTS_NAME).exists():
            self.noises = _saved_noises(checkpoint)
            self._round = self.noises[0].provenance.round

    def _end(self) -> None:
        """A run has ended: what it cost. A checkpoint too many, which a kill may have left, goes."""
        self.cost.sync()
        if self.args.should_save:
            write_json(self._run_folder / COST_NAME, self.cost.summary())
            rotate_checkpoints(str(self._run_folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, with the present noise, the history and the averaged weights beside the model's."""
        folder = Path(output_dir or str(self.args.output_dir))
        with one_clear_error(folder):
            if self.args.should_save:
                self._save_noise(folder)
                if self.ema is not None:
                    self.ema.save(folder, self.processing_class)
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                make_lasting(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's; older checkpoints are deleted when this one is on the disk, noises of the run included."""
        self.cost.sync()
        summary = self.cost.summary()
        self.log({f"cost/{name}": summary[name] for name in ("forward_equivalents", "seconds")})
        run, limit = self._run_folder, self.args.save_total_limit
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with one_clear_error(folder):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if self.args.should_save:
                complete_checkpoint(run, folder, self.history, self.run)
                rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)

    def _save_noise(self, folder: Path) -> None:
        if self.noise is not None:
            self.noise.save_beside_model(folder)
        if len(self.noises) > 1:
            save_noise_bank(self.noises, folder / BANK_NAME)
        write_json(folder / HISTORY_NAME, self.history)
        write_json(folder / COST_NAME, self.cost.summary())

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every rank's part is written
        self.args.save_total_limit = None  # the Trainer would delete older checkpoints before this one is on the disk

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = model if model is not None else self.model
        if isinstance(target, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_weights(target, resume_from_checkpoint)  # works around transformers #48805
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if isinstance(self.model, PreTrainedModel) and best and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            averaged = self.ema is not None and "ema_" in (self.args.metric_for_best_model or "")
            load_weights(self.model, Path(best) / EMA_FOLDER if averaged else best)  # transformers #48805, as above
        else:
            super()._load_best_model()
        if best and (Path(best) / WEIGHTS_NAME).exists():
            self.noises = _saved_noises(Path(best))  # saved beside the weights: those they were for

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The Trainer's, on the clean model; with ``ema_decay`` also of the averaged weights (``eval_ema_...``)."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = isinstance(eval_dataset if eval_dataset is not None else self.eval_dataset, dict)
        if self.ema is not None and not several:  # of several sets the Trainer calls this for each
            with self.ema.swapped_in():
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema")
        return metrics


def _saved_noises(folder: Path) -> tuple[NullspaceNoise, ...]:
    """The noises of the round in which a checkpoint was written."""
    if (folder / BANK_NAME).is_dir():
        return tuple(load_noise_bank(folder / BANK_NAME))
    return (NullspaceNoise.load(folder / WEIGHTS_NAME),)


def _step_of(checkpoint: Path) -> int:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step


class _RunBegins(TrainerCallback):
    """Tells the trainer that a training loop begins, and the data set which epoch; the Trainer has no method for it."""

    def __init__(self, trainer: NullspaceTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate 1.15 tells it to a map-style data set only if there is one process and nothing was skipped.
        data: Any = self._trainer.train_dataset
        if hasattr(data, "set_epoch") and hasattr(data, "__len__"):
            data.set_epoch(int(state.epoch or 0))
