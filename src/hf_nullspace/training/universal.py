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
from hf_nullspace.training.adversarial import attack_settings, pixels_of, pyramid_settings
from hf_nullspace.training.gradient_views import along, embedding_norms
from hf_nullspace.training.objectives import Batch, BesideClean, Objective, View, consistency_of, register_objective
from hf_nullspace.training.pyramid import PyramidPGD, cells

PLACES = ("embeddings", "pixels")
"""Where the noise may be."""


class Universal(BesideClean):
    """CE(z, y) + CE(z', y), z' with the noise v for all images, which has a radius r.

    v is zero at the start. After each optimizer step it moves by ``step`` r along the gradient of that view's loss over
    the whole batch: of all micro-batches, of all processes. It stays where it is if that is not finite (fp16 before its
    scale is found). ``consistency`` are the settings of :class:`BesideClean`.
    """

    def __init__(self, step: float, **consistency: Any) -> None:
        super().__init__("universal", **consistency)
        self.step = step
        self._noise: list[Tensor] = []
        self._radii: Tensor | None = None

    @abstractmethod
    def ascended(self, noise: Tensor, gradient: Tensor, radius: Tensor) -> Tensor:
        """What becomes of a tensor of v, within ``radius``: the mean of all that :meth:`noise` was given in a step."""

    def noise(self, shapes: Sequence[torch.Size], radii: Tensor) -> list[Tensor]:
        """v, tensors of these shapes that need a gradient; ``radii`` (B,) is what each image asks for, in v's dtype.

        Raises:
            ValueError: if v is a checkpoint's, and has other shapes.
        """
        self._noise = self._noise or [radii.new_zeros(shape) for shape in shapes]
        if (given := [each.shape for each in self._noise]) != [*shapes]:
            found, expected = (", ".join(str(tuple(each)) for each in those) for those in (given, shapes))
            raise ValueError(
                f"the checkpoint's universal noise has the shape {found}, expected {expected}: go on with the settings "
                "and the image size of its run, or start without resuming"
            )
        if not self._noise[0].requires_grad:
            self._noise = [each.to(radii).requires_grad_() for each in self._noise]
        total_and_count = torch.stack([radii.sum(), radii.new_tensor(len(radii))])
        self._radii = total_and_count if self._radii is None else self._radii + total_and_count
        return self._noise

    def end_step(self) -> None:
        gradients = [each.grad for each in self._noise if each.grad is not None]
        if self._radii is None or not gradients:
            return
        parts = [*gradients, self._radii]
        summed = over_processes(torch.cat([each.flatten() for each in parts]))
        *gradients, (total, count) = summed.split([each.numel() for each in parts])
        noise = [each.detach() for each in self._noise]
        if summed.isfinite().all():
            pairs = zip(noise, gradients, strict=True)
            noise = [self.ascended(each, gradient.view_as(each), total / count) for each, gradient in pairs]
        self._noise, self._radii = [each.requires_grad_() for each in noise], None

    def state(self) -> dict[str, Tensor]:
        return {f"universal.{index:02d}": each.detach().cpu() for index, each in enumerate(self._noise)}

    def begin(self, state: Mapping[str, Tensor] | None) -> None:
        self._noise, self._radii = [], None
        if state is not None:
            self._noise = [state[name] for name in sorted(state) if name.startswith("universal.")]
            if not self._noise:
                raise ValueError("the checkpoint has no universal noise: it is of a run with another objective")


class UniversalEmbeddings(Universal):
    """v (1, N, D) on the patch embeddings: v <- P(v + step r g / ||g||), P the projection on the ball ||v|| <= r.

    r is ``share`` of the embeddings' own size E||u||: the norm over all patches of an image, without each token's mean;
    E is the mean over the images of the step.
    """

    needs_whole_model = True

    def __init__(self, share: float, step: float, **consistency: Any) -> None:
        super().__init__(step, **consistency)
        self.share = share

    def other(self, batch: Batch) -> View:
        embeddings = batch.embeddings()
        (noise,) = self.noise([embeddings[:1].shape], self.share * embedding_norms(embeddings))
        return View(batch.images, noise)

    def ascended(self, noise: Tensor, gradient: Tensor, radius: Tensor) -> Tensor:
        moved = noise + along(gradient, (self.step * radius).expand(1))
        length = torch.linalg.vector_norm(moved)
        return torch.where(length > radius, moved * (radius / length), moved)


class UniversalPixels(Universal):
    """v at the scales of a pyramid in pixels (Chiang et al. 2023): delta_s <- C(delta_s + step r sign g_s), r = eps.

    delta_s (1, C, h_s, w_s) and the image C(x + sum over s of m_s delta_s) are as in :class:`PyramidPGD`, whose eps,
    scales and multipliers these are; its steps are not taken. C clips to +-eps, and the image to [0, 1].
    """

    needs_pixels = True

    def __init__(self, pyramid: PyramidPGD, step: float, **consistency: Any) -> None:
        super().__init__(step, **consistency)
        self.pyramid = pyramid

    def other(self, batch: Batch) -> View:
        assert batch.preprocessing is not None
        pixels = pixels_of(batch.images, batch.preprocessing)
        shapes = [torch.Size((1, pixels.shape[1], *cells(pixels.shape[2:], scale))) for scale in self.pyramid.scales]
        deltas = self.noise(shapes, pixels.new_full((len(pixels),), self.pyramid.eps))
        attacked = (pixels + self.pyramid.perturbation(deltas, pixels)).clamp(0, 1)
        return View(batch.preprocessing.normalize(attacked).to(batch.images.dtype))

    def ascended(self, noise: Tensor, gradient: Tensor, radius: Tensor) -> Tensor:
        moved = noise + self.step * radius * gradient.sign()
        return torch.minimum(torch.maximum(moved, -radius), radius)


def universal(args: Any) -> Objective:
    """``objective="universal"``, with the place, the size and the step of the run's settings."""
    if args.universal_in == "embeddings":
        return UniversalEmbeddings(args.universal_share, args.universal_step, **consistency_of(args))
    pyramid = PyramidPGD(**attack_settings(args), **pyramid_settings(args))
    return UniversalPixels(pyramid, args.universal_step, **consistency_of(args))


register_objective("universal", universal)
