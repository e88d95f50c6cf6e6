"""Which checkpoint a killed run can go on from, and how its weights are loaded without losing any."""

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_nullspace.core.files import (
    MANIFEST_NAME,
    DamagedFileError,
    damaged_files,
    read_json,
    write_json,
    write_manifest,
    write_whole,
)
from hf_nullspace.models.loading import without_load_report
from hf_nullspace.noise.artifact import WEIGHTS_NAME, bank_file_name

logger = logging.getLogger(__name__)

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_0",
    "latest",  # DeepSpeed's pointer to its own folder, which holds the optimizer as well
)
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")
HISTORY_NAME = "nullspace_history.json"
RUN_NAME = "nullspace_run.json"
"""In a checkpoint: the identity of its run, where that is known."""
NOISES = "noises"
"""Folder of the noises of all rounds, in a run and in its checkpoints."""


class NoCheckpointError(ValueError):
    """There is no checkpoint to go on from, or it is not whole."""


def missing_from(checkpoint: Path, processes: int, *, sealed: bool = True, run: str | None = None) -> list[str]:
    """What a checkpoint folder lacks for an exact resume; an empty list if it is complete.

    ``manifest.json`` is written last, when all other files are on the disk; a checkpoint from elsewhere, such as the
    Hub, may have none (``sealed=False``). ``run`` is the identity of the run it must belong to.
    """
    missing = []
    if not any((checkpoint / name).exists() for name in _WEIGHTS):
        missing.append("the weights")
    state = _read(checkpoint / "trainer_state.json")
    if not isinstance(state, dict) or "global_step" not in state:
        missing.append("a readable trainer_state.json")
    elif f"{PREFIX_CHECKPOINT_DIR}-{state['global_step']}" != checkpoint.name:
        missing.append(f"a trainer_state.json of its own (it is of step {state['global_step']})")
    if not any((checkpoint / name).exists() for name in _OPTIMIZERS):
        missing.append("the optimizer")
    if not (checkpoint / "scheduler.pt").exists():
        missing.append("the scheduler")
    if _read(checkpoint / HISTORY_NAME, damaged=True) and not (checkpoint / WEIGHTS_NAME).exists():
        missing.append("the noise")
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing += [name for name in names if not (checkpoint / name).exists()]
    if run is not None and not missing and _read(checkpoint / RUN_NAME) != {"run": run}:
        missing.append(f"a {RUN_NAME} of this run")
    if missing:
        return missing
    if not (checkpoint / MANIFEST_NAME).exists():
        return [f"{MANIFEST_NAME}, which is written last"] if sealed else []
    try:
        return damaged_files(checkpoint)
    except DamagedFileError:
        return [f"a readable {MANIFEST_NAME}"]


def _read(path: Path, damaged: Any = None) -> Any:
    """What a JSON file holds; None if it is not there, and ``damaged`` if it is."""
    try:
        return read_json(path)
    except OSError:
        return None
    except DamagedFileError:
        return damaged


def complete_checkpoint(
    run: Path, checkpoint: Path, history: Sequence[Mapping[str, Any]], identity: str | None
) -> None:
    """Put the noises of all rounds into a checkpoint, and the identity of its run, if known; then the manifest.

    A noise that the run loses can be brought back from there.
    """
    for entry in history:
        name = bank_file_name(entry["round"])
        if (run / NOISES / name).exists():
            _copy(run / NOISES / name, checkpoint / NOISES / name)
    if identity is not None:
        write_json(checkpoint / RUN_NAME, {"run": identity})
    write_manifest(checkpoint)


def restore_noises(checkpoint: Path, run: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Copy back noises that a run has lost, of the rounds in ``history``; warns where there is no copy."""
    for entry in history:
        name = bank_file_name(entry["round"])
        kept, place = checkpoint / NOISES / name, run / NOISES / name
        if place.exists() and (not kept.exists() or place.read_bytes() == kept.read_bytes()):
            continue
        if kept.exists():
            logger.warning("%s was %s; it is back from %s", place, "damaged" if place.exists() else "lost", checkpoint)
            _copy(kept, place)
        else:
            logger.warning("%s is lost, and %s has no copy: the noises of this run are incomplete", place, checkpoint)


def _copy(source: Path, target: Path) -> None:
    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)

    write_whole(target, write)


def last_complete_checkpoint(folder: Path | str, processes: int = 1, run: str | None = None) -> Path | None:
    """The last whole checkpoint, of ``run`` if that is given; warns of those that it skips."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = []
    if Path(folder).is_dir():
        found = [(int(m[1]), path) for path in Path(folder).iterdir() if (m := pattern.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        missing = missing_from(path, processes, run=run)
        if not missing:
            return path
        logger.warning("skipped %s, it is not whole: it lacks %s", path, ", ".join(missing))
    return None


def checkpoint_to_resume(resume: Path | str | bool | None, folder: Path | str, processes: int) -> Path | None:
    """What ``resume_from_checkpoint`` means: ``True`` is the last whole checkpoint in ``folder``.

    A checkpoint that is named may lack the manifest.

    Raises:
        NoCheckpointError: if there is none, or the one that is named is not whole, saying what is missing.
    """
    if not resume:
        return None
    if resume is True:
        last = last_complete_checkpoint(folder, processes)
        if last is None:
            raise NoCheckpointError(f"no checkpoint that is whole in {folder}; start without resuming")
        return last
    path = Path(resume)
    if not path.is_dir():
        raise NoCheckpointError(f"cannot resume from {path}: there is no such folder")
    if missing := missing_from(path, processes, sealed=False):
        raise NoCheckpointError(
            f"cannot resume from {path}: it lacks {', '.join(missing)}. resume_from_checkpoint=True takes the last "
            "checkpoint that is whole"
        )
    return path


def load_weights(model: PreTrainedModel, folder: Path | str, *, local: bool = True) -> None:
    """Load every weight of a saved model into ``model``, in place, or raise; not ``local``: also one of the Hub.

    Works around transformers 5.23, where a ViT is saved under legacy key names and the Trainer loads them with
    ``strict=False``: the encoder stays as it was, with a warning (transformers #48805).
    """
    with without_load_report():
        loading: Any = type(model).from_pretrained(
            str(folder),
            config=model.config,
            dtype=model.dtype,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    loaded, info = loading
    wrong = [f"{key} is {tuple(there)} there and {tuple(here)} here" for key, there, here in info["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in info["missing_keys"]]
    wrong += [f"{key} has no place" for key in info["unexpected_keys"]]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise NoCheckpointError(
            f"{folder} does not hold the weights of this {type(model).__name__}: {'; '.join(sorted(wrong)[:4])}{more}"
        )
    model.load_state_dict(loaded.state_dict(), strict=True)
