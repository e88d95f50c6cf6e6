"""Random crops and flips, drawn for each image from a key of its own.

The draw depends on the key and nothing else: not on the batch, the worker, the process, or what was drawn before. So
a resumed run, a run on more processes, and a run with more workers see the same training images.
"""

import hashlib
import math
import operator
from dataclasses import dataclass

import numpy as np
from PIL import Image


def generator_for(*key: int | str) -> np.random.Generator:
    """A generator that is a function of the key: integers and strings, e.g. ``(seed, "epoch", 3, index)``."""
    return np.random.Generator(np.random.Philox(key=_digest(key)))


def seed_for(*key: int | str) -> int:
    """A seed in [0, 2**32) that is a function of the key, for libraries that want a number."""
    return _digest(key) % 2**32


def _digest(key: tuple[int | str, ...]) -> int:
    # operator.index, because a NumPy 3 must give what a Python 3 gives
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)
    return int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:16], "little")


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the image, resized to the model's size afterwards, and perhaps mirrored.

    ``scale`` is the range of the crop's area as a fraction of the image's, ``ratio`` the range of its width over its
    height before resizing, ``flip`` the probability of the mirror image. The defaults are torchvision's
    RandomResizedCrop and RandomHorizontalFlip. Digits and other images with a left and a right want ``flip=0``.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale}: expected (least, most) area fractions in (0, 1], e.g. (0.08, 1.0).")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio}: expected (least, most) width over height, e.g. (3 / 4, 4 / 3).")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip}: expected a probability in [0, 1].")

    def apply(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """The crop, mirrored or not, at the image's own resolution."""
        # Before the crop, which draws more or fewer numbers: whether an image is mirrored does not depend on its shape.
        mirrored = generator.random() < self.flip
        image = image.crop(self.box(image.width, image.height, generator))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the crop, as torchvision's RandomResizedCrop defines it.

        Ten tries of an area (uniform) and a ratio (uniform in its logarithm); when none fits inside the image, the
        largest centred crop with a ratio in range.
        """
        for _ in range(10):
            area = width * height * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(generator.integers(0, height - crop_height + 1))
                left = int(generator.integers(0, width - crop_width + 1))
                return left, top, left + crop_width, top + crop_height
        crop_width, crop_height = width, height
        if width / height < self.ratio[0]:
            crop_height = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            crop_width = max(1, round(height * self.ratio[1]))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height
