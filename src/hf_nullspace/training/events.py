"""What the Trainer tells callbacks alone: when a training loop begins and ends, its logs, and its epochs."""

import math
from typing import Any, Protocol

from transformers import TrainerCallback

from hf_nullspace.training.divergence import check_loss


class Listener(Protocol):
    """The trainer that is told."""

    model: Any
    train_dataset: Any

    def begin_run(self) -> None: ...
    def end_run(self) -> None: ...


class RunEvents(TrainerCallback):
    """Tells the trainer when a run begins and ends, and the data set which epoch it is; ends a run with a NaN loss."""

    def __init__(self, trainer: Listener) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_run()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_run()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            check_loss(loss, state.global_step, self._trainer.model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate 1.15 tells it to a map-style data set only if there is one process and nothing was skipped.
        data: Any = self._trainer.train_dataset
        if hasattr(data, "set_epoch") and hasattr(data, "__len__"):
            data.set_epoch(int(state.epoch or 0))
