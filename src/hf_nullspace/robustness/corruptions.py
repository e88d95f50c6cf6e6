"""Generated corruptions: 8-bit RGB images in, corrupted 8-bit RGB images of the same size out.

The recipes are those of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich 2019), the images are not: the published sets
went through other tools. So a set made here is called "generated", never "ImageNet-C".

An image whose longer side is at most 64 px gets CIFAR-10-C's severities, a larger one ImageNet-C's. A corruption acts
at the image's own size, before any resizing for the model. The result depends on (seed, image index, corruption,
severity) and on nothing else: not on the order, the batch or the process.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALL = 64  # px; the longer side up to which CIFAR-10-C's severities apply
SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)

# Severity 1 to 5 for small images (CIFAR-10-C) and for large ones (ImageNet-C).
CIFAR = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
IMAGENET = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}

Float = NDArray[np.float64]


def corrupt(image: Image.Image, corruption: str, severity: int, *, seed: int, index: int) -> Image.Image:
    """``image`` (PIL, RGB) with ``corruption`` at ``severity`` 1 to 5; ``index`` is the image's place in its set.

    Raises ``ValueError`` for an image that is not RGB, an unknown corruption or severity.
    """
    if image.mode != "RGB":
        raise ValueError(f"corruptions act on RGB images, got mode {image.mode!r}; convert it first")
    if corruption not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {corruption!r}; the 15 are {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}; expected 1 to 5")
    table = CIFAR if max(image.size) <= SMALL else IMAGENET
    if corruption not in table:
        raise NotImplementedError(f"{corruption} is not generated for images of {image.width}x{image.height} px yet")
    rng = np.random.default_rng([seed, index, CORRUPTIONS.index(corruption), severity])
    pixels = np.asarray(image, dtype=np.float64) / 255
    corrupted = FUNCTIONS[corruption](pixels, table[corruption][severity - 1], rng)
    return to_image(corrupted)


def to_image(pixels: Float) -> Image.Image:
    """8-bit image; truncated like the published sets, but a value that is 8-bit up to rounding stays what it is."""
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 1e-6).astype(np.uint8))


def gaussian_noise(pixels: Float, scale: float, rng: np.random.Generator) -> Float:
    return pixels + scale * rng.standard_normal(pixels.shape)


def shot_noise(pixels: Float, photons: float, rng: np.random.Generator) -> Float:
    return rng.poisson(pixels * photons) / photons


def impulse_noise(pixels: Float, amount: float, rng: np.random.Generator) -> Float:
    """Salt and pepper, each value of each channel on its own."""
    flipped, salt = rng.random((2, *pixels.shape))
    return np.where(flipped < amount, (salt < 0.5).astype(np.float64), pixels)


def brightness(pixels: Float, amount: float, rng: np.random.Generator) -> Float:
    """Raise the value of HSV and keep hue and saturation: all channels times the same factor."""
    value = pixels.max(axis=-1, keepdims=True)
    raised = np.minimum(value + amount, 1)
    return np.where(value > 0, pixels * raised / np.where(value > 0, value, 1), raised)


def contrast(pixels: Float, factor: float, rng: np.random.Generator) -> Float:
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return (pixels - mean) * factor + mean


def pixelate(pixels: Float, factor: float, rng: np.random.Generator) -> Float:
    image = to_image(pixels)
    small = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    return from_image(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def jpeg_compression(pixels: Float, quality: int, rng: np.random.Generator) -> Float:
    with io.BytesIO() as file:
        to_image(pixels).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            return from_image(image)


def from_image(image: Image.Image) -> Float:
    return np.asarray(image, dtype=np.float64) / 255


FUNCTIONS: dict[str, Callable[..., Float]] = {
    function.__name__: function
    for function in (gaussian_noise, shot_noise, impulse_noise, brightness, contrast, pixelate, jpeg_compression)
}
