"""An exponential moving average of the weights: kept per step, saved in checkpoints, swapped in to be evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

from hf_nullspace.core.files import make_lasting
from hf_nullspace.training.checkpoints import load_weights

FOLDER = "ema"


def average_of(trainer: Any) -> "EmaCallback | None":
    """The average that the trainer's settings ask for, as one of its callbacks; None if they ask for none."""
    if trainer.args.ema_decay is None:
        return None
    if not trainer._is_plain:
        raise ValueError("ema_decay needs a whole transformers model per process: no FSDP, DeepSpeed or PEFT")
    average = EmaCallback(trainer.model, trainer.args.ema_decay, trainer.args.ema_from)
    trainer.add_callback(average)
    return average


class EmaCallback(TrainerCallback):
    """Averaged weights w' = decay * w' + (1 - decay) * w after every optimizer step, from the weights at the start.

    ``start_from``, a folder or an id on the Hub, holds other weights for w' to start from: the same model's average.
    The paper evaluates its ViT-B + DAT row on such an average. In a checkpoint they are in ``ema/``, a model folder
    like any other: ``from_pretrained(checkpoint, subfolder="ema")``.
    """

    def __init__(self, model: PreTrainedModel, decay: float, start_from: str | None = None) -> None:
        self.decay, self.start_from = decay, start_from
        self._copy_of(model)

    def start(self, model: PreTrainedModel, checkpoint: Path | None = None) -> None:
        """Begin the average of ``model``: where ``checkpoint`` has it, or else at its start.

        Raises:
            ValueError: if ``start_from`` holds no weights for this model, with the names and shapes.
            OSError: if the checkpoint has no average.
        """
        self._copy_of(model)
        if checkpoint is not None:
            load_weights(self.model, checkpoint / FOLDER)
        elif self.start_from is not None:
            try:
                load_weights(self.model, self.start_from, local=False)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise ValueError(
                    f"ema_from={self.start_from!r} cannot start the average ({' '.join(str(error).split())}); name a "
                    "folder, or an id on the Hub, with weights of the model that is trained"
                ) from error

    def _copy_of(self, model: PreTrainedModel) -> None:
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self._average.n_averaged.fill_(1)  # 0 would make the first update a copy and forget the start
        self._model = model

    @property
    def model(self) -> PreTrainedModel:
        """A copy of the model that holds the averaged weights."""
        return cast(PreTrainedModel, self._average.module)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._average.to(next(self._model.parameters()).device)
        self._average.update_parameters(self._model)

    def save(self, folder: Path | str, processor: Any = None) -> None:
        """Write the averaged model into ``folder``/ema, with its image processor: it is used as any other folder."""
        (Path(folder) / FOLDER).mkdir(parents=True, exist_ok=True)  # transformers answers with an AssertionError
        self.model.save_pretrained(Path(folder) / FOLDER)
        if processor is not None:
            processor.save_pretrained(Path(folder) / FOLDER)
        make_lasting(Path(folder) / FOLDER)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the model with the averaged weights inside, and with its own again afterwards."""
        own = [parameter.detach().clone() for parameter in self._model.parameters()]
        self._copy(list(self.model.parameters()))
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._model.parameters(), values, strict=True):
            parameter.copy_(value)
