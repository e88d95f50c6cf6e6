"""NullspaceTrainer: the Hugging Face Trainer, with a noise learned between the steps (Algorithm 1).

Every S optimizer steps a noise v is learned that hardly changes the current model's output; until the next one, every
batch goes through the model as it is and with v on its patch embeddings: CE(z, y) + CE(z', y). Other objectives have
other views, and may have no noise.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_nullspace.core.files import make_lasting, one_clear_error
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise, config_of, patch_embeddings, unwrap
from hf_nullspace.noise.artifact import NullspaceNoise, provenance_of
from hf_nullspace.training import ema, interpolation, losses, objectives, publishing, stages
from hf_nullspace.training.checkpoints import checkpoint_to_resume, complete_checkpoint, load_weights
from hf_nullspace.training.config import NullspaceConfig, changed, usable_config
from hf_nullspace.training.events import RunEvents, check_loss, check_weights
from hf_nullspace.training.noise_stream import clear_error_of_an_empty_stream, noise_stream, own_randomness
from hf_nullspace.training.preflight import check_images
from hf_nullspace.training.private_methods import check_private_methods
from hf_nullspace.training.record import RunRecord
from hf_nullspace.training.rounds import Round, WithoutDDP, noise_progress
from hf_nullspace.training.watch import add_watch

check_private_methods()


class NullspaceTrainer(Trainer):
    """A drop-in Trainer for image classifiers with a patch embedding; ``args`` is a :class:`NullspaceConfig`.

    Everything else is the Trainer's: evaluation and prediction see the clean model; resuming, accumulation, mixed
    precision, ``torch_compile``, several processes, callbacks and the Hub work as usual. Beside the Trainer's files it
    writes ``noises/round-000.safetensors`` ..., ``nullspace_history.json``, and the noise into every checkpoint.

    Args:
        patch_embedding: the module that gives the patch embeddings, for an unknown model family.

    Raises:
        NotAViTError: if the model has no patch embedding.
        ValueError: if the head is not single-label classification.
        TypeError: if ``args`` is not a NullspaceConfig.
    """

    args: NullspaceConfig
    model: Any
    hub_model_id: Any
    push_in_progress: Any
    _objective: objectives.Objective  # `objective` is the Trainer's, in a search
    _stages: stages.Stages
    _preprocessing: Any

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
        self._hook: Any = None  # a PatchEmbeddingNoise, when there is a model
        self.record = RunRecord()
        self.history, self.cost = self.record.history, self.record.cost
        self.run: str | None = None  # identity of the run, for its checkpoints
        self.selection: interpolation.Selection | None = None  # what `interpolate` goes back to, and chooses by
        self._micro_step = (-1, 0)  # optimizer step, micro-batch within it
        self._in_trial: Any = None
        self._resumed: Path | None = None
        self._start: dict[str, Tensor] | None = None
        if model is not None:
            self._attach(model)
        super().__init__(model, args, *positional, **named)
        if self.train_dataset is not None and hasattr(self.train_dataset, "__len__"):
            check_images(args, len(self.train_dataset))
        self._given_optimizer = self.optimizer
        self._without_ddp = WithoutDDP(self.accelerator)
        self._sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._is_plain = isinstance(self.model, PreTrainedModel) and not self._sharded
        self.ema = ema.average_of(self)
        self.add_callback(RunEvents(self))
        stages.take_objective(self)
        add_watch(self, self._objective, self._preprocessing)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._attach(model)
        return model

    def _attach(self, model: nn.Module) -> None:
        """Put the hook on the model before anything is compiled; raise for heads that are not single-label."""
        objectives.check_head(config_of(model))
        if self._hook is not None:
            self._hook.remove()
        self._hook = PatchEmbeddingNoise(model, self._patch_embedding)
        self.input_name = getattr(unwrap(model), "main_input_name", "pixel_values")

    @property
    def noise(self) -> NullspaceNoise | None:
        """The newest noise of the current round; None before the first, or if the objective makes none."""
        return self.noises[0] if self.noises else None

    @property
    def noises(self) -> tuple[NullspaceNoise, ...]:
        """The noises of the current round, the newest first."""
        return self.record.noises

    # ---- a step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        with clear_error_of_an_empty_stream():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step; the first micro-batch of every S-th optimizer step first learns the round's noise."""
        objectives.check_labels(inputs, self.model, soft=self.compute_loss_func is not None)
        step = self.state.global_step
        self._micro_step = (step, self._micro_step[1] + 1 if self._micro_step[0] == step else 0)
        number = step // self.args.steps_per_round
        if self._objective.round_noise is not None and number != self.record.round:
            self._begin_round(model, number)
        stage = partial(super().training_step, model, inputs, num_items_in_batch)
        loss = self._stages.run(stage, partial(self.accelerator.no_sync, model))
        if self.args.logging_nan_inf_filter:  # the default: the Trainer waits for the loss as well, and hides NaN
            check_loss(float(loss), step, self.model, inputs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Training: the objective's loss over its views (line 19), of the present stage. Evaluation: the Trainer's."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, name = inputs["labels"], self.input_name
        batch = objectives.Batch(
            images=inputs[name],
            labels=labels,
            noises=torch.cat([noise.tensor for noise in self.noises]) if self.noises else None,
            model=self.asked(model),
            cross_entropy=lambda logits: losses.view_loss(
                logits, labels, num_items_in_batch, self.args.label_smoothing_factor, self.compute_loss_func
            ),
            mean=lambda values: losses.mean_over_images(values, labels, num_items_in_batch),
            seeds=lambda: stages.image_seeds(self.args, *self._micro_step, len(labels)),
            embeddings=lambda: patch_embeddings(self._hook.module, inputs[name]),
            preprocessing=self._preprocessing,
        )
        with self.cost.during("attack"):
            views = self._stages.views(batch)
        together = self.args.device.type != "cpu"
        logits = stages.forward_views(self.cost.counted(model), self._hook, inputs, views, name, together=together)
        loss = self._stages.objective.loss(logits, batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # undo the mean that DDP takes over processes
        return (loss, ImageClassifierOutput(logits=next(iter(logits.values())))) if return_outputs else loss

    def asked(self, model: nn.Module) -> nn.Module:
        """``model`` for passes that train nothing: without DDP, and counted."""
        return self.cost.counted(self._without_ddp(model))

    # ---- a round

    def _begin_round(self, model: nn.Module, number: int) -> None:
        """The objective makes the round's noises (lines 3 to 14), from a separate, seeded image stream."""
        assert self._objective.round_noise is not None
        args, step = self.args, self.state.global_step
        images_at_once = self.get_total_train_batch_size(args) // (args.gradient_accumulation_steps * args.world_size)
        hidden = args.disable_tqdm or not self.is_local_process_zero()
        images = args.stream_settings() | {"round": number, "input_name": self.input_name}
        title, round_seed = f"Noise {number + 1}/{args.rounds}", derive_seed(images["seed"], number)
        with (
            noise_progress(title, args.noise_max_steps, epsilon=args.epsilon, hidden=hidden) as on_step,
            own_randomness(round_seed),
            self.cost.during("noise"),
        ):
            round_ = Round(
                number=number,
                seed=round_seed,
                settings=args.noise_settings(),
                model=self.asked(model),
                hook=self._hook,
                stream=lambda: noise_stream(*self.training_rows(), **images),
                known=lambda: replace(
                    provenance_of(self.model, hashed=not self.is_fsdp_enabled), training_step=step, round=number
                ),
                chunk_size=2 * images_at_once,  # a training step runs as many, two views
                previous=self.noises,
                warm_start=args.noise_warm_start,
                bank_size=args.noise_bank_size,
                on_step=on_step,
            )
            try:
                made = self._objective.round_noise(round_)
            except FloatingPointError as error:
                raise FloatingPointError(f"round {number}, after {step} optimizer steps: {error}") from None
        if logs := self.record.add(number, step, made, self._run_folder, writes=args.should_save):
            self.log(logs)

    def training_rows(self) -> tuple[Any, Any]:
        """The training set, without columns that the model lacks, and its collate function."""
        loader: Any = self.callback_handler.train_dataloader
        loader = self.get_train_dataloader() if loader is None else loader
        data = loader.dataset if isinstance(self.train_dataset, Dataset) else self.train_dataset
        return data, loader.collate_fn

    # ---- a run: it begins, goes on from a checkpoint, ends

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """The Trainer's; ``resume_from_checkpoint=True`` takes the last complete checkpoint.

        Raises:
            NoCheckpointError: if there is none, or the one that is named is incomplete.
            FloatingPointError: if a loss, a noise or a weight is NaN or infinite, with the step and the tensor's name.
        """
        self._in_trial, self._start = trial, None
        output, processes = str(self.args.output_dir), self.args.world_size
        self._resumed = checkpoint_to_resume(resume_from_checkpoint, output, processes)
        outputs = super().train(str(self._resumed) if self._resumed else None, trial, ignore_keys_for_eval)
        check_weights(self.model, self.state.global_step)
        return outputs

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """The Trainer's, when a training loop begins: for the first time, or again after out of memory."""
        if self.hp_search_backend is not None:
            self.args.settle_after_trial()
            stages.take_objective(self)
            add_watch(self, self._objective, self._preprocessing)
        if args.auto_find_batch_size and self._start is None:
            self._start = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        elif args.auto_find_batch_size and not self._sharded:
            self.model.load_state_dict(self._start)  # upstream goes on with what the failed loop left
            self.optimizer = self._given_optimizer
        self._epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        finished = False
        if self._resumed is not None:
            finished = TrainerState.load_from_json(str(self._resumed / "trainer_state.json")).global_step >= max_steps
        # A finished run has no epoch left: upstream (5.23) would train one step more, in the middle of an epoch.
        return (0 if finished else self._epochs, *others, max_steps)

    def begin_run(self) -> None:
        """A training loop begins: from the start, also after out of memory; or from a checkpoint."""
        interpolation.check(self)
        self.state.num_train_epochs = self._epochs
        self._micro_step = (-1, 0)
        self.record.start(self._resumed, self._run_folder, writes=self.args.should_save)
        if self.ema is not None:
            self.ema.start(self.model, self._resumed)

    def end_run(self) -> None:
        """The training loop has ended: go back, write the cost, delete a surplus checkpoint that a killed run left."""
        interpolation.go_back(self, self._run_folder)
        self.cost.sync()
        if self.args.should_save:
            self.record.save_cost(self._run_folder)
            rotate_checkpoints(str(self._run_folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = model if model is not None else self.model
        if self._is_plain and isinstance(target, PreTrainedModel):
            load_weights(target, resume_from_checkpoint)  # works around transformers #48805
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._is_plain and best:
            averaged = self.ema is not None and "ema_" in (self.args.metric_for_best_model or "")
            load_weights(self.model, Path(best) / ema.FOLDER if averaged else best)  # transformers #48805, as above
        else:
            super()._load_best_model()
        if best:
            self.record.load(Path(best))

    # ---- what is written

    @property
    def _run_folder(self) -> Path:
        """Where this run writes: ``output_dir``, or the folder of a trial in it."""
        return Path(self._get_output_dir(self._in_trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, with the current noise, the history and the averaged weights beside the model's."""
        check_weights(self.model, self.state.global_step)
        folder = Path(output_dir or str(self.args.output_dir))
        with one_clear_error(folder), changed(self.args, hub_token=None):  # training_args.bin does not hold it
            if self.args.should_save:
                self.record.save(folder)
                if self.ema is not None:
                    self.ema.save(folder, self.processing_class)
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                make_lasting(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's; older checkpoints are deleted only after this one, with all noises, is on the disk."""
        args, run = self.args, self._run_folder
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.cost.sync()
        summary = self.cost.summary()
        self.log({f"cost/{name}": summary[name] for name in ("forward_equivalents", "seconds")})
        with one_clear_error(folder):
            with changed(args, save_total_limit=None, push_to_hub=False):  # done below
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every rank has written its part
            if args.push_to_hub and self.is_world_process_zero():
                publishing.push_checkpoint(self, folder)
            if args.should_save:
                complete_checkpoint(run, folder, self.history, self.run)
                rotate_checkpoints(str(run), args.save_total_limit, self.state.best_model_checkpoint)

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

    # ---- the Hub: one commit of what belongs together

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The Trainer's; raises UploadError before the training if no push can succeed."""
        publishing.open_run(self, token, private)

    def create_model_card(self, language: Any = None, license: str | None = None, *more: Any, **named: Any) -> None:
        """Write README.md from what the run left in the folder; of the Trainer's arguments only the license is used."""
        publishing.write_run_card(self, license)

    def push_to_hub(self, *args: Any, **named: Any) -> Any:
        """The Trainer's, called on every process; see :func:`hf_nullspace.training.publishing.push_after_training`."""
        return publishing.push_after_training(self, *args, **named)
