"""Learn noises by following the boundary of the epsilon region: fewer and cheaper steps than Algorithm 1.

Algorithm 1 starts far outside of the region, where the model's output is destroyed, and descends until it is inside.
Here a noise is a direction and a radius: it starts as a random direction (or an earlier noise) scaled to the influence
epsilon, the direction descends, and the radius follows, so that the influence stays at epsilon while the norm grows.
The images are a fixed pool. Their clean logits are computed once (the model is frozen), so a step is one forward and
one backward pass to the noise: 2 forward-equivalents, where the authors' step takes 4 and Algorithm 1's here 3.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hf_nullspace.core.seeds import generator_of
from hf_nullspace.core.settings import check_choices, check_numbers
from hf_nullspace.models.patch_embedding import EmbeddingShape, PatchEmbeddingNoise
from hf_nullspace.noise.algorithm1 import LOSSES
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise, provenance_of
from hf_nullspace.noise.calibration import scale_into, scale_to_influence
from hf_nullspace.noise.history import NoiseHistory, scaled_ending, warn, worst
from hf_nullspace.noise.influence import centre
from hf_nullspace.noise.probe import Probe, probing
from hf_nullspace.noise.provenance import completed

_EXPONENT, _SLOWEST, _FASTEST = 0.25, 0.7, 1.3
"""The radius is multiplied by (epsilon / influence)^0.25 after a step, within [0.7, 1.3]."""
_ORDER = 2  # keeps the order of the pool apart from other random numbers of the same seed


@dataclass(frozen=True)
class BoundarySettings:
    """How noises follow the boundary."""

    epsilon: float = 0.03
    """The influence that the noises are kept at, in (0, 2]."""
    steps: int = 60
    """Gradient steps; all are taken."""
    learning_rate: float = 0.2
    """Of the direction (Adam, cosine over the steps): the share of its length that a step may turn it by."""
    noise_limit: float = 3.0
    """A: no token's noise gets longer than A * sqrt(D / 3), the length of a token of U(-A, A). LayerNorm saturates, so
    on patches that do not matter a noise could grow without an end."""
    pool_images: int = 1024
    """Images in the pool, over all processes; 0: fresh ones every step, with their clean logits."""
    count: int = 1
    """Noises that are learned at once; each has its share of every batch."""
    loss: Literal["l2", "squared_l2"] = "l2"
    """Mean over images of ||z' - z||_2 (equation 10), or of its square."""
    tolerance: float = 0.04
    """The influence on held-out images ends in [(1 - tolerance) * epsilon, epsilon]."""

    def __post_init__(self) -> None:
        ranges = {"epsilon": "(0, 2]", "steps": "int [1, inf)", "learning_rate": "(0, inf)", "noise_limit": "(0, inf)"}
        check_numbers(self, ranges | {"pool_images": "int [0, inf)", "count": "int [1, inf)", "tolerance": "(0, 1)"})
        check_choices(self, {"loss": LOSSES})


def follow_boundary(
    model: nn.Module,
    batches: Iterable[Tensor],
    settings: BoundarySettings | None = None,
    *,
    seed: int,
    held_out: Sequence[Tensor],
    start: Tensor | None = None,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
    provenance: NoiseProvenance | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[list[NullspaceNoise], NoiseHistory]:
    """Learn ``settings.count`` noises v (1, N, D) of influence epsilon and large centred norm (equation 9).

    The model, ``held_out``, ``hook`` and ``chunk_size`` are those of :func:`hf_nullspace.noise.probe.probing`.

    Args:
        batches: minibatches ``pixel_values`` (b, C, H, W); on several processes this rank's share of each. The pool is
            filled from the first of them; without a pool every step takes one.
        seed: of the start and of the order of the pool; noises are determined by seed, batches and model.
        held_out: batches on which the noises are scaled to epsilon at the end (this rank's share).
        start: directions (m, N, D) to start from, such as earlier noises; only the first ``count`` are used, and
            missing ones are random.
        provenance: where the model comes from, if the caller knows more than its config says.
        on_step: called with (steps done, mean influence on the minibatch), for a progress bar.

    Raises:
        FloatingPointError: if the loss or influence is NaN or infinite, naming the step and the tensor it comes from.
        NoiseNotCalibratedError: if no length of a noise is inside epsilon.
        ValueError: if there are no held-out images, or the batches run out.
    """
    settings = settings or BoundarySettings()
    if not held_out:
        raise ValueError("noises are scaled to epsilon on held-out images: pass held_out=[pixel_values, ...]")
    begin, history = time.perf_counter(), NoiseHistory()
    with probing(model, held_out, hook=hook, chunk_size=chunk_size) as probe:
        pool = Pool(probe, iter(batches), settings.pool_images, seed)
        directions = start_directions(start, settings.count, probe.shape, seed).to(probe.device, probe.noise_dtype)
        noises = Noises(directions, settings)
        noises.reach_epsilon(probe)
        descend_on_the_boundary(probe, noises, pool, settings, history, on_step)
        influence, endings = noises.scale(probe)
        grid, images = probe.shape.grid, probe.held_out_images
    history.stopped, history.held_out_influence = worst(endings), influence[0]
    history.seconds = time.perf_counter() - begin
    known = provenance or provenance_of(probe.model)
    warn(history.stopped, min(influence), settings.epsilon, history.steps, known.round)
    described = {"learner": "boundary", **asdict(settings)}
    measured = {"epsilon": settings.epsilon, "influence_images": images, "steps": history.steps}
    provenance = completed(known, seed=seed, settings=described, **measured)
    found = [
        NullspaceNoise(tensor[None].cpu(), grid, replace(provenance, influence=reached, stopped=ending))
        for tensor, reached, ending in zip(noises.tensor().detach(), influence, endings, strict=True)
    ]
    return found, history


def descend_on_the_boundary(
    probe: Probe,
    noises: "Noises",
    pool: "Pool",
    settings: BoundarySettings,
    history: NoiseHistory,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Every step: the directions move down the gradient of E||z' - z||, the radii follow the influence."""
    rate = settings.learning_rate / math.sqrt(noises.directions[0].numel())  # a unit vector's elements are that large
    optimizer = torch.optim.Adam([noises.directions], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps)
    for step in range(settings.steps):
        x, clean = pool.draw()
        noise = noises.tensor()
        v = noise.detach().requires_grad_()
        probe.step = step
        influence, loss, gradient = probe.measure(x, v, LOSSES[settings.loss], clean)
        history.record(v.detach()[:1], influence, loss)
        (noises.directions.grad,) = torch.autograd.grad(noise, [noises.directions], gradient)
        optimizer.step()
        schedule.step()
        noises.follow(influence)
        history.steps += 1
        if on_step is not None:
            on_step(history.steps, history.influence[-1])


def start_directions(start: Tensor | None, count: int, shape: EmbeddingShape, seed: int) -> Tensor:
    """(count, N, D): the given ones, and random ones for those that are missing; the same on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(count, shape.patches, shape.features, generator=generator)
    if start is None:
        return random
    if start.shape[1:] != random.shape[1:]:
        raise ValueError(f"start of shape {tuple(start.shape)}: expected (m, {shape.patches}, {shape.features})")
    start = start[:count].detach().cpu()
    return torch.cat([start, random[len(start) :].to(start.dtype)])


class Noises:
    """M noises as unit directions (M, N, D) without the tokens' means, and radii; long tokens are cut."""

    def __init__(self, directions: Tensor, settings: BoundarySettings) -> None:
        self.directions = _units(centre(directions.detach())).requires_grad_()
        self.radii = [1.0] * len(directions)
        self.settings = settings
        self.longest = settings.noise_limit * math.sqrt(directions.shape[-1] / 3)
        self.all_cut = 10 * self.longest * math.sqrt(directions.shape[1])
        """A radius at which nearly every token is as long as it may be."""

    def tensor(self) -> Tensor:
        """(M, N, D), differentiable in the directions."""
        units = _units(self.directions)
        return self._cut(units * units.new_tensor(self.radii)[:, None, None])

    def follow(self, influence: Sequence[float]) -> None:
        """After a step of the directions: unit vectors again, and radii after the influence from before the step."""
        with torch.no_grad():
            self.directions.copy_(_units(centre(self.directions)))
        for index, found in enumerate(influence):
            change = (self.settings.epsilon / max(found, 1e-8)) ** _EXPONENT
            self.radii[index] = min(self.radii[index] * min(max(change, _SLOWEST), _FASTEST), self.all_cut)

    def reach_epsilon(self, probe: Probe) -> None:
        """Radii at which the noises have roughly the influence epsilon, on the first held-out batch."""
        start = self.longest * math.sqrt(self.directions.shape[1]) / 8
        for index in range(len(self.radii)):
            influence_at = self._influence_at(probe, index, 1)
            self.radii[index] = scale_to_influence(
                influence_at, self.settings.epsilon, start=start, tolerance=0.25, largest=self.all_cut
            ).factor

    def scale(self, probe: Probe) -> tuple[list[float], list[str]]:
        """Radii at which the influence on the held-out images is in [(1 - tolerance) * epsilon, epsilon].

        Gives the influence of every noise, and its ending. A noise that is inside at every length gets the largest.
        """
        epsilon, tolerance = self.settings.epsilon, self.settings.tolerance
        influence, endings = [], []
        for index, radius in enumerate(self.radii):
            influence_at = self._influence_at(probe, index, None)
            scaled = scale_into(influence_at, epsilon, start=radius, largest=self.all_cut, tolerance=tolerance)
            self.radii[index] = scaled.factor
            influence.append(scaled.influence)
            at_bound = scaled.factor >= self.all_cut
            endings.append(scaled_ending(scaled.influence, epsilon, at_bound=at_bound, least=1 - tolerance))
        return influence, endings

    def _influence_at(self, probe: Probe, index: int, batches: int | None) -> Callable[[float], float]:
        """The influence of noise ``index`` as a function of its radius, on the first held-out ``batches`` or all."""

        @torch.no_grad()
        def influence_at(radius: float) -> float:
            return probe.held_out_influence(self._cut(self.directions[index : index + 1] * radius), batches)

        return influence_at

    def _cut(self, noises: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(noises, dim=-1, keepdim=True)
        return noises * (self.longest / lengths.clamp(min=1e-12)).clamp(max=1)


def _units(directions: Tensor) -> Tensor:
    return directions / torch.linalg.vector_norm(directions, dim=(1, 2), keepdim=True)


class Pool:
    """Batches with their known clean logits, reshuffled every pass."""

    def __init__(self, probe: Probe, stream: Iterator[Tensor], images: int, seed: int) -> None:
        self._stream, self._seed = stream, seed
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._order: list[int] = []
        self._times = 0
        while images > 0:
            batch = self._next()
            images -= max(probe.over_processes(len(batch)), 1)
            self._kept.append((batch, probe.clean_logits(batch)))

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """A batch, and its clean logits, or None if they have to be computed."""
        if not self._kept:
            return self._next(), None
        if not self._order:
            generator = generator_of(self._seed, _ORDER, self._times)
            self._order = torch.randperm(len(self._kept), generator=generator).tolist()
            self._times += 1
        return self._kept[self._order.pop()]

    def _next(self) -> Tensor:
        for batch in self._stream:
            return batch
        raise ValueError("the batches ran out; repeat the data, or lower pool_images")
