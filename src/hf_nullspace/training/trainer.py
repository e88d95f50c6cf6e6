"""NullspaceTrainer: the Hugging Face Trainer, with a noise learned between the steps (Algorithm 1).

Every S optimizer steps a noise v is learned that the present model cannot see; until the next one, every batch goes
through the model twice in one forward pass, as it is and with v on its patch embeddings: CE(z, y) + CE(z', y).
"""

import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutput

from hf_nullspace.files import write_json
from hf_nullspace.models.patch_embedding import NoiseMode, PatchEmbeddingNoise, unwrap
from hf_nullspace.noise.artifact import WEIGHTS_NAME, NullspaceNoise, bank_file_name, provenance_of
from hf_nullspace.noise.learning import NoiseHistory, derive_seed, learn_noise
from hf_nullspace.training.checkpoints import HISTORY_NAME, checkpoint_to_resume, load_weights, one_clear_error
from hf_nullspace.training.config import NullspaceConfig, usable_config
from hf_nullspace.training.ema import FOLDER as EMA_FOLDER
from hf_nullspace.training.ema import EmaCallback
from hf_nullspace.training.noise_stream import an_empty_stream_is_said, noise_stream, own_randomness
from hf_nullspace.training.objectives import Objective, check_head, check_labels, make_objective, two_views, view_loss

logger = logging.getLogger(__name__)


class NullspaceTrainer(Trainer):
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
        self.noise: NullspaceNoise | None = None
        self.history: list[dict[str, Any]] = []
        self._round: int | None = None
        self._restored = False
        self._start: dict[str, Tensor] | None = None
        self._compiled: nn.Module | None = None
        if model is not None:
            self._attach(model)
        super().__init__(model, args, *positional, **named)
        if self.train_dataset is not None and hasattr(self.train_dataset, "__len__") and not len(self.train_dataset):
            raise ValueError("the training set is empty; check the split's name and the data files")
        self._objective: Objective = make_objective(self.args.objective)  # `objective` is the Trainer's, in a search
        self._given_optimizer = self.optimizer
        self.ema: EmaCallback | None = None
        if self.args.ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
                raise ValueError("ema_decay needs a whole transformers model per process: no FSDP, DeepSpeed or PEFT")
            self.ema = EmaCallback(self.model, self.args.ema_decay)
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

    # ---- one batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        with an_empty_stream_is_said():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step; the first micro-batch of every S-th optimizer step learns the round's noise before it."""
        if "labels" not in inputs:
            raise ValueError(f"training rows have {sorted(inputs)} but no 'labels'; name the label column")
        if self.compute_loss_func is None:
            check_labels(inputs["labels"], getattr(getattr(unwrap(self.model), "config", None), "num_labels", None))
        round_ = self.state.global_step // self.args.steps_per_round  # type: ignore[operator]
        if round_ != self._round:
            self.noise = self._objective.round_noise(lambda: self._learn(model, round_))
            self._round = round_
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Training: CE(z, y) + CE(z', y) of both views in one forward pass (line 19). Evaluation: the Trainer's."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        assert self._hook is not None
        noise = None if self.noise is None else self.noise.tensor.to(labels.device)
        with self._hook.adding(noise, NoiseMode.SECOND_HALF) if noise is not None else nullcontext():
            logits = model(**two_views(inputs)).logits
        clean, noisy = logits.chunk(2)
        loss = self._view_loss(clean, labels, num_items_in_batch) + self._view_loss(noisy, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # undo the mean that DDP takes over processes
        return (loss, ImageClassifierOutput(logits=clean)) if return_outputs else loss

    def _view_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        """The loss of one view; a ``compute_loss_func`` of the user is asked for each view."""
        if self.compute_loss_func is not None:
            outputs = ImageClassifierOutput(logits=logits)
            return self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        return view_loss(logits, labels, num_items_in_batch, self.args.label_smoothing_factor)

    # ---- one round

    def _learn(self, model: nn.Module, round_: int) -> NullspaceNoise:
        """This round's noise, on its own seeded stream; logged, kept as ``noises/round-KKK.safetensors``."""
        args, seed = self.args, self.args.data_seed if self.args.data_seed is not None else self.args.seed
        settings = args.noise_settings()
        collate = self.data_collator
        dataset: Any = self.train_dataset
        if isinstance(dataset, Dataset):  # as the Trainer does it: a mapped stream does not know its columns
            dataset = self._remove_unused_columns(dataset, description="noise")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="noise")
        round_seed = derive_seed(seed, round_)
        needs_held_out = settings.stop_on == "held_out" or settings.on_limit == "rescale"
        if needs_held_out and not args.held_out_images:
            raise ValueError("held_out_images=0: this preset tests epsilon on held-out images; keep some")
        known = provenance_of(self.model, hashed=not self.is_fsdp_enabled)
        bar = tqdm(
            total=settings.max_steps,
            desc=f"Noise {round_ + 1}/{args.rounds}",
            leave=False,
            disable=args.disable_tqdm or not self.is_local_process_zero(),
        )

        def show(step: int, influence: float) -> None:
            bar.set_postfix(influence=f"{influence:.4f}", epsilon=settings.epsilon, refresh=False)
            bar.update(step - bar.n)

        with bar, own_randomness(round_seed):
            held_out, batches = noise_stream(
                dataset,
                collate,
                batch_size=args.noise_batch_size,  # type: ignore[arg-type]
                held_out_images=args.held_out_images,
                seed=seed,
                round=round_,
                rank=args.process_index,
                processes=args.world_size,
                num_workers=args.dataloader_num_workers,
                input_name=getattr(unwrap(self.model), "main_input_name", "pixel_values"),
            )
            noise, history = learn_noise(
                self._model_to_ask(model),
                batches,
                settings,
                seed=round_seed,
                held_out=held_out,
                hook=self._hook,
                chunk_size=2 * self._train_batch_size,  # what a training step takes fits here too
                provenance=replace(known, training_step=self.state.global_step, round=round_),
                on_step=show,
            )
        self._keep(noise, history, round_)
        return noise

    def _model_to_ask(self, model: nn.Module) -> nn.Module:
        """What the noise is learned on: the training model, but without DDP, whose forward expects a backward pass."""
        compiled_from = model._modules.get("_orig_mod")
        if isinstance(compiled_from, nn.parallel.DistributedDataParallel):
            if self._compiled is None or self._compiled._modules["_orig_mod"] is not compiled_from.module:
                options = self.accelerator.state.dynamo_plugin.to_kwargs()
                self._compiled = torch.compile(compiled_from.module, **options)  # type: ignore[assignment]
            return self._compiled  # type: ignore[return-value]
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def _keep(self, noise: NullspaceNoise, history: NoiseHistory, round_: int) -> None:
        entry = {"round": round_, "step": self.state.global_step} | history.summary(noise)
        self.history = [*self.history[:round_], entry]
        folder = Path(self._get_output_dir(getattr(self, "_trial", None)))
        if self.args.should_save:
            with one_clear_error(folder):
                noise.save(folder / "noises" / bank_file_name(round_))
                write_json(folder / HISTORY_NAME, self.history)
        if history.stopped != "epsilon" and self.is_world_process_zero():
            outcome = "scaled into it" if history.stopped == "rescaled" else "used as it is"
            logger.warning(
                f"round {round_}: {history.steps} noise steps did not reach epsilon={self.args.epsilon}; "
                f"the noise is {outcome}"
            )
        shown = ("round", "noise_steps", "influence", "minibatch_influence", "norm", "centred_norm", "seconds")
        self.log({f"noise/{name}": value for name in shown if (value := entry[name]) is not None})

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **named: Any) -> Any:
        """The Trainer's; ``resume_from_checkpoint=True`` takes the last checkpoint that is whole.

        Raises:
            NoCheckpointError: if there is none, or the one that is named is not whole.
        """
        self._restored, self._start = False, None
        folder = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir), self.args.world_size)
        return super().train(str(folder) if folder else None, *positional, **named)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        super()._update_auto_batch_size(batch_size)
        if self._start is None:
            self._start = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        elif not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # again after out of memory: upstream goes on
            self.model.load_state_dict(self._start)
            self.optimizer = self._given_optimizer

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *more: Any) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, steps_per_epoch, epochs, *more)
        # A finished run has no epoch left: upstream (5.23) would train one step more, in the middle of an epoch.
        return (epochs, 0) if self.state.global_step >= max_steps else begun

    def _hp_search_setup(self, trial: Any) -> None:
        steps = self.args.max_steps
        super()._hp_search_setup(trial)
        if trial is not None:
            self.args.settle_after_trial(steps)

    def _begin(self) -> None:
        """A run begins: afresh, also when ``auto_find_batch_size`` begins again; or goes on from a checkpoint."""
        if not self._restored:
            self.noise, self._round, self.history = None, None, []
            if self.ema is not None:
                self.ema.start(self.model)
        self._restored = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, with the present noise, the history and the averaged weights beside the model's."""
        folder = Path(output_dir or str(self.args.output_dir))
        with one_clear_error(folder):
            if self.args.should_save:
                self._save_noise(folder)
                if self.ema is not None:
                    self.ema.save(folder)
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with one_clear_error(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save_noise(self, folder: Path) -> None:
        if self.noise is not None:
            self.noise.save_pretrained(folder)
        write_json(folder / HISTORY_NAME, self.history)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Older checkpoints are deleted next: not before every rank's part of this one is on the disk.
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save:
            self._save_noise(Path(str(self.args.output_dir)))  # upstream copies a fixed list of files
        super()._push_from_checkpoint(checkpoint_folder)

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
            self.noise = NullspaceNoise.load(Path(best) / WEIGHTS_NAME)  # saved beside the weights: those it was for

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if (folder / HISTORY_NAME).exists():
            self.history = json.loads((folder / HISTORY_NAME).read_text(encoding="utf-8"))
        self.noise, self._round = None, None
        if (folder / WEIGHTS_NAME).exists():
            self.noise = NullspaceNoise.load(folder / WEIGHTS_NAME)
            self._round = self.noise.provenance.round
        if self.ema is not None:
            self.ema.start(self.model)
            self.ema.load(folder)
        self._restored = True

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


class _RunBegins(TrainerCallback):
    """Tells the trainer that a training loop begins, and the data set which epoch; the Trainer has no method for it."""

    def __init__(self, trainer: NullspaceTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate 1.15 tells it to a map-style data set only if there is one process and nothing was skipped.
        data: Any = self._trainer.train_dataset
        if hasattr(data, "set_epoch") and hasattr(data, "__len__"):
            data.set_epoch(int(state.epoch or 0))
