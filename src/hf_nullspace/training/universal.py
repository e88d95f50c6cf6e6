"""Universal adversarial training: one noise for all images, ascended by the training itself, for the price of plain.

The backward pass of the noisy view gives the gradient of the loss at the noise, too: the weights go down theirs, the
noise goes up its own, and no pass is added (the simultaneous update of Shafahi et al. 2020). It mirrors nullspace
noise, which is one for all images as well, and is learned to move the output as little as it can.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_nullspace.core.processes import over_processes
from hf_nullspace.training.gradient_views import along, embedding_norms
from hf_nullspace.training.objectives import Batch, Objective, View


class Universal(Objective):
    """CE(z, y) + CE(z', y), z' with the noise v for all images.

    v is zero at the start. After each optimizer step it moves by ``step``, a share of the largest size that it may
    have, along the gradient of CE(z', y) over the whole batch: of all micro-batches, of all processes. It stays where
    it is if that is not finite (fp16 before its scale is found).
    """

    def __init__(self, step: float) -> None:
        self.step = step
        self._noise: list[Tensor] = []
        self._sizes: Tensor | None = None

    @abstractmethod
    def noisy(self, batch: Batch) -> View:
        """The batch with v, made with :meth:`noise`."""

    @abstractmethod
    def ascended(self, noise: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        """What becomes of ``noise``; ``size`` is the mean of all that :meth:`noise` was given since the last time."""

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images), "universal": self.noisy(batch)}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["clean"]) + batch.cross_entropy(logits["universal"])

    def noise(self, shapes: Sequence[torch.Size], sizes: Tensor) -> list[Tensor]:
        """v, tensors of these shapes that need a gradient; ``sizes`` (B,) of the images, in the dtype of v.

        Raises:
            ValueError: if v is a checkpoint's, and has other shapes.
        """
        self._noise = self._noise or [sizes.new_zeros(shape) for shape in shapes]
        if (given := [each.shape for each in self._noise]) != [*shapes]:
            found, expected = (", ".join(str(tuple(each)) for each in all_) for all_ in (given, shapes))
            raise ValueError(
                f"the checkpoint's universal noise has the shape {found}, expected {expected}: go on with the settings "
                "and the image size of its run, or start without resuming"
            )
        if not self._noise[0].requires_grad:
            self._noise = [each.to(sizes).requires_grad_() for each in self._noise]
        found_sizes = torch.stack([sizes.sum(), sizes.new_tensor(len(sizes))])
        self._sizes = found_sizes if self._sizes is None else self._sizes + found_sizes
        return self._noise

    def end_step(self) -> None:
        gradients = [each.grad for each in self._noise if each.grad is not None]
        if self._sizes is None or not gradients:
            return
        parts = [*gradients, self._sizes]
        summed = over_processes(torch.cat([each.flatten() for each in parts]))
        *gradients, (total, count) = summed.split([each.numel() for each in parts])
        noise = [each.detach() for each in self._noise]
        if summed.isfinite().all():
            pairs = zip(noise, gradients, strict=True)
            noise = [self.ascended(each, gradient.view_as(each), total / count) for each, gradient in pairs]
        self._noise, self._sizes = [each.requires_grad_() for each in noise], None

    def state(self) -> dict[str, Tensor]:
        return {f"universal.{index:02d}": each.detach().cpu() for index, each in enumerate(self._noise)}

    def begin(self, state: Mapping[str, Tensor] | None) -> None:
        self._noise, self._sizes = [], None
        if state is not None:
            self._noise = [state[name] for name in sorted(state) if name.startswith("universal.")]
            if not self._noise:
                raise ValueError("the checkpoint has no universal noise: it is of a run with another objective")


class UniversalEmbeddings(Universal):
    """v (1, N, D) on the patch embeddings, of an L2 norm of at most ``share`` of theirs: r = share E||u||.

    v <- P(v + step r g / ||g||), P the projection on the ball of radius r; ||u|| over all patches of an image, without
    each token's mean, E the mean over the images of the step.
    """

    needs_whole_model = True

    def __init__(self, share: float, step: float) -> None:
        super().__init__(step)
        self.share = share

    def noisy(self, batch: Batch) -> View:
        embeddings = batch.embeddings()
        (noise,) = self.noise([embeddings[:1].shape], embedding_norms(embeddings))
        return View(batch.images, noise)

    def ascended(self, noise: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        radius = self.share * size
        moved = noise + along(gradient, (self.step * radius).expand(1))
        return moved * (radius / torch.linalg.vector_norm(moved).clamp_min(torch.finfo(moved.dtype).tiny)).clamp_max(1)


def universal(args: Any) -> Objective:
    """``objective="universal"``, with the size of the run's settings."""
    return UniversalEmbeddings(args.universal_share, args.universal_step)
