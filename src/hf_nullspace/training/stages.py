"""Views that follow one after the other: each stage of an objective is one forward and backward pass of the trainer.

A later view may be made from the gradient that an earlier one's backward pass gives: it is asked for as the gradient of
a noise that is zero, one per image, on the patch embeddings of the view "clean". So it costs no pass.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.training.objectives import Batch, Objective, View, known_preprocessing, make_objective


class Stages:
    """An objective, its ``then``, and so on: which of them a micro-batch is at.

    Raises:
        ValueError: if something follows, or it needs the whole model, and the weights are spread over processes (FSDP,
            DeepSpeed).
    """

    def __init__(self, objective: Objective, *, sharded: bool = False) -> None:
        self._all = [objective]
        while (following := self._all[-1].then) is not None:
            self._all.append(following)
        if sharded and (len(self._all) > 1 or objective.needs_whole_model):
            raise ValueError(
                "an objective with two backward passes per batch (fgm), or with noise of the size of the patch "
                "embeddings (universal), is not supported with FSDP and DeepSpeed; use DDP (one whole model per "
                "process) or another objective"
            )
        self.objective = objective
        """That of the present stage."""
        self._zero: Tensor | None = None
        self._gradient: Tensor | None = None

    def run(self, step: Callable[[], Tensor], no_sync: Callable[[], AbstractContextManager[None]]) -> Tensor:
        """One micro-batch: ``step`` is a forward and backward pass of the present stage, and gives its loss.

        Gradients are summed over processes in the last stage alone; the others are inside ``no_sync()``. The sum of
        the losses.
        """
        losses = []
        try:
            for objective in self._all:
                self.objective = objective
                with nullcontext() if objective.then is None else no_sync():
                    losses.append(step())
                if self._zero is not None:
                    self._gradient = self._zero.grad
        finally:
            self.objective, self._zero, self._gradient = self._all[0], None, None
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def views(self, batch: Batch) -> dict[str, View]:
        """The views of the present stage, with what it takes for the next one to know their gradient."""
        views = self.objective.views(replace(batch, gradient=self._gradient))
        if self.objective.then is None:
            return views
        self._zero = torch.zeros_like(batch.embeddings()).requires_grad_()
        return views | {"clean": replace(views["clean"], noise=self._zero)}


def image_seeds(args: Any, step: int, micro_batch: int, count: int) -> list[int]:
    """One seed for each of the ``count`` images of a micro-batch of this process, in an optimizer step.

    They are the same however the whole batch is spread over processes and micro-batches.
    """
    first = (micro_batch * args.world_size + args.process_index) * count
    return [derive_seed(args.seed, max(step, 0), first + index) for index in range(count)]


def forward_views(
    model: nn.Module,
    hook: PatchEmbeddingNoise,
    inputs: dict[str, Any],
    views: Mapping[str, View],
    input_name: str,
    *,
    together: bool = True,
) -> dict[str, Tensor]:
    """The logits (B, K) of every view, in one joint pass or one pass per view; views with noise come last.

    One pass keeps a GPU busy; on a CPU it was not the faster way (``benchmarks/train_step.py``). Whatever else of
    ``inputs`` has one entry per image goes with every view; the labels are left out.
    """
    names = sorted(views, key=lambda name: views[name].noise is not None)
    others = {name: value for name, value in inputs.items() if name not in ("labels", input_name)}
    if not together:
        logits = {}
        for name in names:
            noise, images = views[name].noise, views[name].images
            with nullcontext() if noise is None else hook.adding(noise.to(images.device)):
                logits[name] = model(**others, **{input_name: images}).logits
        return logits
    count, copies = len(inputs["labels"]), len(names)
    repeated = {
        name: torch.cat([value] * copies)
        if isinstance(value, Tensor) and value.dim() and len(value) == count
        else value
        for name, value in others.items()
    }
    repeated[input_name] = torch.cat([views[name].images for name in names])
    with _noises([views[name].noise for name in names], hook, repeated[input_name]):
        chunks = model(**repeated).logits.chunk(copies)
    return dict(zip(names, chunks, strict=True))


def _noises(
    noises: Sequence[Tensor | None], hook: PatchEmbeddingNoise, images: Tensor
) -> AbstractContextManager[object]:
    """Adds the noise of each view, those without come first, to its part of ``images``."""
    given = [noise.to(images.device) for noise in noises if noise is not None]
    if len(given) < 2:
        return hook.adding(given[0], len(noises)) if given else nullcontext()
    each = len(images) // len(noises)
    rows = [noise.expand(each, -1, -1) for noise in given]
    clean = rows[0].new_zeros((len(images) - each * len(rows), *rows[0].shape[1:]))
    return hook.adding(torch.cat([clean, *rows]))


def take_objective(trainer: Any) -> None:
    """Make the objective that the settings name now, and what depends on it; a trial of a search changes settings."""
    args = trainer.args
    trainer._objective = trainer.record.objective = make_objective(args.objective, args)
    trainer._stages = Stages(trainer._objective, sharded=trainer._sharded)
    trainer._preprocessing = known_preprocessing(trainer._objective, trainer.processing_class, args.objective)
