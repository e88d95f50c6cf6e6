"""AugMix, TrivialAugment, mixup and CutMix of ``torchvision.transforms.v2``, drawn for each image from its own key.

torchvision draws from torch's global generator; here it draws from a seed, and the generator is as before afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_nullspace.core.settings import nearest

OF_ONE_IMAGE = ("augmix", "trivialaugment")
OF_TWO_IMAGES = ("mixup", "cutmix")


@dataclass(frozen=True)
class Transforms:
    """What ``names``, joined by "+", do to training images; all settings but one are torchvision's defaults.

    ``augmix`` (Hendrycks et al. 2020) and ``trivialaugment`` (TrivialAugmentWide; Müller and Hutter 2021) change one
    image, at the size of the model's input, one after the other as they are named. AugMix has the published operations:
    shear, translation, rotation, posterize, solarize, autocontrast, equalize. It leaves out brightness, colour,
    contrast and sharpness (``all_ops=False``), which corruptions that are measured resemble; TrivialAugment has them.

    ``mixup`` (Zhang et al. 2018) and ``cutmix`` (Yun et al. 2019) join an image with another one: lambda x + (1 -
    lambda) x', or a box of x' in x, and the labels become class probabilities in the same proportion. lambda is drawn
    for every image, from Beta(1, 1). If both are named, each image gets one of them, at random.

    Raises:
        ValueError: for a name that is not known, or is repeated.
        ImportError: if torchvision is not installed.
    """

    names: str

    def __post_init__(self) -> None:
        names = self.names.split("+")
        for name in names:
            if name not in OF_ONE_IMAGE + OF_TWO_IMAGES:
                known = nearest(name, OF_ONE_IMAGE + OF_TWO_IMAGES)
                raise ValueError(f"augmentation={self.names!r}: expected a name, or several joined by '+'{known}")
        if len(set(names)) < len(names):
            raise ValueError(f"augmentation={self.names!r}: one is repeated")
        try:
            from torchvision.transforms import v2  # noqa: F401
        except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
            raise ImportError(
                f"augmentation={self.names!r} needs the torchvision that fits torch {torch.__version__}: "
                f"pip install 'hf-nullspace[vision]' ({error})"
            ) from error

    @property
    def mixes(self) -> bool:
        """Whether an image is joined with another one."""
        return not set(OF_TWO_IMAGES).isdisjoint(self.names.split("+"))

    def change(self, pixels: Tensor, seed: int) -> Tensor:
        """Pixels (C, H, W), float32 in [0, 1], of one image -> changed ones of 256 levels, as ``seed`` draws them."""
        one, _ = _transforms(self.names, None)
        if one is None:
            return pixels
        with _draws_of(seed):
            changed: Tensor = one((pixels * 255).round().to(torch.uint8))
        return changed / 255

    def mix(self, images: Tensor, labels: Tensor, num_labels: int, seed: int) -> tuple[Tensor, Tensor]:
        """The first of two ``images`` (2, C, H, W) with ``labels`` (2,), joined with the second as ``seed`` draws it.

        Returns:
            The image (C, H, W), and its class probabilities (num_labels,), float32.
        """
        _, two = _transforms(self.names, num_labels)
        with _draws_of(seed):
            mixed, probabilities = two(images, labels)
        return mixed[0], probabilities[0]


@cache
def _transforms(names: str, num_labels: int | None) -> tuple[Any, Any]:
    """torchvision's transform of one image, and that of a batch; None where ``names`` have none."""
    from torchvision.transforms import v2

    make = {
        "augmix": lambda: v2.AugMix(all_ops=False),
        "trivialaugment": v2.TrivialAugmentWide,
        "mixup": lambda: v2.MixUp(num_classes=num_labels),
        "cutmix": lambda: v2.CutMix(num_classes=num_labels),
    }
    one, two = ([make[name]() for name in names.split("+") if name in kind] for kind in (OF_ONE_IMAGE, OF_TWO_IMAGES))
    return v2.Compose(one) if one else None, v2.RandomChoice(two) if two else None


@contextmanager
def _draws_of(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well, and leave them so
        yield
