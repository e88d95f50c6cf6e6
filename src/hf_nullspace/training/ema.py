"""An exponential moving average of the weights: kept per step, saved in checkpoints, swapped in to be evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

from hf_nullspace.files import make_lasting
from hf_nullspace.training.checkpoints import load_weights

FOLDER = "ema"


class EmaCallback(TrainerCallback):
    """Averaged weights w' = decay * w' + (1 - decay) * w after every optimizer step, from the weights at the start.

    The paper evaluates its ViT-B + DAT row on such an average. In a checkpoint they lie in ``ema/``, a model folder
    like any other: ``from_pretrained(checkpoint, subfolder="ema")``.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        self.decay = decay
        self.start(model)

    def start(self, model: PreTrainedModel) -> None:
        """Begin the average at the present weights of ``model``."""
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
        self.model.save_pretrained(Path(folder) / FOLDER)
        if processor is not None:
            processor.save_pretrained(Path(folder) / FOLDER)
        make_lasting(Path(folder) / FOLDER)

    def load(self, folder: Path | str) -> None:
        """Read the averaged model of a checkpoint.

        Raises:
            OSError: if the checkpoint has none.
        """
        load_weights(self.model, Path(folder) / FOLDER)

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
