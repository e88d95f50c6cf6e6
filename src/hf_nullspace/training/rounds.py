"""The inputs of an objective at the start of a round: the current model, its own images, and ways to make a noise."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_nullspace.models.patch_embedding import EmbeddingShape, PatchEmbeddingNoise, embedding_shape
from hf_nullspace.noise.algorithm1 import NoiseSettings, learn_noise
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.calibration import Calibrated, calibrate
from hf_nullspace.noise.history import NoiseHistory, warn, worst
from hf_nullspace.noise.provenance import completed

_LARGEST = 2.0
"""By how much an earlier noise is scaled up at most, if the model has become less sensitive to it."""


class RoundNoises(NamedTuple):
    """The noises of a round, the new one first, and the history of the new one."""

    noises: tuple[NullspaceNoise, ...]
    history: NoiseHistory


@dataclass
class Round:
    """One round k of Algorithm 1, as it begins. Images are read, and noises computed, when they are asked for."""

    number: int
    seed: int
    """Seed of this round only, from the run's seed and the number; all randomness has to come from it."""
    settings: NoiseSettings | BoundarySettings
    model: nn.Module
    hook: PatchEmbeddingNoise
    stream: Callable[[], tuple[list[Tensor], Iterator[Tensor]]]
    """Gives (held-out batches, an endless stream of other batches), this process's share of each."""
    known: Callable[[], NoiseProvenance] = field(default=NoiseProvenance)
    """What is known of the model that the noise is for."""
    chunk_size: int | None = None
    previous: tuple[NullspaceNoise, ...] = ()
    """The noises of the round before, the newest first."""
    warm_start: bool = False
    """Whether learning starts from the newest noises of the round before."""
    bank_size: int = 1
    """How many noises the round has."""
    on_step: Callable[[int, float], None] | None = None

    @cached_property
    def _images(self) -> tuple[list[Tensor], Iterator[Tensor]]:
        return self.stream()

    @property
    def held_out(self) -> Sequence[Tensor]:
        """Batches ``pixel_values`` (b, C, H, W) that no noise is learned on."""
        return self._images[0]

    @cached_property
    def shape(self) -> EmbeddingShape:
        """Shape of the patch embeddings; may read a batch."""
        example = self.held_out[0] if self.held_out else next(self._images[1])
        return embedding_shape(self.model, example, self.hook.module)

    def learn(self, *, without_previous: bool = False) -> RoundNoises:
        """Noises learned on the current model, and earlier ones scaled to epsilon on it, up to ``bank_size``.

        Learned by Algorithm 1 (lines 3 to 14), or by following the boundary, as the settings say. ``without_previous``:
        the noises of the round before are neither a start nor kept.
        """
        start = None
        if self.warm_start and self.previous and not without_previous:
            start = torch.cat([noise.tensor for noise in self.previous])
        options: dict[str, Any] = {
            "seed": self.seed,
            "held_out": self.held_out,
            "hook": self.hook,
            "chunk_size": self.chunk_size,
            "provenance": self.known(),
            "on_step": self.on_step,
        }
        batches = self._images[1]
        if isinstance(self.settings, BoundarySettings):
            learned, history = follow_boundary(self.model, batches, self.settings, start=start, **options)
        else:
            start = None if start is None else start[:1]
            noise, history = learn_noise(self.model, batches, self.settings, start=start, **options)
            learned = [noise]
        return RoundNoises(
            (*learned, *(() if without_previous else self.rescale_previous(self.bank_size - len(learned)))), history
        )

    def rescale_previous(self, count: int) -> tuple[NullspaceNoise, ...]:
        """The ``count`` newest of the round before (or all, if there are fewer), scaled to epsilon on this model."""
        kept = self.previous[: max(count, 0)]
        if not kept:
            return ()
        scaled = self._calibrated([noise.tensor for noise in kept], _LARGEST)
        return tuple(as_noise(each, noise.provenance, noise.grid) for noise, each in zip(kept, scaled, strict=True))

    def _calibrated(self, directions: Sequence[Tensor], largest: float = math.inf) -> list[Calibrated]:
        epsilon = self.settings.epsilon
        if epsilon is None:
            raise ValueError("epsilon is not set; a noise is scaled to an influence: set epsilon")
        options: dict[str, Any] = {"hook": self.hook, "chunk_size": self.chunk_size, "largest": largest}
        return calibrate(self.model, directions, epsilon, self.held_out, **options)

    def scale_to_epsilon(
        self, directions: Sequence[Tensor], origin: str, history: NoiseHistory | None = None
    ) -> RoundNoises:
        """Each of ``directions`` (1, N, D) scaled to the influence epsilon on the held-out images.

        ``origin`` is recorded in the provenance; ``history`` is the learning history, if any. Where no factor has that
        influence, the largest noise below it is used, marked and warned about, so that a long run does not fail.

        Raises:
            ValueError: if there is no epsilon, or no held-out image to measure on.
            NoiseNotCalibratedError: if every factor that was tried has more than that influence.
        """
        begin = time.perf_counter()
        found = self._calibrated(directions)
        history = history or NoiseHistory()
        endings = [scaled.ended for scaled in found]
        history.stopped = worst([*endings, history.stopped])
        history.held_out_influence = found[0].influence
        warn(worst(endings), min(scaled.influence for scaled in found), self.settings.epsilon, 0, self.number)
        history.seconds += time.perf_counter() - begin
        known = completed(self.known(), seed=self.seed, epsilon=self.settings.epsilon, steps=history.steps)
        noises = []
        for scaled in found:
            settings = {"made": origin, "factor": scaled.factor, "evaluations": scaled.evaluations}
            noises.append(as_noise(scaled, replace(known, settings=settings), self.shape.grid))
        return RoundNoises(tuple(noises), history)


def as_noise(scaled: Calibrated, known: NoiseProvenance, grid: tuple[int, int]) -> NullspaceNoise:
    """What was scaled, with what is ``known`` of it and what was measured."""
    measured: dict[str, Any] = {
        "influence": scaled.influence,
        "influence_images": scaled.images,
        "stopped": scaled.ended,
    }
    return NullspaceNoise(scaled.noise.detach().cpu(), grid, replace(known, **measured))


class WithoutDDP:
    """Unwraps DDP for forward passes without gradients of parameters, which DDP's own forward would expect."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._compiled: tuple[nn.Module, Any] | None = None  # what DDP wraps, and that compiled

    def __call__(self, model: nn.Module) -> Any:
        """The module inside DDP, compiled if ``model`` is compiled."""
        wrapped = model._modules.get("_orig_mod", model)
        if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return model
        if wrapped is model:
            return model.module
        if self._compiled is None or self._compiled[0] is not wrapped.module:
            options = self._accelerator.state.dynamo_plugin.to_kwargs()
            self._compiled = wrapped.module, torch.compile(wrapped.module, **options)
        return self._compiled[1]


@contextmanager
def noise_progress(
    title: str, steps: int, *, epsilon: float | None, hidden: bool
) -> Iterator[Callable[[int, float], None]]:
    """A bar over the steps of a noise; gives what to call with (steps done, influence)."""
    with tqdm(total=steps, desc=title, leave=False, disable=hidden) as bar:

        def show(step: int, influence: float) -> None:
            bar.set_postfix(influence=f"{influence:.4f}", epsilon=epsilon, refresh=False)
            bar.update(step - bar.n)

        yield show
