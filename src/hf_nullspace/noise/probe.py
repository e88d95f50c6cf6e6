"""A model that is asked for its logits with and without a noise, by all processes together; it is not changed.

What comes out NaN or infinite ends with a FloatingPointError on every process, which names the first tensor that is.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from hf_nullspace.core.processes import over_processes, rank_and_world_size
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.influence import influences, noise_influence


class Probe:
    """A frozen model, asked for logits with and without a noise; clean logits of held-out images are kept."""

    def __init__(
        self,
        model: nn.Module,
        hook: PatchEmbeddingNoise,
        held_out: Sequence[Tensor],
        chunk_size: int | None,
        spare: Tensor,
    ) -> None:
        self.model, self.hook, self.chunk_size, self.spare = model, hook, chunk_size, spare
        self.step: int | None = None
        """The noise step that is taken, for errors."""
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # FSDP2
        self.held_out = self.chunks(held_out)
        with torch.no_grad():
            self.clean = [self.logits(self.prepare(chunk)) for chunk, _ in self.held_out]
        mine = float(sum(count for _, count in self.held_out)) if _finite(*self.clean) else math.nan
        total = float(over_processes(torch.tensor(mine, dtype=torch.float64, device=self.device)))  # NaN on every rank
        if math.isnan(total):
            raise self._not_finite("held-out", "logits without noise", [chunk for chunk, _ in self.held_out])
        self.held_out_images = int(total)
        self._counts: dict[int | None, int] = {None: self.held_out_images}

    def chunks(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Pieces of at most ``chunk_size`` images, each with the number of images that it counts for.

        Every rank has to call a sharded model equally often, or they wait for each other for ever: those with fewer
        pieces get some that count for nothing.
        """
        split = [piece for batch in batches for piece in (batch.split(self.chunk_size) if self.chunk_size else [batch])]
        chunks = [(piece, len(piece)) for piece in split]
        if self.sharded:
            chunks += [(self.spare, 0)] * (self.over_processes(len(chunks), "max") - len(chunks))
        return chunks

    def over_processes(self, number: int, operation: Literal["sum", "max"]) -> int:
        """The sum or the largest of a number that every rank has."""
        return int(over_processes(torch.tensor(number, device=self.device), operation))

    def prepare(self, pixel_values: Tensor) -> Tensor:
        """The images where, and as, the model wants them."""
        return pixel_values.to(self.device, self.dtype, non_blocking=True)

    def logits(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (b, K) in at least float32."""
        with self.hook.adding(noise) if noise is not None else nullcontext():
            logits = self.model(pixel_values=pixel_values).logits
        return logits.to(torch.promote_types(torch.float32, logits.dtype))

    def measure(
        self, batch: Tensor, noises: Tensor, *, squared: bool, clean: Tensor | None = None
    ) -> tuple[list[float], list[float], Tensor]:
        """Influence and loss of each of M ``noises`` (M, N, D), and the losses' gradient (M, N, D), over all processes.

        Every noise has its own images: those whose place in the batch of all processes is m modulo M. The numbers are
        means over them. ``clean``: the batch's clean logits (b, K), if they are known; else they are computed.

        One message of M x (N x D + 3) numbers per step: gradient, influence, loss and number of images of each.
        """
        count, first = len(noises), 0
        rank, processes = rank_and_world_size()
        sums = noises.new_zeros(count, noises[0].numel() + 3)
        for chunk, counted in self.chunks([batch]):
            images = self.prepare(chunk)
            of = (rank + processes * torch.arange(first, first + len(chunk), device=self.device)) % count
            reference = None
            if clean is None:
                with torch.no_grad():
                    reference = self.logits(images)
            noisy = self.logits(images, noises if count == 1 else noises[of])
            if reference is None and clean is not None:
                reference = clean[first : first + len(chunk)].to(self.device) if counted else noisy.detach()
            assert reference is not None
            distance = torch.linalg.vector_norm(noisy - reference, dim=-1)
            losses = distance.square() if squared else distance
            (gradient,) = torch.autograd.grad(losses.sum(), [noises])
            first += len(chunk)
            if counted:
                shifts = influences(reference, noisy.detach())
                each = torch.stack([shifts, losses.detach().to(shifts.dtype), torch.ones_like(shifts)], dim=1)
                sums[:, :-3] += gradient.reshape(count, -1)
                sums[:, -3:].index_add_(0, of, each.to(sums.dtype))
        sums = over_processes(sums)
        means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        influence, loss = means[:, -2].tolist(), means[:, -1].tolist()
        if not all(map(math.isfinite, influence + loss)):
            raise self._not_finite("minibatch", f"influence {_shown(influence)}, loss {_shown(loss)}", [batch], noises)
        return influence, loss, means[:, :-2].reshape(noises.shape)

    @torch.no_grad()
    def clean_logits(self, batch: Tensor) -> Tensor:
        """Logits (b, K) of this process's images without a noise."""
        chunks = self.chunks([batch])
        return torch.cat([self.logits(self.prepare(chunk))[:count] for chunk, count in chunks])

    @torch.no_grad()
    def held_out_influence(self, noise: Tensor, first: int | None = None) -> float:
        """Influence of ``noise`` over the held-out images of all processes, or over each one's ``first`` batches."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for (chunk, count), clean in list(zip(self.held_out, self.clean, strict=True))[:first]:
            total += noise_influence(clean, self.logits(self.prepare(chunk), noise)).double() * count
        influence = float(over_processes(total)) / self._images_in(first)
        if not math.isfinite(influence):
            raise self._not_finite("held-out", f"influence {influence}", [chunk for chunk, _ in self.held_out], noise)
        return influence

    @torch.no_grad()
    def _not_finite(self, which: str, what: str, images: Sequence[Tensor], noise: Tensor | None = None) -> Exception:
        """The error for numbers that are not finite; asks this process's tensors in the order in which they arise."""
        weight = not_finite_weight(self.model)
        images = [piece for each in images for piece in each.split(self.chunk_size or len(each))]
        if noise is not None and not _finite(noise):
            culprit = "the noise is: lower its learning rate or noise_limit (A)"
        elif not _finite(*images):
            culprit = "the images (pixel_values) are: check the preprocessing"
        elif weight is not None:
            culprit = f"the weight {weight} is: the model has diverged, or its file is damaged"
        elif not self.sharded and not _finite(*(self._embeddings(chunk) for chunk in images)):
            culprit = "the patch embeddings are: compute in a wider precision"
        elif not self.sharded and not _finite(*(self.logits(self.prepare(chunk)) for chunk in images)):
            culprit = "the clean logits are: compute in a wider precision, or check the model"
        elif noise is None:
            culprit = "those of another process are, or the logits of a sharded model"
        else:
            elsewhere = " (or a tensor of another process)" if rank_and_world_size()[1] > 1 else ""
            culprit = (
                f"the logits with the noise are{elsewhere}: compute in a wider precision, or lower noise_limit (A)"
            )
        at = "" if self.step is None else f"noise step {self.step}: "
        return FloatingPointError(f"{at}{what} on {which} images, NaN or infinite: {culprit}")

    def _embeddings(self, pixel_values: Tensor) -> Tensor:
        output = self.hook.module(self.prepare(pixel_values))
        return output[0] if isinstance(output, tuple) else output

    def _images_in(self, first: int | None) -> int:
        if first not in self._counts:
            self._counts[first] = self.over_processes(sum(count for _, count in self.held_out[:first]), "sum")
        return self._counts[first]


def not_finite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter of ``model`` (of this process's part) that has NaN or infinity, if there is one."""
    named = [(name, getattr(each, "to_local", lambda each=each: each)()) for name, each in model.named_parameters()]
    if _finite(*(each for _, each in named)):
        return None
    name = next(name for name, each in named if not _finite(each))
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _finite(*tensors: Tensor) -> bool:
    return not tensors or bool(torch.stack([each.isfinite().all().to(tensors[0].device) for each in tensors]).all())


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for parameters inside; every module and parameter as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
