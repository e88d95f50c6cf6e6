"""When a run begins and ends, as the Trainer tells callbacks alone; a run ends at the first NaN, which is named."""

import math
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from hf_nullspace.noise.probe import not_finite_weight

_AGAIN = "start again with a lower learning_rate, or with bf16 instead of fp16"


def check_weights(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError if a weight of ``model`` is NaN or infinite after ``step`` optimizer steps."""
    if (weight := not_finite_weight(model)) is not None:
        raise FloatingPointError(f"optimizer step {step}: the weight {weight} is NaN or infinite: {_AGAIN}")


def check_loss(loss: float, step: int, model: nn.Module, inputs: dict[str, Any] | None = None) -> None:
    """Raise FloatingPointError if ``loss`` is NaN or infinite; it names the input or the weight that is."""
    if abs(loss) < float("inf"):
        return
    not_finite = [
        name for name, each in (inputs or {}).items() if isinstance(each, Tensor) and not each.isfinite().all()
    ]
    if not_finite:
        culprit = f"{not_finite[0]} of the batch has NaN or infinity: check the images and their preprocessing"
    else:
        weight = not_finite_weight(model)
        culprit = f"the weight {weight} is NaN or infinite" if weight else "the model's logits are NaN or infinite"
        culprit += f": {_AGAIN}"
    raise FloatingPointError(f"optimizer step {step}: the loss is {loss}: {culprit}")


def tell_epoch(data: Any, epoch: float | None) -> None:
    """Of map-style data sets accelerate 1.15 tells it only if there is one process and nothing was skipped."""
    if hasattr(data, "set_epoch") and hasattr(data, "__len__"):
        data.set_epoch(int(epoch or 0))


class RunEvents(TrainerCallback):
    """Tells the trainer when a run begins and ends, and the data set which epoch it is; ends a run with a NaN loss."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_run()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.record.objective.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_run()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            check_loss(loss, state.global_step, self._trainer.model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tell_epoch(self._trainer.train_dataset, state.epoch)
