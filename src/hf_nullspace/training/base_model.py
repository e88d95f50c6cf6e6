"""The small ViT that a recipe trains first where no model is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_nullspace.core.files import (
    MANIFEST_NAME,
    DamagedFileError,
    damaged_files,
    one_clear_error,
    read_json,
    write_json,
    write_manifest,
)
from hf_nullspace.data.image_set import ImageSet, collate
from hf_nullspace.training.checkpoints import last_complete_checkpoint, load_weights
from hf_nullspace.training.loading import Classifier
from hf_nullspace.training.losses import view_loss

BASE_RANGES = {"base_epochs": "(0, inf)", "base_learning_rate": "(0, inf)", "base_batch_size": "int [1, inf)"}
"""Of the options of the recipes that train one (:mod:`~hf_nullspace.core.settings`)."""
SETTINGS_NAME, BEGUN_NAME = "base.json", "begun.json"


def train_base_model(
    classifier: Classifier,
    train_set: ImageSet,
    folder: Path,
    run: TrainingArguments,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    """Train ``classifier.model`` with the plain Trainer and keep it in ``folder``, or take what an earlier run left.

    Seed, precision and machine are those of ``run``; ``batch_size`` counts the images of all processes. A training that
    was killed goes on from its last tenth. A model with damaged files, other settings or other images is trained again.

    Raises:
        ValueError: if there are fewer images than one batch has.
        NotWrittenError: if it cannot be written.
    """
    if batch_size > len(train_set):
        raise ValueError(f"base_batch_size={batch_size}, but there are {len(train_set)} training images")
    state = PartialState()
    training = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": run.seed}
    settings = _settings(classifier, train_set, training)
    if folder.is_dir() and (damaged := _damaged(folder, settings)):
        say(f"{folder} is damaged or of another run, it lacks {', '.join(damaged)}")
        state.wait_for_everyone()  # all have looked
        if state.is_main_process:
            shutil.rmtree(folder)
        state.wait_for_everyone()
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".part")
        checkpoint = _begun(unfinished, settings, run.world_size)
        say(f"Training a small ViT for {epochs:g} epochs" + (f", on from {checkpoint.name}" if checkpoint else ""))
        args = TrainingArguments(
            output_dir=str(unfinished),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=0.05,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=max(batch_size // run.world_size, 1),
            save_strategy="steps",
            save_steps=0.1,
            save_total_limit=2,
            logging_steps=0.1,  # of the whole
            seed=run.seed,
            use_cpu=run.use_cpu,
            bf16=run.bf16,
            torch_compile=run.torch_compile,
            disable_tqdm=run.disable_tqdm,
            dataloader_num_workers=run.dataloader_num_workers,
            dataloader_pin_memory=run.dataloader_pin_memory,
            dataloader_persistent_workers=run.dataloader_persistent_workers,
        )
        processor = classifier.image_processor
        trainer = Trainer(
            classifier.model,
            args,
            train_dataset=train_set,
            data_collator=collate,
            processing_class=processor,
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: view_loss(
                outputs.logits, labels, num_items_in_batch
            ),  # the model's own loss takes no class probabilities
        )
        trainer.add_callback(_Sealed())
        if checkpoint:
            load_weights(classifier.model, checkpoint)  # the Trainer would leave the encoder as it is
        with one_clear_error(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.save_model()
            state.wait_for_everyone()
            if state.is_main_process:
                for old in unfinished.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                    shutil.rmtree(old)
                (unfinished / BEGUN_NAME).unlink()
                write_json(unfinished / SETTINGS_NAME, settings, sealed=True)
                write_manifest(unfinished)
                unfinished.rename(folder)
        state.wait_for_everyone()
    model: Any = classifier.model
    model.to("cpu").load_state_dict(type(model).from_pretrained(folder).state_dict())
    model.config._name_or_path = str(folder)


class _Sealed(TrainerCallback):
    """Writes the manifest of a checkpoint, by which one is known to be whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state_of_all = PartialState()
        state_of_all.wait_for_everyone()
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        state_of_all.wait_for_everyone()


def _begun(unfinished: Path, settings: dict[str, Any], processes: int) -> Path | None:
    """The last whole checkpoint of a training with these ``settings``; one with others is deleted."""
    state = PartialState()
    try:
        same = read_json(unfinished / BEGUN_NAME) == settings
    except (OSError, DamagedFileError):
        same = False
    state.wait_for_everyone()  # all have looked
    if state.is_main_process and not same:
        shutil.rmtree(unfinished, ignore_errors=True)
        write_json(unfinished / BEGUN_NAME, settings)
    state.wait_for_everyone()
    return last_complete_checkpoint(unfinished, processes)


def _settings(classifier: Classifier, train_set: ImageSet, training: dict[str, float]) -> dict[str, Any]:
    """What a base model depends on."""
    without = ("transformers_version", "_name_or_path", "architectures", "dtype", "problem_type")
    model = {name: value for name, value in classifier.model.config.to_dict().items() if name not in without}
    settings = {"model": model, "images": train_set.content_fingerprint(), "training": training}
    return json.loads(json.dumps(settings, default=str))


def _damaged(folder: Path, settings: dict[str, Any]) -> list[str]:
    try:
        return damaged_files(folder) or (["these settings"] if read_json(folder / SETTINGS_NAME) != settings else [])
    except (OSError, DamagedFileError):
        return [f"a readable {MANIFEST_NAME}"]
