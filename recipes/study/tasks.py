"""The tasks of a study, train a run or measure one condition of it: a finished one is kept and not done again."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageClassification, PrinterCallback, TrainerCallback

from hf_nullspace.averaging import interpolate
from hf_nullspace.core.files import damaged_files, size_and_hash
from hf_nullspace.noise.artifact import model_hash
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.records import Records, from_bits, record
from hf_nullspace.robustness.suite import Clean, Corrupted, evaluate
from hf_nullspace.training.checkpoints import last_complete_checkpoint
from hf_nullspace.training.run_settings import claim_folder
from hf_nullspace.training.trainer import NullspaceTrainer
from study.design import Measurement, Run, slug
from study.images import ImageStore

FINISHED = "finished"
_TRAINED = ("model.safetensors", "config.json", "preprocessor_config.json", "nullspace_noise.*", "noises/*")
logger = logging.getLogger(__name__)

Task = Run | Measurement
"""A run is trained (or averaged; the checkpoint before is only hashed), or measured."""


def run_of(task: Task) -> Run:
    """The run that a task is about."""
    return task.run if isinstance(task, Measurement) else task


@dataclass
class Runner:
    """Does tasks below ``folder``; knows the checkpoint, the data and the settings of all runs."""

    folder: Path
    store: ImageStore
    trainer_of: Callable[[Run, Path], NullspaceTrainer]
    """Makes the trainer of a run, with a copy of the checkpoint, for the run's folder."""
    load_base: Callable[[], Any]
    """Gives a copy of the checkpoint that all runs start from."""
    settings_of: Callable[[Run], Mapping[str, Any]]
    """What determines a run besides the trainer's settings: the checkpoint and the data; other values, another run."""
    device: torch.device
    dtype: str = "float32"
    """What evaluation computes in: "float32", or "bf16" for autocast."""
    batch_size: int = 256
    overwrite: bool = False
    attn_implementation: str | None = None
    """Of the models that are measured; None is transformers' choice."""
    _run_ids: dict[Run, str] = field(default_factory=dict)
    _is_whole: dict[Run, bool] = field(default_factory=dict)
    _loaded: tuple[Run, PixelModel] | None = None

    def finished(self, task: Task) -> dict[str, Any] | None:
        """What a task gave, or None if it is not finished."""
        run = run_of(task)
        trained = self._records(run).read(FINISHED)
        if trained is None or not self._files_are_whole(run, trained):
            return None
        if run != run.trained and trained["of"] != (self.finished(run.trained) or {}).get("weights"):
            return None  # the weights that it is an average of were trained again
        if isinstance(task, Run):
            return trained
        found = self._records(task).read(slug(task.planned.title))
        return found if found is not None and found["key"] == self._key(task, trained["weights"]) else None

    def correct(self, task: Measurement) -> NDArray[np.bool_]:
        """One bool per image of a finished measurement."""
        found = self.finished(task)
        assert found is not None
        return from_bits(found["correct_bits"], found["n"])

    def _records(self, task: Task) -> Records:
        return Records(self.folder / run_of(task).folder / (task.slice.name if isinstance(task, Measurement) else ""))

    def _files_are_whole(self, run: Run, trained: Mapping[str, Any]) -> bool:
        """Whether the files of a finished training are as they were written; looked at once."""
        if run not in self._is_whole:
            damaged = damaged_files(self.folder / run.folder, trained.get("files", {}))
            if damaged:
                logger.warning("%s lacks %s; it is trained again", self.folder / run.folder, ", ".join(damaged))
            self._is_whole[run] = not damaged
        return self._is_whole[run]

    def _key(self, task: Measurement, weights: str) -> str:
        return Records.key(
            sort_keys=False,
            weights=weights,
            images=self.store.fingerprint,
            places=task.places,
            condition=repr(task.planned.condition),
            normalisation=[self.store.preprocessing.mean, self.store.preprocessing.std],
            seed=self.store.seed,
            dtype=self.dtype,
        )

    def claim(self, run: Run) -> None:
        """Refuse to mix runs of other settings into this study, before anything is done.

        Raises:
            OtherRunError: naming the settings that differ.
        """
        if run.seed is None or run != run.trained:
            return
        folder = self.folder / run.folder
        settings = {"study": self.settings_of(run), "training": self.trainer_of(run, folder).args.to_dict()}
        try:
            self._run_ids[run] = claim_folder(folder, settings)
        except ValueError:
            if not self.overwrite:
                raise
            shutil.rmtree(folder)
            self._run_ids[run] = claim_folder(folder, settings)

    def do(self, task: Task, deadline: float | None = None) -> bool:
        """Do a task, or as much of a training as there is time for; whether it is finished.

        ``deadline`` is on the clock of ``time.monotonic``; a training stops at its next checkpoint after it.

        Raises:
            OtherRunError: if the run's folder holds a training with other settings.
        """
        if isinstance(task, Measurement):
            self._measure(task)
        elif task.seed is None:
            entry: dict[str, Any] = {"weights": model_hash(self.load_base()), "cost": None, "rounds": []}
            self._records(task).write(FINISHED, entry)
        elif task != task.trained:
            tuned = self.finished(task.trained)
            assert tuned is not None
            entry = tuned | {"weights": model_hash(self._model(task).model), "of": tuned["weights"], "files": {}}
            self._records(task).write(FINISHED, entry)
        else:
            return self._train(task, deadline)
        return True

    def _train(self, run: Run, deadline: float | None) -> bool:
        folder = self.folder / run.folder
        trainer = self.trainer_of(run, folder)
        trainer.remove_callback(PrinterCallback)
        if deadline is not None:
            trainer.add_callback(_StopAfter(deadline))
        trainer.run = self._run_ids.get(run)
        checkpoint = last_complete_checkpoint(folder, run=trainer.run)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            return False
        trainer.save_model()
        trained = (path for pattern in _TRAINED for path in sorted(folder.glob(pattern)))
        entry: dict[str, Any] = {
            "weights": model_hash(trainer.model),
            "cost": trainer.cost.summary(),
            "rounds": [{key: value for key, value in entry.items() if key != "trace"} for entry in trainer.history],
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "files": {path.relative_to(folder).as_posix(): size_and_hash(path) for path in trained},
        }
        self._records(run).write(FINISHED, entry)
        self._is_whole[run] = True
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
        return True

    def _measure(self, task: Measurement) -> None:
        model, condition = self._model(task.run), task.planned.condition
        begin = time.perf_counter()
        images = self.store.get(task.places, condition).in_memory()
        conditions = [Clean() if isinstance(condition, Corrupted) else condition]
        options: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.store.seed, "progress": False}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            (result,) = evaluate(model, images, conditions, **options)
        trained = self.finished(task.run)
        assert trained is not None
        entry = record(result) | {"condition": task.planned.title, "key": self._key(task, trained["weights"])}
        entry["seconds"] = round(time.perf_counter() - begin, 3)
        self._records(task).write(slug(task.planned.title), entry)

    def _model(self, run: Run) -> PixelModel:
        if self._loaded is None or self._loaded[0] != run:
            if run.seed is None:
                model = self.load_base()
            else:
                model = AutoModelForImageClassification.from_pretrained(
                    self.folder / run.trained.folder, attn_implementation=self.attn_implementation
                )
                if run.choice is not None and run != run.trained:
                    model = interpolate(self.load_base(), model, run.choice.alpha)
            preprocessing = self.store.preprocessing
            self._loaded = run, PixelModel(model.to(self.device).eval(), preprocessing.mean, preprocessing.std)
        return self._loaded[1]


class _StopAfter(TrainerCallback):
    """Ends a training at the first checkpoint after a deadline; it goes on from there the next time."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.deadline:
            control.should_training_stop = True
