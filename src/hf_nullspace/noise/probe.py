"""A model that is asked for its logits with and without a noise, by all processes together; it is not changed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.influence import noise_influence


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
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # FSDP2
        self.held_out = self.chunks(held_out)
        with torch.no_grad():
            self.clean = [self.logits(self.prepare(chunk)) for chunk, _ in self.held_out]
        self.held_out_images = int(self.over_processes(sum(count for _, count in self.held_out), "sum"))

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

    def measure(self, batch: Tensor, noise: Tensor, *, squared: bool) -> tuple[float, float, Tensor]:
        """Influence, loss and its gradient (1, N, D), as means over the images of all processes.

        One message of N x D + 3 numbers per step: the gradient, the influence, the loss and the number of images.
        """
        sums = noise.new_zeros(noise.numel() + 3)
        for chunk, count in self.chunks([batch]):
            images = self.prepare(chunk)
            with torch.no_grad():
                clean = self.logits(images)
            noisy = self.logits(images, noise)
            distance = torch.linalg.vector_norm(noisy - clean, dim=-1)
            loss = (distance.square() if squared else distance).sum()
            (gradient,) = torch.autograd.grad(loss, [noise])
            influence = noise_influence(clean, noisy.detach()) * len(chunk)
            if count:
                sums += torch.cat([gradient.flatten(), influence[None], loss.detach()[None], sums.new_tensor([count])])
        sums = over_processes(sums)
        means = sums[:-1] / sums[-1]
        influence_mean, loss_mean = means[-2:].tolist()
        return influence_mean, loss_mean, means[:-2].reshape(noise.shape)

    @torch.no_grad()
    def held_out_influence(self, noise: Tensor) -> float:
        """Influence of ``noise`` on all held-out images of all processes."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for (chunk, count), clean in zip(self.held_out, self.clean, strict=True):
            total += noise_influence(clean, self.logits(self.prepare(chunk), noise)).double() * count
        return float(over_processes(total)) / self.held_out_images


def over_processes(tensor: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
    """``tensor`` summed, in place, over all processes of the default group, if there is one; or its largest values."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        torch.distributed.all_reduce(tensor, operations[operation])
    return tensor


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
