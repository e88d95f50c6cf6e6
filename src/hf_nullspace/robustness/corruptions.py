"""Generated corruptions: 8-bit RGB images in, corrupted 8-bit RGB images of the same size out, before any resizing.

The functions are those of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich 2019), the images are not: the published
sets went through other tools. The result depends on (seed, image index, corruption, severity) and on nothing else.
"""

from typing import Any

import numpy as np
from PIL import Image

from hf_nullspace.core.settings import nearest
from hf_nullspace.robustness import corruption_functions as functions
from hf_nullspace.robustness.corruption_functions import from_image, to_image

SMALL = 64  # px; the longer side up to which CIFAR-10-C's severities apply
SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)

# Severity 1 to 5 for small images (CIFAR-10-C) and for large ones (ImageNet-C).
CIFAR: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": tuple(np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
IMAGENET: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}


def check_cell(corruption: str, severity: int) -> None:
    """Raise ``ValueError`` unless it is one of the fifteen corruptions at a severity 1 to 5 (an int)."""
    if corruption not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {corruption!r}{nearest(corruption, CORRUPTIONS)}")
    if type(severity) is not int or severity not in SEVERITIES:
        raise ValueError(f"severity={severity!r} of {corruption}: expected 1 to 5")


def corrupt(image: Image.Image, corruption: str, severity: int, *, seed: int, index: int) -> Image.Image:
    """``image`` (PIL, RGB) with ``corruption`` at ``severity`` 1 to 5; ``index`` is the image's place in its set.

    Raises ``ValueError`` for an image that is not RGB, an unknown corruption or severity, and ``ImportError`` where the
    corruption needs a library that is not installed.
    """
    if image.mode != "RGB":
        raise ValueError(f"corruptions act on RGB images, got mode {image.mode!r}; convert it first")
    check_cell(corruption, severity)
    rng = np.random.default_rng([seed, index, CORRUPTIONS.index(corruption), severity])
    table = CIFAR if max(image.size) <= SMALL else IMAGENET
    if corruption not in table:
        return library_corrupt(image, corruption, severity, int(rng.integers(2**31)))
    function = getattr(functions, corruption)
    return to_image(function(from_image(image), table[corruption][severity - 1], rng))


def library_corrupt(image: Image.Image, corruption: str, severity: int, seed: int) -> Image.Image:
    """ImageNet-C's blurs, weather and elastic for a large image, through imagecorruptions-imaug.

    The library draws from NumPy's global generator (glass_blur from a seed of its own), seeded for the call alone.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        needs = f"{corruption} for images larger than {SMALL} px needs imagecorruptions-imaug"
        raise ImportError(f"{needs}: pip install 'hf-nullspace[corruptions]'") from error
    if min(image.size) < 32:
        raise ValueError(f"{corruption} needs images of at least 32 px, got {image.width}x{image.height}")
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        own_seed = {"seed": seed} if corruption == "glass_blur" else {}
        array = imagecorruptions.corrupt(np.asarray(image), severity, corruption, **own_seed)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return Image.fromarray(array)
