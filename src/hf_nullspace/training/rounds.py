"""What an objective has at hand when a round begins: the present model, images of its own, and ways to make a noise."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_nullspace import __version__
from hf_nullspace.models.patch_embedding import EmbeddingShape, PatchEmbeddingNoise, embedding_shape
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise
from hf_nullspace.noise.calibration import calibrate
from hf_nullspace.noise.learning import NoiseHistory, NoiseSettings, learn_noise

Made = tuple[NullspaceNoise, NoiseHistory]
"""A noise, and what happened while it was made."""


@dataclass
class Round:
    """One round k of Algorithm 1, as it begins. Nothing is read or computed before it is asked for."""

    number: int
    seed: int
    """Of this round alone, derived from the run's seed and the number; everything random has to come from it."""
    settings: NoiseSettings
    model: nn.Module
    hook: PatchEmbeddingNoise
    stream: Callable[[], tuple[list[Tensor], Iterator[Tensor]]]
    """Gives (held-out batches, an endless stream of other batches), this process's share of each."""
    known: Callable[[], NoiseProvenance] = field(default=NoiseProvenance)
    """What is known of the model that the noise is for."""
    chunk_size: int | None = None
    previous: NullspaceNoise | None = None
    """The noise of the round before, for a warm start."""
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
        """Shape of the patch embeddings."""
        example = self.held_out[0] if self.held_out else next(self._images[1])
        with torch.no_grad():
            return embedding_shape(self.model, example, self.hook.module)

    def learn(self, start: Tensor | None = None) -> Made:
        """A noise learned on the present model (Algorithm 1, lines 3 to 14), from ``start`` or from U(-A, A).

        Raises:
            ValueError: if the settings need held-out images and there are none.
        """
        settings = self.settings
        needs_held_out = settings.stop_on == "held_out" or settings.on_limit == "rescale"
        if needs_held_out and not self.held_out:
            raise ValueError("held_out_images=0: this preset tests epsilon on held-out images; keep some")
        return learn_noise(
            self.model,
            self._images[1],
            settings,
            seed=self.seed,
            held_out=self.held_out,
            start=start,
            hook=self.hook,
            chunk_size=self.chunk_size,
            provenance=self.known(),
            on_step=self.on_step,
        )

    def scaled(self, direction: Tensor, made: str, history: NoiseHistory | None = None) -> Made:
        """``direction`` (1, N, D) scaled to the influence epsilon on the held-out images.

        ``made`` says in the provenance where the direction comes from; ``history`` is that of its making, if any.

        Raises:
            ValueError: if there is no epsilon, or no held-out image to measure on.
            NoiseNotCalibratedError: if no factor has that influence.
        """
        epsilon = self.settings.epsilon
        if epsilon is None:
            raise ValueError("epsilon is not set; a noise is scaled to an influence: set epsilon")
        if not self.held_out:
            raise ValueError("held_out_images=0: a noise is scaled on held-out images; keep some")
        begin = time.perf_counter()
        found = calibrate(
            self.model, direction, epsilon, self.held_out, hook=self.hook, chunk_size=self.chunk_size
        )  # fmt: skip
        history = history or NoiseHistory()
        history.stopped, history.held_out_influence = "calibrated", found.influence
        history.seconds += time.perf_counter() - begin
        provenance = replace(
            self.known(),
            seed=self.seed,
            epsilon=epsilon,
            influence=found.influence,
            influence_images=found.images,
            steps=history.steps,
            stopped=history.stopped,
            settings={"made": made, "factor": found.factor, "evaluations": found.evaluations},
            library=f"hf_nullspace {__version__}",
        )
        return NullspaceNoise(found.noise.detach().cpu(), self.shape.grid, provenance), history
