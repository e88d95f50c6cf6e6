"""Learn noises by following the boundary of the epsilon region: fewer and cheaper steps than Algorithm 1.

Algorithm 1 starts far outside of the region, where the model's output is destroyed, and descends until it is inside.
Here a noise is a direction and a radius: it starts as a random direction (or an earlier noise) scaled to the influence
epsilon, the direction descends, and the radius follows, so that the influence stays at epsilon while the norm grows.
The images are a fixed pool whose clean logits are computed once (the model is frozen), so a step is one forward and one
backward pass to the noise: 2 forward-equivalents, where the authors' step takes 4 and Algorithm 1's here 3.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from hf_nullspace import __version__
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise, embedding_shape
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise, provenance_of
from hf_nullspace.noise.calibration import NoiseNotCalibratedError, find_factor
from hf_nullspace.noise.endings import scaled_ending, warn, worst
from hf_nullspace.noise.influence import centre, centred_norm
from hf_nullspace.noise.learning import NoiseHistory
from hf_nullspace.noise.probe import Probe, frozen

_EXPONENT, _SLOWEST, _FASTEST = 0.25, 0.7, 1.3
"""The radius is multiplied by (epsilon / influence)^0.25 after a step, within [0.7, 1.3]."""
_ORDER = 2  # keeps the order of the pool apart from other numbers of the same seed


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
    """Images, over all processes, whose clean logits are kept; 0 asks for the clean logits of fresh ones every step."""
    count: int = 1
    """Noises that are learned at once; each has its share of every batch."""
    loss: Literal["l2", "squared_l2"] = "l2"
    """Mean over images of ||z' - z||_2 (equation 10), or of its square."""
    tolerance: float = 0.04
    """The influence on held-out images ends in [(1 - tolerance) * epsilon, epsilon]."""

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

        require(0 < self.epsilon <= 2, "epsilon", "a number in (0, 2]")
        require(self.steps >= 1, "steps", "at least 1 noise step (T)")
        require(0 < self.learning_rate < math.inf, "learning_rate", "a positive number")
        require(0 < self.noise_limit < math.inf, "noise_limit", "a positive number (A)")
        require(self.pool_images >= 0, "pool_images", "a number >= 0")
        require(self.count >= 1, "count", "at least 1 noise")
        require(self.loss in ("l2", "squared_l2"), "loss", "'l2' or 'squared_l2'")
        require(0 < self.tolerance < 1, "tolerance", "a share in (0, 1)")


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

    The model is in eval mode and frozen meanwhile, as before afterwards, and no parameter gets a gradient.

    Args:
        model: an image classifier; ``model(pixel_values=...)`` gives ``logits``. A DDP model is unwrapped.
        batches: minibatches ``pixel_values`` (b, C, H, W); on several processes this rank's share of each. The pool is
            filled from the first of them; without a pool every step takes one.
        seed: of the start and of the order of the pool; noises are determined by seed, batches and model.
        held_out: batches on which the noises are scaled to epsilon at the end (this rank's share).
        start: directions (m, N, D) to start from, such as earlier noises; only the first ``count`` are used, and
            missing ones are random.
        hook: the persistent hook of a model that has one; else one is put on for the time.
        chunk_size: at most so many images go through the model at once.
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
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    begin = time.perf_counter()
    parameter = next(model.parameters())
    own_hook = hook is None
    hook = hook or PatchEmbeddingNoise(model)
    shape = embedding_shape(model, held_out[0], hook.module)
    history = NoiseHistory()
    try:
        with frozen(model):
            probe = Probe(model, hook, held_out, chunk_size, spare=held_out[0][:1])
            pool = _Pool(probe, iter(batches), settings, seed)
            noises = _Noises(
                _directions(start, settings.count, shape.patches, shape.features, seed).to(
                    parameter.device, torch.promote_types(torch.float32, parameter.dtype)
                ),
                settings,
            )
            noises.reach_epsilon(probe)
            _follow(probe, pool, noises, settings, history, on_step)
            influence, endings = noises.scale(probe)
    finally:
        if own_hook:
            hook.remove()
    history.stopped, history.held_out_influence = worst(endings), influence[0]
    history.seconds = time.perf_counter() - begin
    known = provenance or provenance_of(model)
    warn(history.stopped, min(influence), settings.epsilon, history.steps, known.round)
    made = asdict(known) | {
        "seed": seed,
        "epsilon": settings.epsilon,
        "influence_images": probe.held_out_images,
        "steps": history.steps,
        "settings": {"learner": "boundary", **asdict(settings)},
        "library": f"hf_nullspace {__version__}",
    }
    found = [
        NullspaceNoise(
            tensor[None].cpu(), shape.grid, NoiseProvenance(**(made | {"influence": reached, "stopped": ending}))
        )
        for tensor, reached, ending in zip(noises.tensor().detach(), influence, endings, strict=True)
    ]
    return found, history


def _directions(start: Tensor | None, count: int, patches: int, features: int, seed: int) -> Tensor:
    """(count, N, D): the given ones, and random ones for those that are missing; the same on every device and rank."""
    random = torch.randn(count, patches, features, generator=torch.Generator().manual_seed(seed))
    if start is None:
        return random
    if start.shape[1:] != random.shape[1:]:
        raise ValueError(f"start of shape {tuple(start.shape)}: expected (m, {patches}, {features})")
    start = start[:count].detach().cpu()
    return torch.cat([start, random[len(start) :].to(start.dtype)])


class _Noises:
    """M noises as unit directions (M, N, D) without the tokens' means, and radii; long tokens are cut."""

    def __init__(self, directions: Tensor, settings: BoundarySettings) -> None:
        self.directions = self._units(directions).requires_grad_()
        self.radii = [1.0] * len(directions)
        self.settings = settings
        self.longest = settings.noise_limit * math.sqrt(directions.shape[-1] / 3)
        self.all_cut = 10 * self.longest * math.sqrt(directions.shape[1])
        """A radius at which nearly every token is as long as it may be."""

    @staticmethod
    def _units(directions: Tensor) -> Tensor:
        directions = centre(directions.detach())
        return directions / torch.linalg.vector_norm(directions, dim=(1, 2), keepdim=True)

    def _cut(self, noises: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(noises, dim=-1, keepdim=True)
        return noises * (self.longest / lengths.clamp(min=1e-12)).clamp(max=1)

    def tensor(self) -> Tensor:
        """(M, N, D), differentiable in the directions."""
        units = self.directions / torch.linalg.vector_norm(self.directions, dim=(1, 2), keepdim=True)
        return self._cut(units * units.new_tensor(self.radii)[:, None, None])

    def moved(self, influence: Sequence[float]) -> None:
        """After a step of the directions: unit vectors again, and radii after the influence from before the step."""
        with torch.no_grad():
            self.directions.copy_(self._units(self.directions))
        for index, found in enumerate(influence):
            change = (self.settings.epsilon / max(found, 1e-8)) ** _EXPONENT
            self.radii[index] = min(self.radii[index] * min(max(change, _SLOWEST), _FASTEST), self.all_cut)

    @torch.no_grad()
    def _ask(self, probe: Probe, index: int, batches: int | None, radius: float) -> float:
        noise = self._cut(self.directions[index : index + 1] * radius)
        return probe.held_out_influence(noise, batches)

    def reach_epsilon(self, probe: Probe) -> None:
        """Radii at which the noises have roughly the influence epsilon, on the first held-out batch."""
        start = self.longest * math.sqrt(self.directions.shape[1]) / 8
        for index in range(len(self.radii)):
            self.radii[index] = self._reach(probe, index, 1, self.settings.epsilon, start, 0.25)[0]

    def scale(self, probe: Probe) -> tuple[list[float], list[str]]:
        """Radii at which the influence on the held-out images is in [(1 - tolerance) * epsilon, epsilon].

        A noise whose tokens are all as long as they may be, and still inside, stays as it is. Gives the influence of
        every noise, and how it ended.
        """
        half = self.settings.tolerance / 2
        aim, near = self.settings.epsilon * (1 - half), half / (1 - half) * 0.999
        found = [self._reach(probe, index, None, aim, radius, near) for index, radius in enumerate(self.radii)]
        self.radii = [radius for radius, _ in found]
        epsilon, least = self.settings.epsilon, 1 - self.settings.tolerance
        endings = [
            scaled_ending(influence, epsilon, at_bound=radius >= self.all_cut, least=least)
            for radius, influence in found
        ]
        return [influence for _, influence in found], endings

    def _reach(
        self, probe: Probe, index: int, batches: int | None, aim: float, start: float, tolerance: float
    ) -> tuple[float, float]:
        """A radius of noise ``index`` with the influence ``aim``, and that; else the largest radius inside of it."""
        asking = partial(self._ask, probe, index, batches)
        try:
            return find_factor(asking, aim, start=start, tolerance=tolerance, largest=self.all_cut)[:2]
        except NoiseNotCalibratedError as error:  # all lengths are inside, or in few bits the influence jumps
            if error.inside[0] == 0:
                raise
            return error.inside


def _follow(
    probe: Probe,
    pool: "_Pool",
    noises: _Noises,
    settings: BoundarySettings,
    history: NoiseHistory,
    on_step: Callable[[int, float], None] | None,
) -> None:
    count, patches, features = noises.directions.shape
    rate = settings.learning_rate / math.sqrt(patches * features)  # a unit vector's elements are that large
    optimizer = torch.optim.Adam([noises.directions], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps)
    for step in range(settings.steps):
        batch, clean = pool.draw()
        noise = noises.tensor()
        leaf = noise.detach().requires_grad_()
        probe.step = step
        influence, loss, gradient = probe.measure(batch, leaf, squared=settings.loss == "squared_l2", clean=clean)
        history.influence.append(sum(influence) / count)
        history.loss.append(sum(loss) / count)
        history.norm.append(float(torch.linalg.vector_norm(leaf.detach()[0])))
        history.centred_norm.append(float(centred_norm(leaf.detach()[:1])))
        (noises.directions.grad,) = torch.autograd.grad(noise, [noises.directions], gradient)
        optimizer.step()
        schedule.step()
        noises.moved(influence)
        history.steps += 1
        if on_step is not None:
            on_step(history.steps, history.influence[-1])


class _Pool:
    """A fixed number of batches whose clean logits are known, in an order that is drawn anew each time through."""

    def __init__(self, probe: Probe, stream: Iterator[Tensor], settings: BoundarySettings, seed: int) -> None:
        self._probe, self._stream, self._seed = probe, stream, seed
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._order: list[int] = []
        self._times = 0
        images = 0
        while images < settings.pool_images:
            batch = self._next()
            images += max(probe.over_processes(len(batch), "sum"), 1)
            self._kept.append((batch, probe.clean_logits(batch)))

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """A batch, and its clean logits, or None if they have to be computed."""
        if not self._kept:
            return self._next(), None
        if not self._order:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, _ORDER, self._times))
            self._order = torch.randperm(len(self._kept), generator=generator).tolist()
            self._times += 1
        return self._kept[self._order.pop()]

    def _next(self) -> Tensor:
        found = list(islice(self._stream, 1))
        if not found:
            raise ValueError("the batches ran out; repeat the data, or lower pool_images")
        return found[0]
