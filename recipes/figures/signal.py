"""The signal: how far the gradient of a noisy view is from that of the clean view, against how far predictions move.

The gradient g' of the cross-entropy on noisy images is compared with the gradient g on the same images without noise:
their cosine, and ||g' - g|| / ||g||. Both are of the mean over the images, with respect to all trainable parameters, in
eval mode. The yardstick is the clean gradient of other images. A third number says where g' leads: its cosine to the
gradient of other images under attack. A small step against g' lowers their loss by a share that this cosine is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_nullspace.command_line import UsageError
from hf_nullspace.core import text
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.seeds import derive_seed, generator_of
from hf_nullspace.data.image_set import collate
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise, embedding_shape
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.calibration import scale_to_influence
from hf_nullspace.noise.influence import centre, influences, noise_influence
from hf_nullspace.robustness.attacks.base import readable
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.training.adversarial import RandomStartFGSM, pixels_of
from hf_nullspace.training.loading import Classifier, Rows, evaluation_images
from hf_nullspace.training.objectives import View

BATCHES = 3
"""Disjoint batches of images that are measured; one more is for learning noises."""
RADII = tuple(level / 255 for level in (0.25, 0.5, 1, 2, 4, 8))
"""Of FGSM, for pixels in [0, 1]."""
ATTACK = 2 / 255
"""Radius of FGSM on the other images."""
LEARNING: dict[str, Any] = {"learning_rate": 0.4, "steps": 60}
"""How a noise is learned: as in the preset "boundary"."""
_STEP, _CHUNK = 128, 64  # images in a step of learning, and at once in the model
_SCALED_ON = 256
"""The length of a noise is set on so many images of the batch; what it does is measured on all."""
LEARNED, RANDOM, GRADIENT = "learned noise", "random noise", "noise along the gradient"
FGSM, CLEAN, OTHER = "FGSM from a random start", "the same images, clean", "other images, clean"
MEASURES = {
    "influence": ".4f",
    "mean_shift": ".3f",
    "centred_norm": ".2f",
    "cosine": ".3f",
    "relative_difference": ".3f",
    "attack_cosine": ".3f",
}
"""Of a view, and how each is written in the table."""
PANELS = {
    "cosine": "cosine to the clean gradient g",
    "relative_difference": "difference |g' - g| / |g|",
    "attack_cosine": "cosine to the gradient of\nother images under attack",
}
"""Titles of the picture, by measure."""
HEAD = ("view", "epsilon or radius", *(name.replace("_", " ") for name in MEASURES))


@dataclass
class CleanBatch:
    """Images of one batch, views of them with a noise or an attack, and how far a view's gradient is from theirs."""

    model: nn.Module
    """In eval mode."""
    hook: PatchEmbeddingNoise
    preprocessing: Preprocessing
    images: Tensor
    """``pixel_values`` (n, C, H, W), on the model's device and in its dtype."""
    labels: Tensor
    """(n,), on the model's device."""
    seed: int
    """Of everything random in the views."""

    # ---- gradients

    @cached_property
    def clean(self) -> tuple[list[Tensor], Tensor]:
        """Gradient and logits of the images as they are."""
        return self.gradient(View(self.images))

    def gradient(self, view: View) -> tuple[list[Tensor], Tensor]:
        """Gradient of the mean cross-entropy, one tensor per trainable parameter (0 if unused), and logits (n, K)."""
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        sums, logits = [torch.zeros_like(each) for each in parameters], []
        for images, noise, labels in self._chunks(view):
            logits.append(self._logits(images, noise))
            loss = cross_entropy(logits[-1], labels, reduction="sum") / len(self.labels)
            for total, part in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if part is not None:
                    total += part
        return sums, torch.cat(logits).detach()

    @cached_property
    def attacked(self) -> list[Tensor]:
        """The gradient of the images under FGSM of radius ``ATTACK``."""
        return self.gradient(self.fgsm(ATTACK))[0]

    def measure(self, view: View, attacked: Sequence[Tensor]) -> dict[str, float | None]:
        """Of one view of these images: ``MEASURES``. ``attacked`` is the gradient of other images under attack.

        The influence is the mean of ||p' - p||^2 over the images (Algorithm 1, line 8), the shift that of ||p' - p||
        (equation 7), the centred norm that of an image's noise.
        """
        gradient, logits = self.gradient(view)
        squares = influences(self.clean[1], logits)
        norm = None if view.noise is None else float(torch.linalg.vector_norm(centre(view.noise), dim=(1, 2)).mean())
        near = *compare(self.clean[0], gradient), compare(attacked, gradient)[0]
        return dict(zip(MEASURES, (float(squares.mean()), float(squares.sqrt().mean()), norm, *near), strict=True))

    # ---- views

    def random(self, epsilon: float) -> View:
        """One normal noise for all images, of influence ``epsilon``."""
        shape = embedding_shape(self.model, self.images, self.hook.module)
        direction = torch.randn(1, shape.patches, shape.features, generator=generator_of(self.seed))
        return self.scaled(direction / torch.linalg.vector_norm(direction), epsilon)

    def along_gradient(self, epsilon: float) -> View:
        """A noise for each image along the gradient of its loss, all of one length, of influence ``epsilon``."""
        return self.scaled(self.embedding_gradients, epsilon)

    @cached_property
    def embedding_gradients(self) -> Tensor:
        """The gradient of each image's loss at its patch embeddings, of length 1: (n, N, D)."""
        shape = embedding_shape(self.model, self.images, self.hook.module)
        found: list[Tensor] = []
        for images, _, labels in self._chunks(View(self.images)):
            zero = images.new_zeros(len(images), shape.patches, shape.features).requires_grad_()
            loss = cross_entropy(self._logits(images, zero), labels, reduction="sum")
            found += torch.autograd.grad(loss, [zero])
        gradients = torch.cat(found)
        lengths = torch.linalg.vector_norm(gradients, dim=(1, 2), keepdim=True)
        return gradients / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)  # an image without a loss has none

    def scaled(self, direction: Tensor, epsilon: float) -> View:
        """The images with ``direction``, (1, N, D) or (n, N, D), times the factor that gives it this influence."""
        direction = direction.to(self.images)
        images = self.images[:_SCALED_ON]

        @torch.no_grad()
        def influence_at(factor: float) -> float:
            chunks = self._chunks(View(images, factor * direction[: len(images)]))
            logits = torch.cat([self._logits(some, noise) for some, noise, _ in chunks])
            return float(noise_influence(self.clean[1][: len(logits)], logits))

        return View(self.images, scale_to_influence(influence_at, epsilon).factor * direction)

    def fgsm(self, radius: float) -> View:
        """One step of FGSM from a random start, within ``radius`` in L-inf, as ``objective="fast"`` has it."""
        attack = RandomStartFGSM(eps=radius)
        model = PixelModel(self.model, self.preprocessing.mean, self.preprocessing.std)
        attacked: list[Tensor] = []
        for images, _, labels in self._chunks(View(self.images)):
            first = sum(map(len, attacked))
            seeds = [derive_seed(self.seed, place) for place in range(first, first + len(images))]
            attacked.append(attack(model, pixels_of(images, self.preprocessing), labels, seeds=seeds))
        return View(self.preprocessing.normalize(torch.cat(attacked)).to(self.images))

    def _chunks(self, view: View) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """(images, noise, labels), few enough for the model at once."""
        for first in range(0, len(view.images), _CHUNK):
            part, noise = slice(first, first + _CHUNK), view.noise
            yield view.images[part], noise if noise is None or len(noise) == 1 else noise[part], self.labels[part]

    def _logits(self, images: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return self.model(pixel_values=images).logits
        with self.hook.adding(noise):
            return self.model(pixel_values=images).logits


def compare(gradient: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, float]:
    """The cosine of two gradients g and g', and ||g' - g|| / ||g||; summed in float64 over all parameters."""
    pairs = [(one.double(), two.double()) for one, two in zip(gradient, other, strict=True)]
    product = sum(float((one * two).sum()) for one, two in pairs)
    own, others = (sum(float(pair[which].square().sum()) for pair in pairs) for which in (0, 1))
    apart = sum(float((two - one).square().sum()) for one, two in pairs)
    return product / (own * others) ** 0.5, (apart / own) ** 0.5


def learn(batch: CleanBatch, epsilon: float, pool: Tensor) -> Tensor:
    """A noise (1, N, D) that is learned at ``epsilon`` on ``pool`` (n, C, H, W), with the seed of ``batch``."""
    settings = BoundarySettings(epsilon=epsilon, pool_images=len(pool), **LEARNING)
    held_out = pool[:_SCALED_ON].split(_CHUNK)
    (noise,), _ = follow_boundary(
        batch.model, pool.split(_STEP), settings, seed=batch.seed, held_out=held_out, hook=batch.hook, chunk_size=_CHUNK
    )
    return noise.tensor


def added(gradients: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The sum of gradients of several batches."""
    return [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)]


def draw_batches(rows: Rows, classifier: Classifier, images: int, seed: int) -> tuple[list[CleanBatch], Tensor]:
    """``BATCHES`` disjoint batches of ``images`` images each, and as many others (n, C, H, W) to learn noises on.

    Images are drawn without replacement and not augmented.

    Raises:
        UsageError: if there are too few.
    """
    needed = (BATCHES + 1) * images
    if needed > len(rows):
        what = f"{BATCHES} batches of {images} images and as many to learn noises on are {needed}"
        raise UsageError(f"images={images}: {what}; the split has {len(rows)}. Lower --images")
    order = torch.randperm(len(rows), generator=generator_of(seed))[:needed].tolist()
    chosen = evaluation_images(rows.select(order), classifier, None)
    model = classifier.model.eval()
    hook, like = PatchEmbeddingNoise(model), next(model.parameters())
    drawn = []
    for first in range(0, needed, images):
        batch = collate([chosen[index] for index in range(first, first + images)])
        drawn.append((batch["pixel_values"].to(like), batch["labels"].to(like.device)))
    batches = [
        CleanBatch(model, hook, classifier.preprocessing, *batch, seed=derive_seed(seed, index))
        for index, batch in enumerate(drawn[:BATCHES])
    ]
    return batches, drawn[BATCHES][0]


def measure_signal(
    batches: Sequence[CleanBatch], pool: Tensor, epsilons: Sequence[float], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for every view, said as it comes: its name, its epsilon or radius, and ``MEASURES`` as a list over batches.

    The first row is the clean view, the last one the yardstick: the clean gradient of another batch. Learned noises are
    learned once for all batches, and like the others scaled on each. Where no length of a noise has the influence
    epsilon, the row is of the length that comes nearest.
    """
    found: list[dict[str, Any]] = []
    attacked = [added(other.attacked for other in batches if other is not one) for one in batches]
    learned = cache(lambda epsilon: learn(batches[0], epsilon, pool))
    views: list[tuple[str, str, Sequence[float], Callable[[CleanBatch, float], View]]] = [
        (CLEAN, "epsilon", [0.0], lambda batch, _: View(batch.images)),
        (LEARNED, "epsilon", epsilons, lambda batch, epsilon: batch.scaled(learned(epsilon), epsilon)),
        (RANDOM, "epsilon", epsilons, CleanBatch.random),
        (GRADIENT, "epsilon", epsilons, CleanBatch.along_gradient),
        (FGSM, "radius", RADII, CleanBatch.fgsm),
    ]
    for line in text.table(HEAD, []):
        say(line)
    for view, scale, values, make in views:
        for value in values:
            each = [one.measure(make(one, value), others) for one, others in zip(batches, attacked, strict=True)]
            found.append({"view": view, scale: value} | {name: [one[name] for one in each] for name in MEASURES})
            say(line_of(found[-1]))
    apart = [compare(one.clean[0], batches[index - 1].clean[0]) for index, one in enumerate(batches)]
    cosines, differences = zip(*apart, strict=True)
    found.append({"view": OTHER, "cosine": [*cosines], "relative_difference": [*differences]})
    say(line_of(found[-1]))
    return found


def line_of(row: dict[str, Any]) -> str:
    """A row of the table, with the mean over the batches and their range."""
    value = f"{row['epsilon']:g}" if "epsilon" in row else readable(row["radius"]) if "radius" in row else ""
    cells = [cell(row.get(name), digits) for name, digits in MEASURES.items()]
    return text.table(HEAD, [[row["view"], value, *cells]])[-1]


def cell(values: Sequence[float | None] | None, digits: str) -> str:
    """Mean [smallest, largest]; the mean alone where they look the same; nothing where nothing was measured."""
    known = [value for value in values or () if value is not None]
    if not known:
        return ""
    middle, low, high = (f"{value:{digits}}" for value in (fmean(known), min(known), max(known)))
    return middle if low == high else f"{middle} [{low}, {high}]"


def plot_signal(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Each measure against the influence: a line through the means, a point for each batch; names beside the lines."""
    figure, (panels,) = canvas(10, 3.4, columns=3)
    clean, *views, other = rows
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for colour, view in enumerate(dict.fromkeys(row["view"] for row in views)):
            mine = [row for row in views if row["view"] == view]
            means = [[fmean(row[key]) for row in mine] for key in ("influence", name)]
            axes.plot(*means, color=f"C{colour}", linewidth=1.5, label=view)
            each = [[value for row in mine for value in row[key]] for key in ("influence", name)]
            axes.plot(*each, ".", color=f"C{colour}", alpha=0.5, markersize=4)
        level = clean if name == "attack_cosine" else other
        height = fmean(level[name])
        axes.axhline(height, color="black", linestyle="--", linewidth=1)
        axes.text(0.03, height, level["view"], transform=axes.get_yaxis_transform(), va="bottom", fontsize="small")
        axes.set(xlabel="influence of the view", xscale="log", title=title)
    _name_lines(panels[-1])
    return save_png(figure, path)


def _name_lines(axes: Any) -> None:
    """The label of every line that has one to the right of the axes, at the height of its end; none over another."""
    low, high = axes.get_ylim()
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    height = -math.inf
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        height = max((line.get_ydata()[-1] - low) / (high - low), height + 0.09)
        axes.text(1.03, height, line.get_label(), transform=axes.transAxes, color=line.get_color(), va="center")
