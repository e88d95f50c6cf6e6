"""The part of the trainer that acts when a round begins: the objective makes a noise, and what was made is kept."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer

from hf_nullspace.core.files import one_clear_error, write_json
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise, unwrap
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise, bank_file_name, provenance_of
from hf_nullspace.noise.history import NoiseHistory
from hf_nullspace.noise.probe import not_finite_weight
from hf_nullspace.training.checkpoints import HISTORY_NAME
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.cost import Cost
from hf_nullspace.training.noise_stream import noise_stream, own_randomness
from hf_nullspace.training.objectives import Objective
from hf_nullspace.training.rounds import Round


class RoundTrainer(Trainer):
    """A Trainer that can make a round's noise; :class:`NullspaceTrainer` says when, and what the noise is for."""

    args: NullspaceConfig
    model: Any
    noises: tuple[NullspaceNoise, ...]
    history: list[dict[str, Any]]
    cost: Cost
    _objective: Objective
    _hook: PatchEmbeddingNoise | None
    _compiled: nn.Module | None
    _in_trial: Any = None

    @property
    def noise(self) -> NullspaceNoise | None:
        """The newest noise of the present round; None before the first, and for objectives without one."""
        return self.noises[0] if self.noises else None

    @property
    def _run_folder(self) -> Path:
        """Where this run writes: ``output_dir``, or the folder of a trial in it."""
        return Path(self._get_output_dir(self._in_trial))

    # ---- NaN ends a run

    def train(self, *positional: Any, **named: Any) -> Any:
        """The Trainer's.

        Raises:
            FloatingPointError: if a loss, a noise or a weight is NaN or infinite, with the step and the tensor's name.
        """
        outputs = super().train(*positional, **named)
        self._check_weights()
        return outputs

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # With this option, its default, the Trainer waits for every step's loss all the same, and hides NaN.
        if self.args.logging_nan_inf_filter and not loss.isfinite():
            raise self._diverged(loss.item(), inputs)
        return loss

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        super().log(logs, *more, **named)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise self._diverged(logs["loss"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._check_weights()
        super().save_model(output_dir, _internal_call)

    def _diverged(self, loss: float, inputs: dict[str, Any] | None = None) -> FloatingPointError:
        weight = not_finite_weight(self.model)
        poor = [name for name, each in (inputs or {}).items() if isinstance(each, Tensor) and not each.isfinite().all()]
        if poor:
            culprit = f"{poor[0]} of the batch has NaN or infinity: check the images and their preprocessing"
        else:
            culprit = f"the weight {weight} is NaN or infinite" if weight else "the model's logits are NaN or infinite"
            culprit += ": start again with a lower learning_rate, or with bf16 instead of fp16"
        return FloatingPointError(f"optimizer step {self.state.global_step}: the loss is {loss}: {culprit}")

    def _check_weights(self) -> None:
        weight = not_finite_weight(self.model)
        if weight is not None:
            raise FloatingPointError(
                f"optimizer step {self.state.global_step}: the weight {weight} is NaN or infinite: start again with a "
                "lower learning_rate, or with bf16 instead of fp16"
            )

    # ---- rounds

    def _learn(self, model: nn.Module, round_: int) -> tuple[NullspaceNoise, ...]:
        """A round's noises, on its own seeded stream; logged, the newest kept as ``noises/round-KKK.safetensors``."""
        assert self._hook is not None
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        round_seed, settings = derive_seed(seed, round_), self.args.noise_settings()
        device_batch = self.get_total_train_batch_size(self.args) // (
            self.args.gradient_accumulation_steps * self.args.world_size
        )
        with (
            self._named(round_),
            self._progress(round_, self.args.noise_max_steps or 0) as show,
            own_randomness(round_seed),
            self.cost.during("noise"),
        ):
            made = self._objective.round_noise(
                Round(
                    number=round_,
                    seed=round_seed,
                    settings=settings,
                    model=self.cost.counted(self._model_to_ask(model)),
                    hook=self._hook,
                    stream=partial(self._noise_images, seed, round_),
                    known=partial(self._provenance, round_),
                    chunk_size=2 * device_batch,  # what a training step takes fits here too
                    previous=self.noises,
                    warm_start=bool(self.args.noise_warm_start),
                    bank_size=self.args.noise_bank_size or 1,
                    on_step=show,
                )
            )
        if made is None:
            return ()
        self._keep(made.noises, made.history, round_)
        return made.noises

    def _noise_images(self, seed: int, round_: int) -> tuple[list[Tensor], Iterator[Tensor]]:
        """Held-out batches of a round, and the endless others."""
        args = self.args
        loader: Any = self.callback_handler.train_dataloader
        loader = self.get_train_dataloader() if loader is None else loader  # without columns that the model lacks
        return noise_stream(
            loader.dataset if isinstance(self.train_dataset, Dataset) else self.train_dataset,
            loader.collate_fn,
            batch_size=args.noise_batch_size,  # type: ignore[arg-type]
            held_out_images=args.held_out_images,
            seed=seed,
            round=round_,
            rank=args.process_index,
            processes=args.world_size,
            num_workers=args.dataloader_num_workers,
            input_name=getattr(unwrap(self.model), "main_input_name", "pixel_values"),
        )

    def _provenance(self, round_: int) -> NoiseProvenance:
        known = provenance_of(self.model, hashed=not self.is_fsdp_enabled)
        return replace(known, training_step=self.state.global_step, round=round_)

    @contextmanager
    def _named(self, round_: int) -> Iterator[None]:
        """What is NaN inside says in which round."""
        try:
            yield
        except FloatingPointError as error:
            at = f"round {round_}, after {self.state.global_step} optimizer steps"
            raise FloatingPointError(f"{at}: {error}") from None

    @contextmanager
    def _progress(self, round_: int, steps: int) -> Iterator[Callable[[int, float], None]]:
        """A bar over a round's noise steps; gives what to call with (steps done, influence)."""
        hidden = self.args.disable_tqdm or not self.is_local_process_zero()
        with tqdm(total=steps, desc=f"Noise {round_ + 1}/{self.args.rounds}", leave=False, disable=hidden) as bar:

            def show(step: int, influence: float) -> None:
                bar.set_postfix(influence=f"{influence:.4f}", epsilon=self.args.epsilon, refresh=False)
                bar.update(step - bar.n)

            yield show

    def _model_to_ask(self, model: nn.Module) -> nn.Module:
        """What the noise is learned on: the training model, but without DDP, whose forward expects a backward pass."""
        compiled_from = model._modules.get("_orig_mod")
        if isinstance(compiled_from, nn.parallel.DistributedDataParallel):
            if self._compiled is None or self._compiled._modules["_orig_mod"] is not compiled_from.module:
                options = self.accelerator.state.dynamo_plugin.to_kwargs()
                self._compiled = torch.compile(compiled_from.module, **options)  # type: ignore[assignment]
            return self._compiled  # type: ignore[return-value]
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def _keep(self, noises: tuple[NullspaceNoise, ...], history: NoiseHistory, round_: int) -> None:
        noise = noises[0]
        before = self.cost.passes("noise")
        self.cost.sync()
        passes = {kind: count - before[kind] for kind, count in self.cost.passes("noise").items()}
        entry = {"round": round_, "step": self.state.global_step} | history.summary(noise.tensor) | {"cost": passes}
        if len(noises) > 1:
            entry["bank"] = [
                {
                    "round": kept.provenance.round,
                    "centred_norm": kept.centred_norm,
                    "influence": kept.provenance.influence,
                    "stopped": kept.provenance.stopped,
                }
                for kept in noises
            ]
        self.history = [*self.history[:round_], entry]
        folder = self._run_folder
        if self.args.should_save:
            with one_clear_error(folder):
                noise.save(folder / "noises" / bank_file_name(round_))
                write_json(folder / HISTORY_NAME, self.history)
        shown = ("round", "noise_steps", "influence", "minibatch_influence", "norm", "centred_norm", "seconds")
        self.log({f"noise/{name}": value for name in shown if (value := entry[name]) is not None})
