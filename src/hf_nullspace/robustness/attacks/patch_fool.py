"""Patch-Fool (Fu et al., ICLR 2022): replace the content of one patch so that the attention follows it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nullspace.models.attention import attention_implementation
from hf_nullspace.robustness.attacks.base import Adam, Attack, check_radius, loss_gradient, seeded_like, within
from hf_nullspace.robustness.pixel_model import PixelModel


@dataclass(frozen=True)
class Patches:
    """How ``model`` cuts an image: ``size`` (height, width) of a patch, ``shape`` (rows, columns) of their grid."""

    model: PixelModel
    size: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def of(cls, model: PixelModel, pixels: Tensor) -> Self:
        config = getattr(model.model, "config", None)
        size = getattr(getattr(config, "vision_config", config), "patch_size", None)
        if size is None:
            raise ValueError(f"{type(model.model).__name__} has no config.patch_size; PatchFool needs a ViT")
        height, width = (size, size) if isinstance(size, int) else size
        return cls(model, (height, width), (pixels.shape[2] // height, pixels.shape[3] // width))

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    def attentions(self, outputs: Any) -> list[Tensor]:
        """Attention to the patches per layer, (B, heads, tokens, patches); they are the last tokens."""
        attentions, name = getattr(outputs, "attentions", None), type(self.model.model).__name__
        if not attentions or attentions[0] is None:
            raise ValueError(f"{name} returns no attentions; PatchFool needs a ViT that does")
        batch, _, queries, keys = attentions[0].shape
        if batch != len(self.model.logits_of(outputs)) or queries != keys or keys < self.count:
            shape = f"attentions of shape {tuple(attentions[0].shape)} for {self.count} patches"
            raise ValueError(f"{name} has {shape}; PatchFool needs global attention over all patches, as ViT has")
        return [(a if a.dtype == torch.float64 else a.float())[..., -self.count :] for a in attentions]

    def mask(self, chosen: Tensor, pixels: Tensor) -> Tensor:
        """The pixels of the ``chosen`` patches (B, n), as bool of shape (B, 1, H, W)."""
        patches = torch.zeros(len(pixels), self.count, dtype=torch.bool, device=pixels.device)
        patches = patches.scatter(1, chosen, True).view(-1, 1, *self.shape)
        mask = patches.repeat_interleave(self.size[0], 2).repeat_interleave(self.size[1], 3)
        return F.pad(mask, (0, pixels.shape[3] - mask.shape[3], 0, pixels.shape[2] - mask.shape[2]))


@dataclass(frozen=True, repr=False)
class PatchFool(Attack):
    """Ascend CE + ``attention_weight`` * sum_l J_l over the content of ``num_patch`` patches, from random pixels.

    J_l is the mean over queries of the log of the head-averaged attention to the patches, for the layers 1 .. L/2 - 1
    (at least one). Where grad J_l opposes grad CE it is projected onto its complement, per image and layer; the
    authors' code divides by the norm of grad CE instead of its square (``original_projection``). Adam works in
    **normalised** space: ``lr`` 0.22 is about 0.05 in pixels, times 0.95 every 10 steps. The last iterate counts.

    Args:
        choice: how patches are chosen: by "attention" (of layer ``attention_layer``, averaged over heads and queries;
            by default index 4, the middle one of fewer than 10 layers), "saliency" (sum of |grad CE|), or "random".
        attention_weight: 0 ascends CE alone, with one backward pass per step instead of one per layer more.
        mild: "linf" keeps the patch within ``eps`` of the image per pixel (from a uniform start there), "l2" each
            channel of the change within ``eps`` in L2 norm; None replaces the content freely.
        sparse: change only this many pixels per image inside the patches, by scores that are learned (top-k mask,
            straight-through gradient, Adam 1e-2, from a uniform start) until step ``sparse_freeze``; 0 changes all.
        early_stop: an image that the model gets wrong is finished and leaves the batch, instead of the last iterate.
    """

    choice: str = "attention"
    num_patch: int = 1
    steps: int = 250
    lr: float = 0.22
    attention_weight: float = 0.002
    attention_layer: int | None = None
    mild: str | None = None
    eps: float | None = None
    sparse: int = 0
    sparse_freeze: int = 200
    original_projection: bool = False
    early_stop: bool = False

    seeded = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mild is None) != (self.eps is None):
            raise ValueError(f"PatchFool: mild={self.mild!r} with eps={self.eps}; expected both or neither")
        if self.mild is not None and self.eps is not None:
            check_radius(self, self.eps, self.mild)

    def settings(self) -> dict[str, Any]:
        """Without the variants that are switched off: their absence says so."""
        off = {name for name in ("attention_layer", "mild", "eps") if getattr(self, name) is None}
        off |= {name for name in ("sparse", "original_projection", "early_stop") if not getattr(self, name)}
        off |= set() if self.sparse else {"sparse_freeze"}
        return {name: value for name, value in super().settings().items() if name not in off}

    @property
    def cost(self) -> float:
        return self.steps * (6.0 if self.attention_weight else 3.0)

    def project(self, adversarial: Tensor, pixels: Tensor) -> Tensor:
        if self.mild is not None and self.eps is not None:
            adversarial = within(adversarial, pixels, self.eps, self.mild, over=2)
        return adversarial.clamp(0, 1)

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        if not isinstance(model, PixelModel):
            raise TypeError(f"PatchFool needs a PixelModel (its std, its attentions), got {type(model).__name__}")
        looks = self.choice == "attention" or bool(self.attention_weight)
        with attention_implementation(model.model, "eager") if looks else nullcontext():
            patches = Patches.of(model, pixels)
            if self.num_patch > patches.count:
                raise ValueError(f"num_patch={self.num_patch}, but the image has {patches.count} patches")
            return self.optimise(patches, self.choose(patches, pixels, labels, seeds), pixels, labels, seeds)

    def choose(self, patches: Patches, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Indices of the patches, (B, num_patch)."""
        if self.choice == "random":
            generators = [torch.Generator().manual_seed(seed + 2) for seed in seeds]
            rows = [torch.randperm(patches.count, generator=generator)[: self.num_patch] for generator in generators]
            return torch.stack(rows).to(pixels.device)
        if self.choice == "saliency":
            strength = loss_gradient(patches.model, pixels, labels).abs().sum(1, keepdim=True)
            per_patch = F.avg_pool2d(strength, patches.size).flatten(1)
        else:
            with torch.no_grad():
                attentions = patches.attentions(patches.model.outputs(pixels, output_attentions=True))
            middle = 4 if len(attentions) >= 10 else len(attentions) // 2
            layer = middle if self.attention_layer is None else self.attention_layer
            if layer >= len(attentions):
                raise ValueError(f"attention_layer={layer}, but the model has {len(attentions)} layers, from 0")
            per_patch = attentions[layer].mean(dim=(1, 2))
        return per_patch.topk(self.num_patch, dim=1).indices

    def optimise(
        self, patches: Patches, chosen: Tensor, pixels: Tensor, labels: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """The images with the content of the ``chosen`` patches (B, num_patch) learned."""
        result = pixels.clone()
        rows = torch.arange(len(pixels), device=pixels.device)
        std = PixelModel.channels(patches.model.std, pixels)
        region = patches.mask(chosen, pixels)
        start = seeded_like(pixels, seeds, "uniform")
        if self.mild == "linf" and self.eps is not None:
            start = pixels + self.eps * (2 * start - 1)
        content = self.project(torch.where(region, start, pixels), pixels)
        scores = seeded_like(pixels[:, :1], [seed + 1 for seed in seeds], "uniform")
        adam, sparse_adam = Adam(content), Adam(scores)
        for step in range(self.steps):
            mask = self.mask(scores, region)
            adversarial = torch.where(mask, content, pixels)
            gradient, logits = self.ascent(patches, chosen, adversarial, labels, region)
            if self.early_stop and (wrong := logits.argmax(1) != labels).any():
                result[rows[wrong]] = adversarial[wrong]
                left = ~wrong
                rows, pixels, labels, chosen, region = (t[left] for t in (rows, pixels, labels, chosen, region))
                content, scores, mask, gradient = (t[left] for t in (content, scores, mask, gradient))
                adam.keep(left)
                sparse_adam.keep(left)
                if not len(rows):
                    return result
            if self.sparse and step < self.sparse_freeze:
                through = (gradient * (content - pixels)).sum(1, keepdim=True)  # as if the mask were the score
                scores = scores + 1e-2 * sparse_adam.direction(through)
            lr = self.lr * 0.95 ** (step // 10)
            moved = content + lr * std * adam.direction(gradient * std * mask)
            content = self.project(torch.where(region, moved, pixels), pixels)
        result[rows] = torch.where(self.mask(scores, region), content, pixels)
        return result

    def mask(self, scores: Tensor, region: Tensor) -> Tensor:
        """The pixels that change, (B, 1, H, W) bool: all of the region, or the ``sparse`` ones of highest score."""
        if not self.sparse:
            return region
        inside = scores.masked_fill(~region, -torch.inf).flatten(1)
        top = inside.topk(min(self.sparse, int(region[0].sum())), dim=1).indices
        return torch.zeros_like(inside, dtype=torch.bool).scatter(1, top, True).view_as(region)

    def ascent(
        self, patches: Patches, chosen: Tensor, adversarial: Tensor, labels: Tensor, region: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The combined gradient inside the region, (B, C, H, W), and the logits."""
        point = adversarial.detach().requires_grad_()
        asked = {"output_attentions": True} if self.attention_weight else {}
        outputs = patches.model.outputs(point, **asked)
        logits, attentions = patches.model.logits_of(outputs), patches.attentions(outputs) if asked else []
        layers = list(range(1, len(attentions) // 2)) or [min(1, len(attentions) - 1)] * bool(attentions)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradient = torch.autograd.grad(loss, point, retain_graph=bool(layers))[0] * region
        total = gradient
        for layer in layers:
            attention = attentions[layer].mean(1)
            attention = attention.gather(2, chosen[:, None].expand(-1, attention.shape[1], -1))
            wish = attention.clamp_min(torch.finfo(attention.dtype).tiny).log().mean(dim=(1, 2)).sum()
            pull = torch.autograd.grad(wish, point, retain_graph=layer != layers[-1])[0] * region
            total = total + self.attention_weight * without_conflict(pull, gradient, original=self.original_projection)
        return total.detach(), logits.detach()


def without_conflict(pull: Tensor, gradient: Tensor, *, original: bool = False) -> Tensor:
    """``pull`` with its component against ``gradient`` removed, per image; unchanged where they agree."""
    overlap = (pull * gradient).flatten(1).sum(1)
    length = gradient.flatten(1).norm(dim=1)
    divisor = length if original else length.square()
    factor = torch.where((overlap < 0) & (divisor > 0), overlap / divisor, 0)
    return pull - factor[:, None, None, None] * gradient
