"""Images that a model cannot tell apart: watermarks (A.7) and targeted images (A.8), judged as the files they become.

The wish is the image with a mark on it, or another image. Equation 13 projects the change onto the nullspace of the
patch embedding, but clipping to [0, 1] leaves the nullspace: so the invisible image nearest to the wish is sought
inside the box, in pixels (``linear.box``). Rounding to 8 bits leaves the nullspace again, as little as
``linear.rounding`` can. So the verdict is on the written file, through the model's own image processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.files import write_whole
from hf_nullspace.linear.box import nearest_invisible_image
from hf_nullspace.linear.patch import NoNullspaceError, PatchNullspace
from hf_nullspace.linear.rounding import round_unseen
from hf_nullspace.models.patch_embedding import embeddings_inside, find_patch_embedding
from hf_nullspace.models.preprocessing import Preprocessing, rgb_image

GEOMETRY_TOLERANCE = 1e-3  # of [0, 1]; a step of 8 bits is 4 times as much


@dataclass(frozen=True, eq=False)
class Seen:
    """What the model sees of one image."""

    probs: Tensor
    """(K,), float64."""
    embeddings: Tensor
    """Of the patches, float64."""


@dataclass(frozen=True)
class Verdict:
    """A written image, read back and judged against its source; a confidence is the probability of its prediction."""

    prediction_source: int
    prediction_result: int
    match: bool
    """Whether the two are the same."""
    confidence_source: float
    confidence_result: float
    """Of the class that is predicted for the source."""
    confidence_change: float
    """Absolute difference of the two (the paper: 1e-4)."""
    embedding_error: float
    """||E(result) - E(source)|| / ||E(source)||, E being the patch embeddings."""


@dataclass(frozen=True, eq=False)
class InvisibleImage:
    """The image that was found, before it is a file."""

    image: Image.Image
    """8-bit, of the judge's written size."""
    strength: float
    """Share of the wanted change that was asked for."""
    embedding_errors: dict[str, float]
    """As in :class:`Verdict`: "projection" is equation 13 alone, "projection_clipped" that in [0, 1], "box" the
    solution inside the box, "nearest_levels" that rounded as usual, which is not used."""
    kkt_residual: float
    """The largest over the patches (``linear.box.BoxSolution``)."""


@dataclass(frozen=True, eq=False)
class Judge:
    """A model with its image processor: what it sees of 8-bit images of the ``written_size``, and what it does not."""

    model: nn.Module
    image_processor: Any
    preprocessing: Preprocessing
    nullspace: PatchNullspace
    """In pixels."""

    @classmethod
    def from_model(cls, model: nn.Module, image_processor: Any) -> Self:
        """Judge for a classifier in eval mode and the processor that was saved with it.

        Raises:
            NotAViTError, NoNullspaceError: if the model has no patch embedding, or it sees every change.
            ValueError: if the processor does not fit the model, or the model is in training mode.
        """
        if model.training:
            raise ValueError(f"{type(model).__name__} is in training mode, its answers are random; call model.eval()")
        nullspace = PatchNullspace.from_model(model)
        preprocessing = Preprocessing.from_processor(image_processor)
        preprocessing.check_fits(model.config)
        if nullspace.dimension() == 0:
            raise NoNullspaceError(
                f"{type(model).__name__}'s {nullspace.weight.shape[0]} features of {nullspace.weight.shape[1]} numbers "
                "have no nullspace: it sees every change. Use a model with larger patches or fewer features."
            )
        return cls(model, image_processor, preprocessing, nullspace.in_pixels(preprocessing.std))

    @property
    def written_size(self) -> tuple[int, int]:
        """(height, width) of a file that the processor does not resize."""
        resize = self.preprocessing.resize or self.preprocessing.size
        return (resize, resize) if isinstance(resize, int) else resize

    def fit(self, image: Image.Image) -> Image.Image:
        """Any image in the written size, as the processor would resize it (squashed, or cut to a square first)."""
        size = self.written_size[::-1]
        image = rgb_image(image) if self.preprocessing.channels == 3 else rgb_image(image).convert("L")
        resample = Image.Resampling(self.preprocessing.resample)
        if image.size == size:
            return image
        squared = isinstance(self.preprocessing.resize, int)
        return ImageOps.fit(image, size, resample) if squared else image.resize(size, resample)

    def window(self, pixels: Tensor) -> Tensor:
        """The part (..., h, w) of pixels (..., H, W) of the written size that is left by the centre crop."""
        height, width = self.preprocessing.size
        top, left = (self.written_size[0] - height) // 2, (self.written_size[1] - width) // 2
        return pixels[..., top : top + height, left : left + width]

    def see(self, image: Image.Image) -> Seen:
        """What the model sees of an 8-bit image, through its image processor.

        Raises:
            ValueError: if the processor resizes the image, so that the model sees other pixels than were solved for.
        """
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"]
        height, width = self.written_size
        wanted, got = self.window(pixels_of(image)[None]), self.preprocessing.denormalize(pixel_values)
        if got.shape != wanted.shape or (got - wanted).abs().max() > GEOMETRY_TOLERANCE:
            made, unresized = (" x ".join(map(str, size)) for size in (got.shape[-2:], self.preprocessing.size))
            raise ValueError(
                f"{type(self.image_processor).__name__} does not leave an image of {image.height} x {image.width} as "
                f"it is: it makes {made} of it, resized; nullspace patterns do not survive that. Judge images of "
                f"{height} x {width}, of which it makes {unresized} without resizing, or change its size and crop_size."
            )
        return self._answer(pixel_values)

    def see_pixels(self, pixels: Tensor) -> Seen:
        """What the model sees of pixels (C, h, w) of its own input size; they need not be inside [0, 1]."""
        return self._answer(self.preprocessing.normalize(pixels)[None])

    @torch.no_grad()
    def _answer(self, pixel_values: Tensor) -> Seen:
        like = next(self.model.parameters())
        with embeddings_inside(find_patch_embedding(self.model)) as seen:
            logits = self.model(pixel_values=pixel_values.to(like)).logits
        return Seen(logits[0].double().softmax(-1).cpu(), seen[0].double().cpu())

    def compare(self, source: Image.Image | Path, result: Image.Image | Path) -> Verdict:
        """What the model thinks of two images or files of the written size."""
        before, after = self.see(opened(source)), self.see(opened(result))
        kind, other = int(before.probs.argmax()), int(after.probs.argmax())
        confidence, later = float(before.probs[kind]), float(after.probs[kind])
        return Verdict(
            prediction_source=kind,
            prediction_result=other,
            match=kind == other,
            confidence_source=confidence,
            confidence_result=later,
            confidence_change=abs(later - confidence),
            embedding_error=relative_error(after.embeddings, before.embeddings),
        )


# ---- the wish


def marked(image: Image.Image, mark: Image.Image) -> Image.Image:
    """``image`` with ``mark`` on it, as large as it fits, centred (A.7); it covers where it is not transparent."""
    mark = ImageOps.contain(mark.convert("RGBA"), image.size)
    place = ((image.width - mark.width) // 2, (image.height - mark.height) // 2)
    wish = image.convert("RGB")
    wish.paste(mark, place, mark)
    return wish.convert(image.mode)


# ---- the nearest image that the model cannot tell from the source


def make_invisible(
    judge: Judge, source: Image.Image, wish: Image.Image, *, strength: float = 1.0, iterations: int = 500
) -> InvisibleImage:
    """The 8-bit image nearest to ``source + strength * (wish - source)`` that the model cannot tell from ``source``.

    Both images have the judge's written size. A border that the processor's crop removes becomes the wish itself.

    Raises:
        ValueError: if a size or mode differs, or the strength is outside of [0, 1].
    """
    height, width = judge.written_size
    if not source.size == wish.size == (width, height) or source.mode != wish.mode:
        both = f"source {source.mode} {source.size} and wish {wish.mode} {wish.size}"
        raise ValueError(f"{both}: expected (width, height) = {(width, height)} and one mode; see Judge.fit")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: expected a share of the wanted change, in [0, 1]")
    start = pixels_of(source)
    wanted = torch.lerp(start, pixels_of(wish), strength)
    inner, inner_wanted = judge.window(start)[None], judge.window(wanted)[None]
    projection = inner + judge.nullspace.project(inner_wanted - inner)
    found, solution = nearest_invisible_image(judge.nullspace, inner, inner_wanted, iterations=iterations)
    seen = judge.see_pixels(inner[0]).embeddings
    stages = {
        "projection": projection,
        "projection_clipped": projection.clamp(0, 1),
        "box": found,
        "nearest_levels": (found * 255).round() / 255,
    }
    result = wanted.clone()
    judge.window(result).copy_(round_unseen(judge.nullspace, inner, found)[0])
    errors = {name: relative_error(judge.see_pixels(pixels[0]).embeddings, seen) for name, pixels in stages.items()}
    return InvisibleImage(image_of(result), strength, errors, float(solution.kkt_residual.max()))


def strongest_invisible(
    judge: Judge,
    source: Image.Image,
    wish: Image.Image,
    *,
    strength: float = 1.0,
    max_confidence_change: float = 1.0,
    steps: int = 6,
    iterations: int = 500,
) -> InvisibleImage:
    """:func:`make_invisible` at the largest strength, up to ``strength``, where the model does not notice the change.

    That is: the prediction stays, and its confidence changes by at most ``max_confidence_change``, in [0, 1]. The
    strength is found by bisection in ``steps``.
    """

    def at(share: float) -> tuple[InvisibleImage, bool]:
        found = make_invisible(judge, source, wish, strength=share, iterations=iterations)
        verdict = judge.compare(source, found.image)
        return found, verdict.match and verdict.confidence_change <= max_confidence_change

    best, unnoticed = at(strength)
    if unnoticed:
        return best
    best, inside, outside = at(0.0)[0], 0.0, strength
    for _ in range(steps):
        middle = (inside + outside) / 2
        found, unnoticed = at(middle)
        if unnoticed:
            best, inside = found, middle
        else:
            outside = middle
    return best


# ---- pictures and numbers


def write_png(image: Image.Image, path: Path | str) -> Path:
    """The image as an 8-bit PNG, which loses nothing."""
    return write_whole(path, lambda temporary: image.save(temporary, format="PNG"))


def closeness(source: Image.Image, wish: Image.Image, result: Image.Image) -> dict[str, float]:
    """Root mean square distances to the wish, in [0, 1], and ``reached``, the share of the way from source to wish."""
    start, goal, end = (pixels_of(image).double() for image in (source, wish, result))
    before, after = (float((pixels - goal).square().mean().sqrt()) for pixels in (start, end))
    return {"rms_source_to_wish": before, "rms_result_to_wish": after, "reached": 1 - after / before if before else 1.0}


def side_by_side(panels: Sequence[tuple[str, Image.Image]], path: Path | str) -> Path:
    """A PNG of several images with a title each, for instance source, mark, result and their difference."""
    figure, (row,) = canvas(2.6 * len(panels), 2.9, columns=len(panels))
    for axes, (title, image) in zip(row, panels, strict=True):
        axes.imshow(np.asarray(rgb_image(image)), interpolation="nearest")
        axes.set_title(title, fontsize="small")
        axes.set_axis_off()
    return save_png(figure, path)


def difference(source: Image.Image, result: Image.Image) -> Image.Image:
    """Half of result - source, around grey: grey is no change, white and black are a change by the whole range."""
    return image_of((1 + pixels_of(result) - pixels_of(source)) / 2)


def pixels_of(image: Image.Image) -> Tensor:
    """Pixels (C, H, W) in [0, 1], float32, of an 8-bit RGB or greyscale image."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()).float() / 255


def image_of(pixels: Tensor) -> Image.Image:
    """The 8-bit image of pixels (C, H, W) in [0, 1], rounded; what lies outside is clipped."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||."""
    return float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted))


def read_image(path: Path | str) -> Image.Image:
    """An image from a file, in the file's mode.

    Raises:
        OSError: if there is none, naming the file.
    """
    try:
        with Image.open(path) as file:
            return file.copy()
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is no image that Pillow can read") from error
    except OSError as error:
        raise OSError(f"cannot read the image {path}: {error.strerror or error}") from error


def opened(image: Image.Image | Path) -> Image.Image:
    """An image as it is, or an 8-bit one from a file, RGB or greyscale."""
    if isinstance(image, Image.Image):
        return image
    found = read_image(image)
    return found if found.mode in ("RGB", "L") else rgb_image(found)
