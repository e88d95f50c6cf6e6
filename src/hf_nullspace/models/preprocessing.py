"""From an image to what a model sees, in two steps with a name each: ``pixels`` in [0, 1], then ``pixel_values``.

The pixels come from the model's image processor; attacks, corruptions and nullspace images live before the
normalisation.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Model types with a position embedding that follows the input: any size divisible by the patch size goes in.
SIZE_FOLLOWS_INPUT = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit", "swin", "swinv2"})

PROBE_TOLERANCE = 4 / 255  # mean difference in [0, 1]; backends round resized pixels differently, by about 1/255


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor does to an image: resize, perhaps crop the centre, scale to [0, 1], normalise.

    ``size`` is (height, width) of the result. ``resize`` says how to get there: (height, width) squashes the image
    to that, a single int makes the shorter edge that long, ``None`` does not resize; a result that is not ``size``
    is cropped at the centre (black borders where it is smaller). One mean and one std make a greyscale model.

    ``processor`` makes the pixels: the one that was read, or a ``ViTImageProcessorPil`` of this geometry.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    resize: tuple[int, int] | int | None
    resample: int = Image.Resampling.BILINEAR
    processor: Any = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean {self.mean} and std {self.std}: expected one value per channel, 3 for RGB or 1 for greyscale. "
                "Correct image_mean and image_std in preprocessor_config.json."
            )
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std {self.std}: expected positive numbers. Correct image_std in the image processor.")
        if min(self.size) < 1:
            raise ValueError(f"size {self.size}: expected a positive height and width.")
        object.__setattr__(self, "processor", _processor(self))

    @classmethod
    def from_processor(cls, image_processor: Any) -> "Preprocessing":
        """Read the image processor of a ViT, DeiT, BEiT, DINOv2, Swin, SigLIP or CLIP (also a CLIP/SigLIP
        ``Processor`` that holds one).

        One probe image is sent both ways, so that a processor with a step of its own is refused with ``ValueError``
        instead of being followed wrongly; so is one that does not say which size it produces.
        """
        processor = getattr(image_processor, "image_processor", image_processor)
        name = type(processor).__name__
        resize = _size_of(processor.size, name, "size") if processor.do_resize else None
        if processor.do_center_crop:
            size = _pair(_size_of(processor.crop_size, name, "crop_size"))
        elif isinstance(resize, tuple):
            size = resize
        else:
            came = "do_resize=False" if resize is None else f"size={{'shortest_edge': {resize}}}"
            raise ValueError(
                f"{name} has {came} and no centre crop, so its images have no common size and cannot form a batch. "
                'Set size={"height": ..., "width": ...} with do_resize=True, or do_center_crop=True with a crop_size.'
            )
        mean, std = _mean_and_std(processor, name)
        resample = Image.Resampling.BILINEAR if processor.resample is None else _pil_resample(processor.resample)
        preprocessing = cls(mean, std, size, resize, resample)
        preprocessing._compare(processor)
        object.__setattr__(preprocessing, "processor", processor)
        return preprocessing

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for greyscale."""
        return len(self.mean)

    def pixels_from_image(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """Pixels of one image as the model's processor makes them: (channels, height, width), float32 in [0, 1].

        ``size`` (height, width) replaces the processor's geometry: the image is squashed to exactly that, nothing is
        cropped. The image may have any mode (see ``rgb_image``).
        """
        geometry: dict[str, Any] = {}
        if size is not None:
            side = {"height": size[0], "width": size[1]}
            geometry = {"do_resize": True, "size": side, "resample": self.resample, "do_center_crop": False}
        unit_range = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False}
        image = rgb_image(image) if self.channels == 3 else rgb_image(image).convert("L")
        return self.processor(image, return_tensors="pt", **unit_range, **geometry)["pixel_values"][0].float()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (..., channels, height, width) in [0, 1] -> ``pixel_values``; differentiable."""
        return (pixels - _per_channel(self.mean, pixels)) / _per_channel(self.std, pixels)

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """The inverse of ``normalize``, not clipped: what lies outside [0, 1] is no image."""
        return pixel_values * _per_channel(self.std, pixel_values) + _per_channel(self.mean, pixel_values)

    def check_fits(self, config: Any) -> None:
        """Raise ``ValueError`` unless images of this size and these channels go into the model of ``config``."""
        vision = getattr(config, "vision_config", config)
        channels = getattr(vision, "num_channels", self.channels)
        if channels != self.channels:
            raise ValueError(
                f"The image processor makes {self.channels}-channel images, but the {config.model_type} model takes "
                f"{channels} channels (config.num_channels). Use the processor that was saved with the model."
            )
        expected, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if vision.model_type in SIZE_FOLLOWS_INPUT:
            patches = _pair(patch) if patch is not None else (1, 1)
            if any(length % side for length, side in zip(self.size, patches, strict=True)):
                raise ValueError(
                    f"The image processor makes {_times(self.size)} images, which {_times(patches)} patches of the "
                    f"{vision.model_type} model do not divide. Choose a multiple of the patch size in the processor."
                )
        elif expected is not None and _pair(expected) != self.size:
            raise ValueError(
                f"The image processor makes {_times(self.size)} images, but the {config.model_type} model takes "
                f"{_times(_pair(expected))} (config.image_size). Give the processor size="
                f'{{"height": {_pair(expected)[0]}, "width": {_pair(expected)[1]}}}, or use a model for '
                f"{_times(self.size)} images."
            )

    def _compare(self, processor: Any) -> None:
        """Refuse a processor that does more to a picture (smooth, not square, not symmetric) than is known of it."""
        height, width = 3 * self.size[0] // 2 + 3, 2 * self.size[1] + 5
        down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
        bands = np.stack([right**2, down, (1 - down) * right**0.5], axis=-1)
        image = Image.fromarray((255 * bands).astype(np.uint8))
        image = image if self.channels == 3 else image.convert("L")
        found = processor(image, return_tensors="pt")["pixel_values"][0].float()
        expected = self.pixels_from_image(image)
        if found.shape != expected.shape:
            problem = f"makes {tuple(found.shape)} of a probe image, expected {tuple(expected.shape)}"
        else:
            gap = (self.denormalize(found) - expected).abs().mean().item()
            if gap <= PROBE_TOLERANCE:
                return
            problem = f"differs by {gap:.3f} (mean, of [0, 1]) on a probe image"
        raise ValueError(
            f"{type(processor).__name__} {problem}: it does more than resize, centre crop, rescale and normalise. "
            "Use make_image_processor(size, mean, std), or a Preprocessing of your own."
        )


def rgb_image(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image of any PIL image; transparency is dropped, as `transformers` pipelines do.

    16-bit greyscale is scaled to 8 bits (Pillow's own conversion clips everything above 255 to white). Modes "I" and
    "F" have no agreed range and raise ``ValueError``.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"an image of mode {image.mode!r} (32-bit numbers without a range) is not a picture; expected 8-bit or "
            "16-bit values. Save it as an 8-bit PNG first."
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; Pillow warns when it goes to RGB directly
    return image.convert("RGB")


def make_image_processor(
    size: int | tuple[int, int],
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
    resample: int = Image.Resampling.BILINEAR,
) -> Any:
    """An image processor for a model that has none; what it saves loads with ``AutoImageProcessor.from_pretrained``.

    It squashes to ``size`` (height, width), converts to RGB, scales to [0, 1], and normalises. It is the PIL backend
    of ``ViTImageProcessor``, so torchvision is not needed; where torchvision is installed, loading picks that backend.
    """
    return Preprocessing(mean, std, _pair(size), _pair(size), resample).processor


def _processor(wanted: Preprocessing) -> Any:
    from transformers import ViTImageProcessorPil

    geometry: dict[str, Any] = {"do_resize": wanted.resize is not None}
    if isinstance(wanted.resize, int):
        geometry["size"] = {"shortest_edge": wanted.resize}
    elif wanted.resize is not None:
        geometry["size"] = {"height": wanted.resize[0], "width": wanted.resize[1]}
    if wanted.resize != wanted.size:
        geometry |= {"do_center_crop": True, "crop_size": {"height": wanted.size[0], "width": wanted.size[1]}}
    return ViTImageProcessorPil(
        **geometry,
        image_mean=list(wanted.mean),
        image_std=list(wanted.std),
        resample=wanted.resample,
        do_convert_rgb=wanted.channels == 3,
    )


def _size_of(size: Any, name: str, field: str) -> tuple[int, int] | int:
    """(height, width), or the shortest edge, of a processor's ``SizeDict``."""
    known = dict(size)
    if set(known) == {"height", "width"}:
        return int(known["height"]), int(known["width"])
    if set(known) == {"shortest_edge"}:
        return int(known["shortest_edge"])
    raise ValueError(
        f"{name}.{field} is {known}; expected height and width, or shortest_edge. "
        "Set one of these in preprocessor_config.json."
    )


def _mean_and_std(processor: Any, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for pixels in [0, 1], whatever range the processor itself normalises."""
    if processor.do_normalize:
        mean, std = _floats(processor.image_mean), _floats(processor.image_std)
    else:
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"{name}.rescale_factor is {factor}; expected a positive number, usually 1/255.")
    top = 255 * factor  # what white becomes before the normalisation
    if abs(top - 1) > 1e-6:  # a model that wants 0..255 or -1..1: the same numbers, from pixels in [0, 1]
        mean, std = tuple(value / top for value in mean), tuple(value / top for value in std)
    return mean, std


def _floats(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(float(value) for value in values)


def _pil_resample(resample: Any) -> int:
    """PIL's number of a filter; torchvision's enum (its processors may hold one) has the same names."""
    return int(resample) if isinstance(resample, int) else int(Image.Resampling[resample.name])


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
