"""Tiny models and images for robustness tests; nothing is downloaded."""

import os
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.pixel_model import PixelModel

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)


SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16, "patch_size": 4}


@pytest.fixture
def make_vit():
    """Random ViTs for 16 px in float64, wrapped for pixels; their logits differ enough to be attacked."""

    def make(layers):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**SIZES, num_hidden_layers=layers, num_labels=10)).double()
        with torch.no_grad():
            model.classifier.weight.mul_(20)
        return PixelModel(model, MEAN, STD).eval()

    return make


@pytest.fixture
def tiny_vit(make_vit):
    return make_vit(2)


@pytest.fixture
def predicted(tiny_vit, pixels):
    """What ``tiny_vit`` says to ``pixels``."""
    with torch.no_grad():
        return tiny_vit(pixels).argmax(1)


@pytest.fixture
def left_as_it_was(tiny_vit):
    """A block that has to leave ``tiny_vit`` alone: in train mode but for a part, and one parameter not trained."""
    model = tiny_vit.train()
    model.model.classifier.eval()
    model.model.classifier.bias.requires_grad_(False)

    def state():
        return (
            [module.training for module in model.modules()],
            [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
            model.model.config._attn_implementation,
            {name: value.tolist() for name, value in model.state_dict().items()},
        )

    @contextmanager
    def check():
        before = state()
        try:
            yield
        finally:
            assert state() == before

    return check


class Linear(nn.Module):
    """logits = pixels . weight + bias, the model that closed forms know."""

    def __init__(self, classes=3, size=4, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (classes, 3, size, size)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(classes, dtype=torch.float64))

    def forward(self, pixels):
        return torch.einsum("bchw,kchw->bk", pixels.to(self.weight.dtype), self.weight) + self.bias


@pytest.fixture
def make_linear():
    return Linear


@pytest.fixture
def linear():
    return Linear()


@pytest.fixture
def pixels():
    """Six images of 16 px in [0, 1], some values at the ends."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64).mul(1.2).sub(0.1).clamp(0, 1)


@pytest.fixture(scope="session")
def foolbox():
    """The oracle for attacks. It imports git (absent on some machines) and, in 3.3.4, scipy.ndimage.filters."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox
        import foolbox.attacks
    return foolbox


class ListImages(ImageSet):
    """Images in memory; a test may change ``images``, ``labels`` and ``subset``."""

    def __init__(self, images, labels, size=16):
        self.images, self.labels = images, labels
        half, side = (0.5, 0.5, 0.5), (size, size)
        super().__init__(ArrayRows(images, labels), Preprocessing(half, half, side, side, Image.Resampling.BICUBIC))


def make_photo(size=32, seed=0):
    """A smooth colourful image with an edge: corruptions change it visibly."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 2, (3, 3))]
    image = 0.5 + 0.3 * np.stack(waves, -1)
    image[size // 4 : size // 2, size // 4 :] *= 0.4
    return Image.fromarray((image * 255).astype(np.uint8))


@pytest.fixture
def photo():
    return make_photo


@pytest.fixture
def images():
    """Thirteen photos of 32 px with labels 0 to 9."""
    return ListImages([make_photo(seed=s) for s in range(13)], [s % 10 for s in range(13)])
