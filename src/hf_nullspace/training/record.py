"""What a run keeps of itself beside the weights: noises and their history, its cost, the state of its objective."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_nullspace.core.files import one_clear_error, read_json, write_json, write_whole
from hf_nullspace.noise.artifact import WEIGHTS_NAME, NullspaceNoise, bank_file_name, load_noise_bank, save_noise_bank
from hf_nullspace.training.checkpoints import HISTORY_NAME, NOISES, restore_noises
from hf_nullspace.training.cost import NAME as COST_NAME
from hf_nullspace.training.cost import Cost
from hf_nullspace.training.objectives import Objective
from hf_nullspace.training.rounds import RoundNoises

BANK_NAME = "nullspace_bank"
"""Folder of a checkpoint with several noises in its round; the first of them is the one beside the model, too."""
STATE_NAME = "nullspace_objective.safetensors"
"""In a checkpoint: what its objective carries from step to step (:meth:`Objective.state`), if that is anything."""
_LOGGED = ("round", "noise_steps", "influence", "minibatch_influence", "norm", "centred_norm", "seconds")


class RunRecord:
    """The noises of the present round, one history entry per round, the objective's state, and the cost up to now.

    It is no ``ExportableState``: transformers restores those as new objects, only on request, and without tensors.
    """

    def __init__(self) -> None:
        self.noises: tuple[NullspaceNoise, ...] = ()
        """Of the present round, the newest first."""
        self.round: int | None = None
        self.history: list[dict[str, Any]] = []
        """As in nullspace_history.json."""
        self.cost = Cost()
        self.objective: Objective | None = None

    def start(self, checkpoint: Path | None, run: Path, *, writes: bool) -> None:
        """A run begins: from nothing, or from what ``checkpoint`` has; noises that ``run`` has lost come back.

        Raises:
            ValueError: if the objective goes on from a state, and ``checkpoint`` has none of this objective.
        """
        if self.objective is not None:
            self.objective.begin(None)
        self.noises, self.round = (), None
        self.history.clear()
        saved = None
        if checkpoint is not None:
            if (checkpoint / HISTORY_NAME).exists():
                self.history += read_json(checkpoint / HISTORY_NAME)
                if writes:
                    restore_noises(checkpoint, run, self.history)
            if (checkpoint / COST_NAME).exists():
                saved = read_json(checkpoint / COST_NAME)
            self.load(checkpoint)
        self.cost.start(saved)

    def load(self, folder: Path) -> None:
        """The noises beside the weights in ``folder``, those of the round in which it was written; the state, too."""
        if (folder / BANK_NAME).is_dir():
            self.noises = tuple(load_noise_bank(folder / BANK_NAME))
        elif (folder / WEIGHTS_NAME).exists():
            self.noises = (NullspaceNoise.load(folder / WEIGHTS_NAME),)
        if self.noises:
            self.round = self.noises[0].provenance.round
        if self.objective is not None:
            self.objective.begin(_tensors_of(folder / STATE_NAME))

    def add(self, number: int, step: int, made: RoundNoises | None, run: Path, *, writes: bool) -> dict[str, Any]:
        """A round begins with these noises; the newest is kept in ``run``/noises. What is logged of it."""
        self.noises, self.round = () if made is None else made.noises, number
        if made is None:
            return {}
        before = self.cost.passes("noise")
        self.cost.sync()
        passes = {kind: count - before[kind] for kind, count in self.cost.passes("noise").items()}
        newest = made.noises[0]
        entry = {"round": number, "step": step} | made.history.summary(newest.tensor) | {"cost": passes}
        if len(made.noises) > 1:
            entry["bank"] = [
                {
                    "round": noise.provenance.round,
                    "centred_norm": noise.centred_norm,
                    "influence": noise.provenance.influence,
                    "stopped": noise.provenance.stopped,
                }
                for noise in made.noises
            ]
        self.history[number:] = [entry]
        if writes:
            with one_clear_error(run):
                newest.save(run / NOISES / bank_file_name(number))
                write_json(run / HISTORY_NAME, self.history)
        return {f"noise/{name}": entry[name] for name in _LOGGED if entry[name] is not None}

    def save(self, folder: Path) -> None:
        """Write the noises, the state, the history and the cost beside a model."""
        if self.noises:
            self.noises[0].save_beside_model(folder)
        if len(self.noises) > 1:
            save_noise_bank(self.noises, folder / BANK_NAME)
        if self.objective is not None and (state := self.objective.state()):
            write_whole(folder / STATE_NAME, lambda temporary: save_file(state, temporary))
        write_json(folder / HISTORY_NAME, self.history)
        self.save_cost(folder)

    def save_cost(self, folder: Path) -> None:
        """Write the cost alone."""
        write_json(folder / COST_NAME, self.cost.summary())


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """What a file of safetensors holds; nothing if there is none. Raises a ValueError if it is damaged."""
    try:
        return load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); go on from another checkpoint") from None
