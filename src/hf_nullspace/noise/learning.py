"""Learn a noise that a model cannot see: the inner loop of Algorithm 1, and the exploratory form (equation 6).

Read beside the paper: v starts as U(-A, A); every step draws a minibatch, compares the logits with and without v, stops
once the influence is below epsilon, else moves v down the gradient of E||z' - z||. On several processes each rank
brings its share of the minibatch; the influence and the gradient are summed over all of them, so that every rank holds
the same noise and stops at the same step.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_nullspace import __version__
from hf_nullspace.models.patch_embedding import EmbeddingShape, PatchEmbeddingNoise, embedding_shape
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise, provenance_of
from hf_nullspace.noise.endings import LEAST, warn
from hf_nullspace.noise.influence import centred_norm, scale_to_influence
from hf_nullspace.noise.probe import Probe, frozen


class NoiseNotLearnedError(RuntimeError):
    """The noise did not enter the epsilon region within T steps, and ``on_limit`` says that this is an error."""


@dataclass(frozen=True)
class NoiseSettings:
    """How a noise is learned. The defaults are the paper's, but for the weight decay and the stopping test."""

    epsilon: float | None = 0.03
    """Threshold on the influence, in (0, 2]; ``None`` takes all ``max_steps`` (the exploratory form)."""
    noise_limit: float = 3.0
    """A: the noise starts as U(-A, A)."""
    learning_rate: float = 0.1
    max_steps: int = 3000
    """T, which is also the horizon of the cosine schedule."""
    weight_decay: float = 0.0
    """AdamW's decay of the noise; the paper's default of 0.01 shrinks it."""
    loss: Literal["l2", "squared_l2"] = "l2"
    """Mean over images of ||z' - z||_2 (equation 10) or of its square (Algorithm 1, line 12)."""
    stop_on: Literal["held_out", "minibatch"] = "held_out"
    """Where the influence has to be below epsilon: on held-out images too, or on one minibatch (the paper)."""
    on_limit: Literal["use", "rescale", "error"] = "use"
    """After T steps outside the epsilon region: use the noise, scale it into the region, or raise."""
    norm_weight: float = 0.0
    """lambda of equation 6: the loss gets -lambda * log||v||."""
    norm: Literal["centred", "raw"] = "centred"
    """The norm in that term; the raw one grows for free along the LayerNorm direction."""

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

        require(self.epsilon is None or 0 < self.epsilon <= 2, "epsilon", "a number in (0, 2], or None")
        require(self.max_steps >= 1, "max_steps", "at least 1 noise step (T)")
        require(0 < self.noise_limit < math.inf, "noise_limit", "a positive start range (A)")
        require(0 < self.learning_rate < math.inf, "learning_rate", "a positive number")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "a number >= 0")
        require(self.loss in ("l2", "squared_l2"), "loss", "'l2' or 'squared_l2'")
        require(self.stop_on in ("held_out", "minibatch"), "stop_on", "'held_out' or 'minibatch'")
        require(self.on_limit in ("use", "rescale", "error"), "on_limit", "'use', 'rescale' or 'error'")
        require(0 <= self.norm_weight < math.inf, "norm_weight", "a number >= 0 (lambda)")
        require(self.norm in ("centred", "raw"), "norm", "'centred' or 'raw'")


@dataclass
class NoiseHistory:
    """What happened while a noise was learned; one entry per minibatch that was looked at."""

    influence: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    centred_norm: list[float] = field(default_factory=list)
    steps: int = 0
    """Gradient steps that were taken."""
    stopped: str = ""
    """Why it ended: one of :data:`hf_nullspace.noise.endings.ENDINGS`; of several noises one that warns."""
    held_out_influence: float | None = None
    seconds: float = 0.0

    def summary(self, noise: NullspaceNoise, points: int = 200) -> dict[str, Any]:
        """What is logged and kept of a round, ready for JSON: the result, and at most ``points`` of each curve."""
        stride = max(-(-len(self.influence) // points), 1)
        curves = ("influence", "loss", "norm", "centred_norm")
        return {
            "noise_steps": self.steps,
            "stopped": self.stopped,
            "influence": self.held_out_influence,
            "minibatch_influence": self.influence[-1] if self.influence else None,
            "norm": noise.norm,
            "centred_norm": noise.centred_norm,
            "seconds": self.seconds,
            "trace_stride": stride,
            "trace": {name: [float(f"{value:.6g}") for value in getattr(self, name)[::stride]] for name in curves},
        }


def start_noise(shape: EmbeddingShape, noise_limit: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """v ~ U(-A, A) of shape (1, N, D), the same for a seed on every device and rank (Algorithm 1, line 3)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(1, shape.patches, shape.features, generator=generator, dtype=torch.float32)
    return ((2 * uniform - 1) * noise_limit).to(dtype)


def learn_noise(
    model: nn.Module,
    batches: Iterable[Tensor],
    settings: NoiseSettings | None = None,
    *,
    seed: int,
    held_out: Sequence[Tensor] = (),
    start: Tensor | None = None,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
    provenance: NoiseProvenance | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[NullspaceNoise, NoiseHistory]:
    """Learn one noise v (1, N, D) on the patch embeddings of ``model`` (equations 10 and 11; 6 with ``norm_weight``).

    The model is put into eval mode and its parameters are frozen meanwhile; both are as before afterwards, also after
    an exception, and no parameter gets a gradient.

    Args:
        model: an image classifier; ``model(pixel_values=...)`` gives ``logits``. A DDP model is unwrapped.
        batches: minibatches ``pixel_values`` (b, C, H, W), at least ``max_steps`` of them; on several processes this
            rank's share of each. They are moved to the model's device.
        seed: of the start v ~ U(-A, A); a noise is determined by seed, batches and model.
        held_out: batches for the estimate of the influence (this rank's share), which the batches should not contain.
        start: a start (1, N, D) instead of the uniform one.
        hook: the persistent hook of a model that has one (the trainer's); else one is put on for the time.
        chunk_size: at most so many images go through the model at once; the result is the same up to rounding.
        provenance: where the model comes from, if the caller knows more than its config says.
        on_step: called with (steps done, influence on the minibatch), for a progress bar.

    Raises:
        FloatingPointError: if the loss or influence is NaN or infinite, naming the step and the tensor it comes from.
        NoiseNotLearnedError: if T steps do not reach epsilon and ``on_limit="error"``.
        ValueError: if the batches run out, or held-out images are needed and missing.
    """
    settings = settings or NoiseSettings()
    needs_held_out = settings.epsilon is not None and (settings.stop_on == "held_out" or settings.on_limit == "rescale")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    begin = time.perf_counter()
    stream = iter(batches)
    first = _next(stream, 0, settings)
    parameter = next(model.parameters())
    dtype = torch.promote_types(torch.float32, parameter.dtype)
    own_hook = hook is None
    hook = hook or PatchEmbeddingNoise(model)
    shape = embedding_shape(model, first, hook.module)
    noise = start_noise(shape, settings.noise_limit, seed) if start is None else start.detach().clone()
    noise = noise.to(device=parameter.device, dtype=dtype).requires_grad_()
    history = NoiseHistory()
    try:
        with frozen(model):
            probe = Probe(model, hook, held_out, chunk_size, spare=first[:1])
            if needs_held_out and not probe.held_out_images:
                raise ValueError(
                    f"stop_on={settings.stop_on!r} with on_limit={settings.on_limit!r} measures the influence on "
                    "held-out images: pass held_out=[pixel_values, ...], or stop_on='minibatch' and on_limit='use'"
                )
            _descend(probe, noise, first, stream, settings, history, on_step)
            _finish(probe, noise, settings, history)
    finally:
        if own_hook:
            hook.remove()
    history.seconds = time.perf_counter() - begin
    known = provenance or provenance_of(model)
    measured = history.influence[-1] if history.held_out_influence is None else history.held_out_influence
    warn(history.stopped, measured, settings.epsilon, history.steps, known.round)
    made = asdict(known) | {
        "seed": seed,
        "epsilon": settings.epsilon,
        "influence": history.held_out_influence,
        "influence_images": probe.held_out_images or None,
        "steps": history.steps,
        "stopped": history.stopped,
        "settings": asdict(settings),
        "library": f"hf_nullspace {__version__}",
    }
    return NullspaceNoise(noise.detach().cpu(), shape.grid, NoiseProvenance(**made)), history


def _descend(
    probe: Probe,
    noise: Tensor,
    first: Tensor,
    stream: Iterator[Tensor],
    settings: NoiseSettings,
    history: NoiseHistory,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """The loop over t in Algorithm 1, lines 4 to 14; changes ``noise`` in place."""
    optimizer = torch.optim.AdamW([noise], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.max_steps)
    batch = first
    while True:
        probe.step = history.steps
        (influence,), (loss,), gradient = probe.measure(batch, noise, squared=settings.loss == "squared_l2")
        _record(history, noise.detach(), influence, loss)
        if on_step is not None:
            on_step(history.steps, influence)
        if settings.epsilon is not None and influence < settings.epsilon:
            held_out = probe.held_out_influence(noise) if settings.stop_on == "held_out" else None
            if held_out is None or held_out < settings.epsilon:
                history.held_out_influence, history.stopped = held_out, "epsilon" if history.steps else "start"
                return
        if history.steps == settings.max_steps:
            history.stopped = "steps"
            return
        noise.grad = gradient
        if settings.norm_weight:
            size = centred_norm(noise) if settings.norm == "centred" else torch.linalg.vector_norm(noise)
            noise.grad += torch.autograd.grad(-settings.norm_weight * size.log(), [noise])[0]
        optimizer.step()
        schedule.step()
        history.steps += 1
        if history.steps < settings.max_steps or settings.epsilon is not None:
            batch = _next(stream, history.steps, settings)


def _finish(probe: Probe, noise: Tensor, settings: NoiseSettings, history: NoiseHistory) -> None:
    """Decide what becomes of a noise that T steps left outside the epsilon region; measure what is returned."""
    if history.stopped == "steps" and settings.epsilon is not None:
        if settings.on_limit == "error":
            held_out = f", {probe.held_out_influence(noise):.4g} on held-out images" if probe.held_out_images else ""
            raise NoiseNotLearnedError(
                f"{settings.max_steps} steps left the influence at {history.influence[-1]:.4g} on the last minibatch"
                f"{held_out}; epsilon is {settings.epsilon}: raise max_steps (T) or epsilon, lower noise_limit (A), "
                "or choose on_limit='use' or 'rescale'"
            )
        if settings.on_limit == "rescale":
            start = noise.detach().clone()
            factor = scale_to_influence(lambda factor: probe.held_out_influence(factor * start), settings.epsilon)
            with torch.no_grad():
                noise.mul_(factor)
            history.held_out_influence = probe.held_out_influence(noise)
            history.stopped = "rescaled"
            if factor < 1 and history.held_out_influence < LEAST * settings.epsilon:  # in few bits the influence jumps
                history.stopped = "unreachable"
    if history.held_out_influence is None and probe.held_out_images:
        history.held_out_influence = probe.held_out_influence(noise)


def _record(history: NoiseHistory, noise: Tensor, influence: float, loss: float) -> None:
    history.influence.append(influence)
    history.loss.append(loss)
    history.norm.append(float(torch.linalg.vector_norm(noise)))
    history.centred_norm.append(float(centred_norm(noise)))


def _next(stream: Iterator[Tensor], step: int, settings: NoiseSettings) -> Tensor:
    try:
        return next(stream)
    except StopIteration:
        raise ValueError(
            f"the batches ran out at noise step {step}; up to {settings.max_steps + 1} are needed: repeat the data"
        ) from None
