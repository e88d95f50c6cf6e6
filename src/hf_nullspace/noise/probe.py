"""Compute the logits of a frozen model with and without a noise, over all processes, in chunks that fit the memory.

:func:`probing` freezes the model, adds the hook, and undoes both. Everything about chunks, ranks and padding is
here, so that the learners read as the paper does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_nullspace.core.processes import over_processes, rank_and_world_size
from hf_nullspace.models.frozen import frozen
from hf_nullspace.models.patch_embedding import EmbeddingShape, PatchEmbeddingNoise, embedding_shape
from hf_nullspace.noise.influence import influences, noise_influence


@contextmanager
def probing(
    model: nn.Module,
    held_out: Sequence[Tensor],
    *,
    example: Tensor | None = None,
    hook: PatchEmbeddingNoise | None = None,
    chunk_size: int | None = None,
) -> Iterator["Probe"]:
    """A :class:`Probe` of ``model``, which is in eval mode and frozen inside, and restored afterwards.

    Args:
        model: an image classifier; ``model(pixel_values=...)`` gives ``logits``. A DDP model is unwrapped.
        held_out: batches ``pixel_values`` (b, C, H, W), this process's share; their clean logits are computed now.
        example: images (b, C, H, W) like those that will be asked about; needed without held-out images.
        hook: the persistent hook of a model that has one (the trainer's); else a temporary hook is added.
        chunk_size: at most so many images go through the model at once; results are the same up to rounding.

    Raises:
        FloatingPointError: on every process, if logits, an influence or a loss is NaN or infinite, here or later. It
            names the first tensor that is.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    own_hook = PatchEmbeddingNoise(model) if hook is None else None
    try:
        with frozen(model):
            yield Probe(model, own_hook or hook, held_out, held_out[0] if example is None else example, chunk_size)
    finally:
        if own_hook is not None:
            own_hook.remove()


class Probe:
    """Logits, influence and gradient of a frozen model; made by :func:`probing`."""

    def __init__(
        self,
        model: nn.Module,
        hook: PatchEmbeddingNoise | None,
        held_out: Sequence[Tensor],
        example: Tensor,
        chunk_size: int | None,
    ) -> None:
        assert hook is not None
        self.model, self.hook, self.chunk_size, self._example = model, hook, chunk_size, example
        self.step: int | None = None
        """Current noise step, for error messages."""
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.noise_dtype = torch.promote_types(torch.float32, self.dtype)
        self.sharded = is_sharded(model)
        self.held_out = self.chunks(held_out)
        with torch.no_grad():
            self.clean = [self.logits(self.prepare(chunk)) for chunk, _ in self.held_out]
        mine = float(sum(count for _, count in self.held_out)) if _finite(*self.clean) else math.nan
        total = float(over_processes(torch.tensor(mine, dtype=torch.float64, device=self.device)))  # NaN on every rank
        if math.isnan(total):
            raise self._not_finite("held-out", "logits without noise", [chunk for chunk, _ in self.held_out])
        self.held_out_images = int(total)
        """How many there are, over all processes."""
        self._counts: dict[int | None, int] = {None: self.held_out_images}

    @cached_property
    def shape(self) -> EmbeddingShape:
        """Shape of the patch embeddings."""
        return embedding_shape(self.model, self._example, self.hook.module)

    def measure(
        self, batch: Tensor, noises: Tensor, loss: Callable[[Tensor, Tensor], Tensor], clean: Tensor | None = None
    ) -> tuple[list[float], list[float], Tensor]:
        """Influence and loss of each of M ``noises`` (M, N, D), and the losses' gradient (M, N, D).

        They are means over the images of all processes. Every noise has its own images: noise m uses the images
        m, m + M, ... of the batch of all processes.

        Args:
            batch: ``pixel_values`` (b, C, H, W), this process's share.
            loss: (clean logits, noisy logits), each (b, K), -> (b,).
            clean: the clean logits of the batch, if they are known; else they are computed.
        """
        count, first = len(noises), 0
        rank, processes = rank_and_world_size()
        gradients = torch.zeros_like(noises)
        sums = noises.new_zeros(count, 3)  # influence, loss, images
        for chunk, counted in self.chunks([batch]):
            images = self.prepare(chunk)
            owner = (rank + processes * torch.arange(first, first + len(chunk), device=self.device)) % count
            with torch.no_grad():
                reference = self.logits(images) if clean is None else clean[first : first + len(chunk)].to(self.device)
            noisy = self.logits(images, noises if count == 1 else noises[owner])
            if not counted:
                reference = noisy.detach()  # clean has no logits of a padding chunk
            losses = loss(reference, noisy)
            (gradient,) = torch.autograd.grad(losses.sum(), [noises])
            first += len(chunk)
            if counted:
                shifts = influences(reference, noisy.detach())
                each = torch.stack([shifts, losses.detach().to(shifts.dtype), torch.ones_like(shifts)], dim=1)
                gradients += gradient
                sums.index_add_(0, owner, each.to(sums.dtype))
        totals = over_processes(torch.cat([gradients.detach().flatten(1), sums], dim=1))
        means = totals[:, :-1] / totals[:, -1:].clamp(min=1)
        influence, mean_loss = means[:, -2].tolist(), means[:, -1].tolist()
        if not all(map(math.isfinite, influence + mean_loss)):
            values = f"influence {_shown(influence)}, loss {_shown(mean_loss)}"
            raise self._not_finite("minibatch", values, [batch], noises)
        return influence, mean_loss, means[:, :-2].reshape(noises.shape)

    @torch.no_grad()
    def held_out_influence(self, noise: Tensor, first: int | None = None) -> float:
        """Influence of ``noise`` over the held-out images of all processes, or over each one's ``first`` chunks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for (chunk, count), clean in list(zip(self.held_out, self.clean, strict=True))[:first]:
            total += noise_influence(clean, self.logits(self.prepare(chunk), noise)).double() * count
        if first not in self._counts:
            self._counts[first] = self.over_processes(sum(count for _, count in self.held_out[:first]))
        influence = float(over_processes(total)) / self._counts[first]
        if not math.isfinite(influence):
            raise self._not_finite("held-out", f"influence {influence}", [chunk for chunk, _ in self.held_out], noise)
        return influence

    @torch.no_grad()
    def clean_logits(self, batch: Tensor) -> Tensor:
        """Logits (b, K) of this process's images without a noise."""
        return torch.cat([self.logits(self.prepare(chunk))[:count] for chunk, count in self.chunks([batch])])

    def logits(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (b, K) in at least float32."""
        with self.hook.adding(noise) if noise is not None else nullcontext():
            logits = self.model(pixel_values=pixel_values).logits
        return logits.to(torch.promote_types(torch.float32, logits.dtype))

    def prepare(self, pixel_values: Tensor) -> Tensor:
        """The images on the model's device and in its dtype."""
        return pixel_values.to(self.device, self.dtype, non_blocking=True)

    def chunks(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Chunks of at most ``chunk_size`` images, each with the number of them that is real (0 for padding).

        Every rank has to call a sharded model equally often, or they deadlock: a rank with fewer chunks gets padding.
        """
        split = [piece for batch in batches for piece in batch.split(self.chunk_size or max(len(batch), 1))]
        chunks = [(piece, len(piece)) for piece in split]
        if self.sharded:
            max_chunks = int(over_processes(torch.tensor(len(chunks), device=self.device), "max"))
            chunks += [(self._example[:1], 0)] * (max_chunks - len(chunks))
        return chunks

    def over_processes(self, number: int) -> int:
        """The sum of a number that every process has."""
        return int(over_processes(torch.tensor(number, device=self.device)))

    @torch.no_grad()
    def _not_finite(self, which: str, what: str, images: Sequence[Tensor], noise: Tensor | None = None) -> Exception:
        """The error for numbers that are not finite; looks at this process's tensors in their order."""
        weight = not_finite_weight(self.model)
        images = [piece for each in images for piece in each.split(self.chunk_size or len(each))]
        if noise is not None and not _finite(noise):
            cause = "the noise is: lower its learning rate or noise_limit (A)"
        elif not _finite(*images):
            cause = "the images (pixel_values) are: check the preprocessing"
        elif weight is not None:
            cause = f"the weight {weight} is: the model has diverged, or its file is damaged"
        elif not self.sharded and not _finite(*(self._embeddings(chunk) for chunk in images)):
            cause = "the patch embeddings are: compute in a wider precision"
        elif not self.sharded and not _finite(*(self.logits(self.prepare(chunk)) for chunk in images)):
            cause = "the clean logits are: compute in a wider precision, or check the model"
        elif noise is None:
            cause = "those of another process are, or the logits of a sharded model"
        else:
            elsewhere = " (or a tensor of another process)" if rank_and_world_size()[1] > 1 else ""
            cause = f"the logits with the noise are{elsewhere}: compute in a wider precision, or lower noise_limit (A)"
        at = "" if self.step is None else f"noise step {self.step}: "
        return FloatingPointError(f"{at}{what} on {which} images, NaN or infinite: {cause}")

    def _embeddings(self, pixel_values: Tensor) -> Tensor:
        output = self.hook.module(self.prepare(pixel_values))
        return output[0] if isinstance(output, tuple) else output


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are spread over processes (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def not_finite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter of ``model`` (of this process's part) that has NaN or infinity, if there is one."""
    named = [(name, each.to_local() if isinstance(each, DTensor) else each) for name, each in model.named_parameters()]
    if _finite(*(each for _, each in named)):
        return None
    name = next(name for name, each in named if not _finite(each))
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _finite(*tensors: Tensor) -> bool:
    return not tensors or bool(torch.stack([each.isfinite().all().to(tensors[0].device) for each in tensors]).all())


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
