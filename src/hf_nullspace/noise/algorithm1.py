"""Algorithm 1, lines 3 to 14: learn a noise v that hardly changes the model's output (equations 6, 7, 10 and 11).

Comments name the lines of Algorithm 1. On several processes each has a part of the minibatch:
:mod:`hf_nullspace.noise.probe` adds up influence and gradient, so that all hold the same v and stop at the same step.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from hf_nullspace.core.settings import check_choices, check_numbers
from hf_nullspace.models.patch_embedding import EmbeddingShape, PatchEmbeddingNoise
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise, provenance_of
from hf_nullspace.noise.calibration import scale_into
from hf_nullspace.noise.history import LEAST, NoiseHistory, warn
from hf_nullspace.noise.influence import centred_norm
from hf_nullspace.noise.probe import Probe, probing
from hf_nullspace.noise.provenance import completed


class NoiseNotLearnedError(RuntimeError):
    """The noise did not enter the epsilon region within T steps, and ``on_limit`` says that this is an error."""


@dataclass(frozen=True)
class NoiseSettings:
    """How a noise is learned. The defaults are the paper's, except for the weight decay and the stopping test."""

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
    """The norm in that term; the raw one can grow along the LayerNorm direction without changing the output."""

    def __post_init__(self) -> None:
        positive, not_negative = "(0, inf)", "[0, inf)"
        check_numbers(self, {"epsilon": "(0, 2]", "max_steps": "int [1, inf)", "noise_limit": positive})
        check_numbers(self, {"learning_rate": positive, "weight_decay": not_negative, "norm_weight": not_negative})
        check_choices(self, {"loss": tuple(LOSSES), "stop_on": ("held_out", "minibatch")})
        check_choices(self, {"on_limit": ("use", "rescale", "error"), "norm": ("centred", "raw")})

    @property
    def needs_held_out(self) -> bool:
        """Whether held-out images are needed."""
        return self.epsilon is not None and (self.stop_on == "held_out" or self.on_limit == "rescale")


def l2(clean_logits: Tensor, noisy_logits: Tensor) -> Tensor:
    """||z' - z||_2 of each image (b,), from logits (b, K): equation 10."""
    return torch.linalg.vector_norm(noisy_logits - clean_logits, dim=-1)


def squared_l2(clean_logits: Tensor, noisy_logits: Tensor) -> Tensor:
    """||z' - z||_2^2 of each image (b,): Algorithm 1, line 12."""
    return l2(clean_logits, noisy_logits).square()


LOSSES = {"l2": l2, "squared_l2": squared_l2}


def start_noise(shape: EmbeddingShape, noise_limit: float, seed: int) -> Tensor:
    """v ~ U(-A, A) of shape (1, N, D), float32, the same for a seed on every device and rank (line 3)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(1, shape.patches, shape.features, generator=generator, dtype=torch.float32)
    return (2 * uniform - 1) * noise_limit


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
    """Learn one noise v (1, N, D) on the patch embeddings of ``model``.

    The model, ``held_out``, ``hook`` and ``chunk_size`` are those of :func:`hf_nullspace.noise.probe.probing`.

    Args:
        batches: minibatches ``pixel_values`` (b, C, H, W), up to ``max_steps`` + 1 of them; on several processes this
            rank's share of each. They are moved to the model's device.
        seed: seed of the start v ~ U(-A, A); a noise is determined by seed, batches and model.
        held_out: batches for the estimate of the influence (this rank's share), which the batches should not contain.
        start: a start (1, N, D) instead of the uniform one.
        provenance: where the model comes from, if the caller knows more than its config says.
        on_step: called with (steps done, influence on the minibatch), for a progress bar.

    Raises:
        FloatingPointError: if the loss or influence is NaN or infinite, naming the step and the tensor it comes from.
        NoiseNotLearnedError: if T steps do not reach epsilon and ``on_limit="error"``.
        ValueError: if the batches run out, or held-out images are needed but not given.
    """
    settings = settings or NoiseSettings()
    begin, stream, history = time.perf_counter(), iter(batches), NoiseHistory()
    first = _next(stream, 0, settings)
    with probing(model, held_out, example=first, hook=hook, chunk_size=chunk_size) as probe:
        if settings.needs_held_out and not probe.held_out_images:
            raise ValueError(
                f"stop_on={settings.stop_on!r} with on_limit={settings.on_limit!r} measures the influence on held-out "
                "images: pass held_out=[pixel_values, ...], or stop_on='minibatch' and on_limit='use'"
            )
        v = start_noise(probe.shape, settings.noise_limit, seed) if start is None else start.detach().clone()
        v = v.to(device=probe.device, dtype=probe.noise_dtype).requires_grad_()
        descend(probe, v, chain([first], stream), settings, history, on_step)
        if history.stopped == "steps" and settings.epsilon is not None:
            handle_epsilon_not_reached(probe, v, settings, history)
        if history.held_out_influence is None and probe.held_out_images:
            history.held_out_influence = probe.held_out_influence(v)
        grid, images = probe.shape.grid, probe.held_out_images or None
    history.seconds = time.perf_counter() - begin
    known = provenance or provenance_of(probe.model)
    measured = history.influence[-1] if history.held_out_influence is None else history.held_out_influence
    warn(history.stopped, measured, settings.epsilon, history.steps, known.round)
    provenance = completed(
        known,
        seed=seed,
        epsilon=settings.epsilon,
        influence=history.held_out_influence,
        influence_images=images,
        steps=history.steps,
        stopped=history.stopped,
        settings=asdict(settings),
    )
    return NullspaceNoise(v.detach().cpu(), grid, provenance), history


def descend(
    probe: Probe,
    v: Tensor,
    minibatches: Iterator[Tensor],
    settings: NoiseSettings,
    history: NoiseHistory,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Lines 4 to 14: changes v (1, N, D) in place, until its influence is below epsilon or T steps are taken.

    With T steps and no epsilon the last pass measures on the last minibatch again. ``history.loss`` is without the term
    of equation 6.
    """
    epsilon, limit, loss = settings.epsilon, settings.max_steps, LOSSES[settings.loss]
    optimizer = torch.optim.AdamW([v], lr=settings.learning_rate, weight_decay=settings.weight_decay)  # A.3
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=limit)
    for t in range(limit + 1):  # line 4; the last pass only measures
        if t < limit or epsilon is not None:
            x = _next(minibatches, t, settings)  # line 5
        probe.step = t
        sigma, mean_loss, gradient = probe.measure(x, v, loss)  # lines 6 to 8, and 12
        history.record(v.detach(), sigma, mean_loss)
        if on_step is not None:
            on_step(t, sigma[0])
        if epsilon is not None and sigma[0] < epsilon:  # lines 9 to 11
            held_out = probe.held_out_influence(v) if settings.stop_on == "held_out" else None
            if held_out is None or held_out < epsilon:
                history.held_out_influence, history.stopped = held_out, "epsilon" if t else "start"
                return
        if t < limit:
            v.grad = gradient
            if settings.norm_weight:  # equation 6
                norm = centred_norm(v) if settings.norm == "centred" else torch.linalg.vector_norm(v)
                v.grad += torch.autograd.grad(-settings.norm_weight * norm.log(), v)[0]
            optimizer.step()  # line 13
            schedule.step()
            history.steps += 1
    history.stopped = "steps"


def handle_epsilon_not_reached(probe: Probe, v: Tensor, settings: NoiseSettings, history: NoiseHistory) -> None:
    """Use, rescale or reject v after T steps outside of epsilon, by ``on_limit``; the paper says nothing."""
    epsilon = settings.epsilon
    assert epsilon is not None
    if settings.on_limit == "error":
        held_out = f", {probe.held_out_influence(v):.4g} on held-out images" if probe.held_out_images else ""
        raise NoiseNotLearnedError(
            f"{settings.max_steps} steps left the influence at {history.influence[-1]:.4g} on the last minibatch"
            f"{held_out}; epsilon is {epsilon}: raise max_steps (T) or epsilon, lower noise_limit (A), "
            "or choose on_limit='use' or 'rescale'"
        )
    if settings.on_limit == "rescale":
        v_before = v.detach().clone()

        def influence_at(factor: float) -> float:
            return probe.held_out_influence(factor * v_before)

        scaled = scale_into(influence_at, epsilon, largest=1.0, tolerance=1e-3)
        with torch.no_grad():
            v.mul_(scaled.factor)
        history.held_out_influence = scaled.influence
        far_below = scaled.factor < 1 and scaled.influence < LEAST * epsilon  # in low precision the influence jumps
        history.stopped = "unreachable" if far_below else "rescaled"


def _next(minibatches: Iterator[Tensor], step: int, settings: NoiseSettings) -> Tensor:
    for batch in minibatches:
        return batch
    raise ValueError(
        f"the batches ran out at noise step {step}; up to {settings.max_steps + 1} are needed: repeat the data"
    )
