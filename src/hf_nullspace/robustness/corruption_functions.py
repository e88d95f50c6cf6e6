"""The fifteen corruptions of Hendrycks & Dietterich (2019) as functions (pixels, strength, rng) -> pixels.

Pixels are (H, W, 3) float64 in [0, 1]; results may leave that range, the caller clips. ``strength`` is what a row of
the tables in ``corruptions.py`` holds. Blurs, weather and elastic need SciPy, frost the overlays of the optional
library imagecorruptions-imaug.
"""

import io
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Float = NDArray[np.float64]
Rng = np.random.Generator


def to_image(pixels: Float) -> Image.Image:
    """8-bit image; truncated like the published sets, but a value that is 8-bit up to rounding stays what it is."""
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 1e-6).astype(np.uint8))


def from_image(image: Image.Image) -> Float:
    return np.asarray(image, dtype=np.float64) / 255


def gaussian_noise(pixels: Float, scale: float, rng: Rng) -> Float:
    return pixels + scale * rng.standard_normal(pixels.shape)


def shot_noise(pixels: Float, photons: float, rng: Rng) -> Float:
    return rng.poisson(pixels * photons) / photons


def impulse_noise(pixels: Float, amount: float, rng: Rng) -> Float:
    """Salt and pepper, each value of each channel on its own."""
    flipped, salt = rng.random((2, *pixels.shape))
    return np.where(flipped < amount, (salt < 0.5).astype(np.float64), pixels)


def defocus_blur(pixels: Float, strength: tuple[float, float], rng: Rng) -> Float:
    """A disk of ``radius``, its edge smoothed by a 3x3 (for large disks 5x5) Gaussian."""
    radius, smoothing = strength
    reach = 8 if radius <= 8 else int(radius)
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    side = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    edge = np.exp(-(side**2) / (2 * smoothing**2))
    kernel = disk / disk.sum()
    for axis in (0, 1):
        kernel = ndimage().correlate1d(kernel, edge / edge.sum(), axis=axis, mode="mirror")
    return ndimage().correlate(pixels, kernel[..., None], mode="mirror")


def glass_blur(pixels: Float, strength: tuple[float, int, int], rng: Rng) -> Float:
    """Blur, let each pixel take the value of a random neighbour, blur again.

    The authors meant to swap the two pixels; with their views of one array the neighbour keeps its value, and so here.
    """
    sigma, reach, rounds = strength
    shuffled = from_image(to_image(smooth(pixels, sigma)))
    rows, columns = pixels.shape[:2]
    offsets = rng.integers(-reach, reach, size=(rounds, rows, columns, 2))
    for offset in offsets:
        for row in range(rows - reach, reach, -1):
            for column in range(columns - reach, reach, -1):
                down, right = offset[row - 1, column - 1]
                shuffled[row, column] = shuffled[row + down, column + right]
    return smooth(shuffled, sigma)


def motion_blur(pixels: Float, strength: tuple[int, float], rng: Rng) -> Float:
    return directed_blur(pixels, *strength, angle=rng.uniform(-45, 45))


def zoom_blur(pixels: Float, factors: NDArray[np.float64], rng: Rng) -> Float:
    total = pixels + sum(zoomed(pixels, factor) for factor in factors)
    return total / (len(factors) + 1)


def snow(pixels: Float, strength: tuple[float, ...], rng: Rng) -> Float:
    mean, scale, zoom, threshold, radius, sigma, keep = strength
    flakes = zoomed(rng.normal(mean, scale, pixels.shape[:2])[..., None], zoom)[..., 0]
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    layer = directed_blur(flakes[..., None], int(radius), sigma, angle=rng.uniform(-135, -45))
    layer = np.round(layer * 255) / 255
    grey = (pixels @ [0.299, 0.587, 0.114])[..., None]
    return keep * pixels + (1 - keep) * np.maximum(pixels, grey * 1.5 + 0.5) + layer + np.rot90(layer, 2)


def frost(pixels: Float, strength: tuple[float, float], rng: Rng) -> Float:
    """A random crop of one of the first five overlays, which are shrunk to a fifth for small images."""
    overlay = frost_overlays()[rng.integers(5)]
    lacking = [max(0, want + 1 - have) for have, want in zip(overlay.shape[:2], pixels.shape[:2], strict=True)]
    overlay = np.pad(overlay, ((0, lacking[0]), (0, lacking[1]), (0, 0)), mode="reflect")  # for images beyond 32 px
    top, left = (rng.integers(have - want) for have, want in zip(overlay.shape[:2], pixels.shape[:2], strict=True))
    crop = overlay[top : top + pixels.shape[0], left : left + pixels.shape[1]]
    return strength[0] * pixels + strength[1] * crop


def fog(pixels: Float, strength: tuple[float, float], rng: Rng) -> Float:
    thickness, decay = strength
    rows, columns = pixels.shape[:2]
    side = 1 << (max(rows, columns) - 1).bit_length()
    mist = pixels + thickness * plasma(side, decay, rng)[:rows, :columns, None]
    return mist * pixels.max() / (pixels.max() + thickness)


def brightness(pixels: Float, amount: float, rng: Rng) -> Float:
    """Raise the value of HSV and keep hue and saturation: all channels times the same factor."""
    value = pixels.max(axis=-1, keepdims=True)
    raised = np.minimum(value + amount, 1)
    return np.where(value > 0, pixels * raised / np.where(value > 0, value, 1), raised)


def contrast(pixels: Float, factor: float, rng: Rng) -> Float:
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return (pixels - mean) * factor + mean


def elastic_transform(pixels: Float, strength: tuple[float, float, float], rng: Rng) -> Float:
    """A random affine map, then a smooth random displacement; all three numbers in units of the shorter side."""
    rows, columns = pixels.shape[:2]
    reach, sigma, jitter = (min(rows, columns) * value for value in strength)
    third = min(rows, columns) // 3
    middle = np.array([rows, columns]) // 2
    corners = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y), as OpenCV counts
    moved = corners + rng.uniform(-jitter, jitter, (3, 2))
    matrix = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T  # from where each (x, y, 1) comes
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float64)
    source = matrix @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    warped = sample(pixels, source[1].reshape(x.shape), source[0].reshape(x.shape), "mirror")
    if not reach:
        return warped
    push = [ndimage().gaussian_filter(rng.uniform(-1, 1, x.shape), sigma, mode="reflect", truncate=3) for _ in "xy"]
    return sample(warped, y + reach * push[1], x + reach * push[0], "reflect")


def pixelate(pixels: Float, factor: float, rng: Rng) -> Float:
    image = to_image(pixels)
    small = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    return from_image(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def jpeg_compression(pixels: Float, quality: int, rng: Rng) -> Float:
    with io.BytesIO() as file:
        to_image(pixels).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            return from_image(image)


def smooth(pixels: Float, sigma: float) -> Float:
    return ndimage().gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest", truncate=4)


def sample(pixels: Float, rows: Float, columns: Float, border: str) -> Float:
    """Bilinear values of each channel at fractional positions."""
    channels = [
        ndimage().map_coordinates(pixels[..., c], [rows, columns], order=1, mode=border) for c in range(pixels.shape[2])
    ]
    return np.stack(channels, axis=-1)


def zoomed(pixels: Float, factor: float) -> Float:
    """The middle of the image, enlarged bilinearly and cut to the image's size."""
    rows, columns = pixels.shape[:2]
    keep = [int(np.ceil(side / factor)) for side in (rows, columns)]
    top, left = (rows - keep[0]) // 2, (columns - keep[1]) // 2
    large = ndimage().zoom(pixels[top : top + keep[0], left : left + keep[1]], (factor, factor, 1), order=1)
    top, left = (large.shape[0] - rows) // 2, (large.shape[1] - columns) // 2
    return large[top : top + rows, left : left + columns]


def directed_blur(pixels: Float, radius: int, sigma: float, *, angle: float) -> Float:
    """Blur along ``angle`` (degrees) with half a Gaussian of 2 * radius + 1 values; the border is repeated."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    down, right = (np.ceil(steps * f(np.deg2rad(angle)) - 0.5).astype(int) for f in (np.sin, np.cos))
    rows, columns = (np.arange(side) for side in pixels.shape[:2])
    blurred = np.zeros_like(pixels)
    for weight, dy, dx in zip(weights / weights.sum(), down, right, strict=True):
        y, x = np.clip(rows + dy, 0, rows[-1]), np.clip(columns + dx, 0, columns[-1])
        blurred += weight * pixels[y[:, None], x]
    return blurred


def plasma(side: int, decay: float, rng: Rng) -> Float:
    """Diamond-square height map (Fournier et al. 1982) of ``side`` x ``side`` (a power of two), periodic, in [0, 1]."""
    heights = np.zeros((side, side))
    step, roughness = side, 100.0

    def jittered(corners: Float) -> Float:
        return corners / 4 + roughness * rng.uniform(-roughness, roughness, corners.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = jittered(pairs + np.roll(pairs, -1, 1))
        centres = heights[half::step, half::step]
        above = centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1)
        heights[::step, half::step] = jittered(above)
        beside = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0)
        heights[half::step, ::step] = jittered(beside)
        step, roughness = half, roughness / decay
    heights -= heights.min()
    return heights / heights.max()


@lru_cache
def frost_overlays() -> list[Float]:
    spec = find_spec("imagecorruptions")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("frost needs the overlays of imagecorruptions-imaug: pip install 'hf-nullspace[corruptions]'")
    folder = Path(next(iter(spec.submodule_search_locations))) / "frost"
    overlays = []
    for name in ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg"):
        with Image.open(folder / name) as file:
            image = file.convert("RGB")
        large = from_image(image)
        rows, columns = (round(side / 5) for side in large.shape[:2])
        y, x = ((np.arange(count) + 0.5) * 5 - 0.5 for count in (rows, columns))
        overlays.append(sample(large, *np.meshgrid(y, x, indexing="ij"), "nearest"))
    return overlays


def ndimage() -> ModuleType:
    try:
        from scipy import ndimage as module
    except ImportError as error:
        raise ImportError("blurs, weather and elastic need SciPy: pip install 'hf-nullspace[corruptions]'") from error
    return module
