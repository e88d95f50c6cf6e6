"""Does the explanation stay when an image is changed invisibly (A.8, figures 6 and 7)? Maps of the image as a file.

Maps of unrelated images may agree, and LRP may disagree for nearly equal ones. So a correlation is beside those of the
wish, of random changes that the model sees as much of as of the result, and of random changes as large in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hf_nullspace.explain.grid import all_maps, correlations_with_first, methods_for, plot_grid
from hf_nullspace.invisible.images import Judge, image_of, opened, pixels_of, relative_error

METHODS = ("rollout", "generic", "lrp")
SOURCE, RESULT, WISH, SEEN_NOISE, LARGE_NOISE = "source", "result", "wish", "noise_as_visible", "noise_as_large"


@dataclass(frozen=True, eq=False)
class Explanations:
    """Maps of several versions of one image, "source" first; each explains what the model predicts for that version."""

    images: dict[str, Image.Image]
    """8-bit, by name: "source", "result", "wish", "noise_as_visible", "noise_as_large"."""
    predictions: list[int]
    confidences: list[float]
    embedding_errors: list[float]
    """Relative change of the patch embeddings against the source."""
    maps: dict[str, Tensor]
    """(images, h, w) by method; empty for a model that no method explains."""
    not_explained: str | None
    """Why some or all methods are missing."""

    def correlations(self) -> dict[str, dict[str, float | None]]:
        """By method and image: the Pearson correlation of its map with the source's, in [-1, 1]; None if constant."""
        rows = dict(zip(self.images, correlations_with_first(self.maps), strict=False))
        return {method: {name: row[method] for name, row in rows.items() if name != SOURCE} for method in self.maps}

    def summary(self) -> dict[str, object]:
        """Correlations, and what the model sees and predicts, as plain numbers for JSON."""
        numbers = zip(self.predictions, self.confidences, self.embedding_errors, strict=True)
        keys = ("prediction", "confidence", "embedding_error")
        return {
            "correlation_with_source": self.correlations(),
            "images": {name: dict(zip(keys, row, strict=True)) for name, row in zip(self.images, numbers, strict=True)},
            "not_explained": self.not_explained,
        }

    def plot(self, judge: Judge, names: Sequence[str], path: Path | str) -> Path:
        """A PNG of source, result, wish and noises as rows and the methods as columns; ``names`` are of the classes."""
        titles = [
            f"{name.replace('_', ' ')}: {names[kind]} {confidence:.3f}"
            for name, kind, confidence in zip(self.images, self.predictions, self.confidences, strict=True)
        ]
        pixels = torch.stack([judge.window(pixels_of(image)) for image in self.images.values()])
        return plot_grid(pixels, titles, self.maps, path)


def explain_change(
    judge: Judge,
    source: Image.Image | Path,
    wish: Image.Image | Path,
    result: Image.Image | Path,
    *,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
) -> Explanations:
    """Maps of source, result and wish, 8-bit images or files of the judge's written size, and of two random controls.

    ``methods`` that cannot explain the model are left out, with the reason; ``seed`` is that of the controls.

    Raises:
        ValueError: if the processor resizes an image (``Judge.see``).
    """
    generator = torch.Generator().manual_seed(seed)
    source, wish, result = opened(source), opened(wish), opened(result)
    seen = judge.see(source).embeddings
    error = relative_error(judge.see(result).embeddings, seen)
    images = {
        SOURCE: source,
        RESULT: result,
        WISH: wish,
        SEEN_NOISE: noise_as_visible(judge, source, error, generator),
        LARGE_NOISE: noise_as_large(source, result, generator),
    }
    answers = [judge.see(image) for image in images.values()]
    predictions = torch.stack([answer.probs for answer in answers]).argmax(1)
    available, reason = methods_for(judge.model, methods)
    maps: dict[str, Tensor] = {}
    if available:
        like = next(judge.model.parameters())
        prepared = [judge.image_processor(image, return_tensors="pt")["pixel_values"] for image in images.values()]
        pixel_values = torch.cat(prepared).to(like)
        maps = all_maps(judge.model, pixel_values, available, predictions.to(like.device))
    return Explanations(
        images=images,
        predictions=predictions.tolist(),
        confidences=[float(answer.probs.max()) for answer in answers],
        embedding_errors=[relative_error(answer.embeddings, seen) for answer in answers],
        maps={name: one.cpu() for name, one in maps.items()},
        not_explained=reason,
    )


def noise_as_visible(judge: Judge, source: Image.Image, error: float, generator: torch.Generator) -> Image.Image:
    """``source`` with as many random numbers moved by one level of 8 bits as change the embeddings by ``error``.

    The change grows with the root of their share, so the error with all of them moved tells the share.
    """
    levels = (pixels_of(source) * 255).round()
    signs = torch.where(torch.rand(levels.shape, generator=generator) < 0.5, -1.0, 1.0)
    signs[levels == 0], signs[levels == 255] = 1.0, -1.0
    order = torch.rand(levels.shape, generator=generator)
    seen = judge.see(source).embeddings
    all_moved = relative_error(judge.see(image_of((levels + signs) / 255)).embeddings, seen)
    moved = signs * (order < (error / all_moved) ** 2)
    return image_of((levels + moved) / 255)


def noise_as_large(source: Image.Image, result: Image.Image, generator: torch.Generator) -> Image.Image:
    """``source`` with normal noise of the root mean square of ``result - source``, clipped and rounded to 8 bits."""
    pixels = pixels_of(source)
    size = (pixels_of(result) - pixels).square().mean().sqrt()
    return image_of(pixels + size * torch.randn(pixels.shape, generator=generator))
