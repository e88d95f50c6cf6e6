"""The pieces of work of a study: a training, or one condition of one run. Each is kept when it is finished, none done
twice, and a piece whose settings changed is noticed."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageClassification, PrinterCallback, TrainerCallback

from hf_nullspace.core.files import DamagedFileError, damaged_files, read_json, size_and_hash, write_json
from hf_nullspace.noise.artifact import model_hash
from hf_nullspace.robustness.image_sets import InMemory
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.plans import Planned
from hf_nullspace.robustness.records import FORMAT, from_bits, record
from hf_nullspace.robustness.suite import Clean, Corrupted, evaluate
from hf_nullspace.training.checkpoints import last_complete_checkpoint
from hf_nullspace.training.run_settings import claim_folder
from hf_nullspace.training.trainer import NullspaceTrainer
from study.design import Run, Slice, slug
from study.images import ImageStore

FINISHED = "finished.json"
_TRAINED = ("model.safetensors", "config.json", "preprocessor_config.json", "nullspace_noise.*", "noises/*")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A training (no condition), or one condition of a run on a slice."""

    run: Run
    planned: Planned | None = None
    slice: Slice | None = None

    def __str__(self) -> str:
        if self.planned is None:
            return f"train {self.run}"
        assert self.slice is not None
        return f"measure {self.run}: {self.planned.title} ({self.slice.name})"

    @property
    def places(self) -> tuple[int, ...]:
        """The test images that it looks at."""
        assert self.planned is not None
        assert self.slice is not None
        return self.slice.places(self.planned.limit)


class Workshop:
    """Does pieces below ``folder``; knows the checkpoint, the data and the settings of all runs.

    Args:
        trainer_of: makes the trainer of a run, with a copy of the checkpoint, for the run's folder.
        load_base: gives a copy of the checkpoint that all runs start from.
        shared_settings: what all runs have in common besides the trainer's settings; another value is another study.
        normalisation: mean and std of the image processor.
        dtype: what evaluation computes in: "float32", or "bf16" for autocast.
        attn_implementation: of the models that are measured; None is transformers' choice.
    """

    def __init__(
        self,
        folder: Path,
        store: ImageStore,
        trainer_of: Callable[[Run, Path], NullspaceTrainer],
        load_base: Callable[[], Any],
        normalisation: tuple[tuple[float, ...], tuple[float, ...]],
        *,
        shared_settings: Mapping[str, Any],
        device: torch.device,
        dtype: str = "float32",
        batch_size: int = 256,
        seed: int = 0,
        overwrite: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        self.folder, self.store, self.trainer_of, self.load_base = folder, store, trainer_of, load_base
        self.mean, self.std = normalisation
        self.shared_settings = dict(shared_settings)
        self.device, self.dtype, self.batch_size, self.seed, self.overwrite = device, dtype, batch_size, seed, overwrite
        self.attn_implementation = attn_implementation
        self._loaded: tuple[Run, PixelModel] | None = None
        self._identities: dict[Run, str] = {}
        self._looked_at: dict[Run, bool] = {}

    # ---- what is finished

    def finished(self, piece: Piece) -> dict[str, Any] | None:
        """What a piece gave, or None if it is not finished."""
        if piece.planned is None:
            found = _read(self.folder / piece.run.folder / FINISHED)
            return found if found is not None and self._whole(piece.run, found) else None
        found = _read(self._path(piece))
        trained = self.finished(Piece(piece.run))
        if found is None or trained is None or found["key"] != self._key(piece, trained["weights"]):
            return None
        return found

    def _whole(self, run: Run, found: dict[str, Any]) -> bool:
        """Whether the files of a finished training are as they were written; looked at once, said if not."""
        if run not in self._looked_at:
            folder = self.folder / run.folder
            damaged = damaged_files(folder, found.get("files", {}))
            if damaged:
                logger.warning("%s lacks %s; it is trained again", folder, ", ".join(damaged))
            self._looked_at[run] = not damaged
        return self._looked_at[run]

    def correct(self, piece: Piece) -> NDArray[np.bool_]:
        """One bool per image of a finished measurement."""
        found = self.finished(piece)
        assert found is not None
        return from_bits(found["correct_bits"], found["n"])

    def _path(self, piece: Piece) -> Path:
        assert piece.planned is not None
        assert piece.slice is not None
        return self.folder / piece.run.folder / piece.slice.name / f"{slug(piece.planned.title)}.json"

    def _key(self, piece: Piece, weights: str) -> str:
        assert piece.planned is not None
        text = json.dumps(
            {
                "format": FORMAT,
                "weights": weights,
                "images": self.store.fingerprint,
                "places": piece.places,
                "condition": repr(piece.planned.condition),
                "normalisation": [self.mean, self.std],
                "seed": self.seed,
                "dtype": self.dtype,
            }
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    # ---- doing them

    def do(self, piece: Piece, deadline: float | None = None) -> bool:
        """Do a piece, or as much of a training as there is time for; whether it is finished.

        ``deadline`` is on the clock of ``time.monotonic``; a training stops at its next checkpoint after it.

        Raises:
            OtherRunError: if the run's folder holds a training with other settings.
        """
        if piece.planned is not None:
            self._measure(piece)
            return True
        return self._keep_before(piece.run) if piece.run.seed is None else self._train(piece.run, deadline)

    def claim(self, run: Run) -> None:
        """Refuse to mix runs of other settings into this study, before anything is done.

        Raises:
            OtherRunError: naming the settings that differ.
        """
        if run.seed is None:
            return
        folder = self.folder / run.folder
        trainer = self.trainer_of(run, folder)
        settings = {"study": self.shared_settings, "training": trainer.args.to_dict()}
        try:
            self._identities[run] = claim_folder(folder, settings)
        except ValueError:
            if not self.overwrite:
                raise
            shutil.rmtree(folder)
            self._identities[run] = claim_folder(folder, settings)

    def _keep_before(self, run: Run) -> bool:
        model = self.load_base()
        entry: dict[str, Any] = {"weights": model_hash(model), "cost": None, "rounds": []}
        write_json(self.folder / run.folder / FINISHED, entry, sealed=True)
        return True

    def _train(self, run: Run, deadline: float | None) -> bool:
        folder = self.folder / run.folder
        trainer = self.trainer_of(run, folder)
        trainer.remove_callback(PrinterCallback)
        if deadline is not None:
            trainer.add_callback(_StopAfter(deadline))
        trainer.run = self._identities.get(run)
        checkpoint = last_complete_checkpoint(folder, run=trainer.run)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            return False
        trainer.save_model()
        rounds = [{key: value for key, value in entry.items() if key != "trace"} for entry in trainer.history]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        entry = {"cost": trainer.cost.summary(), "rounds": rounds, "losses": losses}
        trained = (path for pattern in _TRAINED for path in sorted(folder.glob(pattern)))
        files = {path.relative_to(folder).as_posix(): size_and_hash(path) for path in trained}
        write_json(folder / FINISHED, {"weights": model_hash(trainer.model)} | entry | {"files": files}, sealed=True)
        self._looked_at[run] = True
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
        return True

    def _measure(self, piece: Piece) -> None:
        assert piece.planned is not None
        model = self._model(piece.run)
        condition = piece.planned.condition
        begin = time.perf_counter()
        images = InMemory(self.store.get(piece.places, condition))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            (result,) = evaluate(
                model,
                images,
                [Clean() if isinstance(condition, Corrupted) else condition],
                batch_size=self.batch_size,
                seed=self.seed,
                progress=False,
            )
        trained = self.finished(Piece(piece.run))
        assert trained is not None
        entry = record(result) | {"condition": piece.planned.title, "key": self._key(piece, trained["weights"])}
        write_json(self._path(piece), entry | {"seconds": round(time.perf_counter() - begin, 3)}, sealed=True)

    def _model(self, run: Run) -> PixelModel:
        if self._loaded is None or self._loaded[0] != run:
            if run.seed is None:
                model = self.load_base()
            else:
                model = AutoModelForImageClassification.from_pretrained(
                    self.folder / run.folder, attn_implementation=self.attn_implementation
                )
            self._loaded = run, PixelModel(model.to(self.device).eval(), self.mean, self.std)
        return self._loaded[1]


class _StopAfter(TrainerCallback):
    """Ends a training at the first checkpoint after a deadline; it goes on from there the next time."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.deadline:
            control.should_training_stop = True


def pieces_of(run: Run, plan: list[Planned], where: Slice) -> Iterator[Piece]:
    """The training of a run, then its conditions on a slice."""
    yield Piece(run)
    for planned in plan:
        yield Piece(run, planned, where)


def _read(path: Path) -> dict[str, Any] | None:
    """What a finished piece left, or None; a damaged file is said, and its piece done again."""
    try:
        return read_json(path) if path.is_file() else None
    except DamagedFileError as error:
        logger.warning("%s; it is made again", error)
        return None
