"""Generated corruptions: what each one is supposed to do, written out, and determinism."""

import sys

import imagecorruptions
import numpy as np
import pytest
from PIL import Image

from hf_nullspace.robustness.corruptions import CIFAR, CORRUPTIONS, IMAGENET, SMALL, corrupt

DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def values(image):
    return np.asarray(image, dtype=float) / 255


def grey(level, size=32):
    return Image.new("RGB", (size, size), (level, level, level))


@pytest.mark.parametrize("size", [32, 72])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_deterministic_per_seed_image_and_severity_and_not_by_order(name, size, photo):
    image = photo(size)
    untouched = np.array(image)
    first = np.array(corrupt(image, name, 3, seed=1, index=5))
    corrupt(image, name, 2, seed=9, index=1)
    np.random.default_rng(0).random(7)
    again = np.array(corrupt(image, name, 3, seed=1, index=5))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(np.array(image), untouched)
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    assert (first != untouched).any()
    others = [corrupt(image, name, 3, seed=seed, index=index) for seed, index in [(2, 5), (1, 6)]]
    assert all((np.array(other) == first).all() == (name in DETERMINISTIC) for other in others)


@pytest.mark.parametrize(("size", "table"), [(SMALL, CIFAR), (SMALL + 1, IMAGENET)])
def test_noise_has_the_variance_of_its_table(size, table):
    for severity in (1, 2):
        noisy = values(corrupt(grey(128, size), "gaussian_noise", severity, seed=0, index=0))
        assert noisy.std() == pytest.approx(table["gaussian_noise"][severity - 1], rel=0.03)
        noisy = values(corrupt(grey(51, size), "shot_noise", severity, seed=0, index=0))
        assert noisy.mean() == pytest.approx(0.2, abs=0.005)
        assert noisy.var() == pytest.approx(0.2 / table["shot_noise"][severity - 1], rel=0.1)
        noisy = values(corrupt(grey(128, size), "impulse_noise", severity, seed=0, index=0))
        share = table["impulse_noise"][severity - 1] / 2
        for extreme in (0.0, 1.0):
            assert (noisy == extreme).mean() == pytest.approx(share, abs=4 * np.sqrt(share / noisy.size))


@pytest.mark.parametrize("name", ["brightness", "contrast", "pixelate", "jpeg_compression"])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_large_images_follow_the_library(photo, name, severity):
    image = photo(96)
    expected = imagecorruptions.corrupt(np.asarray(image), severity, name).astype(int)
    got = np.asarray(corrupt(image, name, severity, seed=0, index=0)).astype(int)
    assert np.abs(got - expected).max() <= 1


def test_black_pixels_become_brighter_without_a_hue():
    black = values(corrupt(grey(0), "brightness", 5, seed=0, index=0))
    np.testing.assert_allclose(black, 0.3, atol=1 / 255)


@pytest.mark.parametrize("name", ["glass_blur", "snow"])
def test_a_large_image_has_its_seed_from_run_image_corruption_and_severity(photo, name):
    """Written out: other draws would be other images under the same name."""
    image = photo(72)
    seed = int(np.random.default_rng([7, 5, CORRUPTIONS.index(name), 2]).integers(2**31))
    if name == "glass_blur":
        expected = imagecorruptions.corrupt(np.asarray(image), 2, name, seed=seed)
    else:
        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        expected = imagecorruptions.corrupt(np.asarray(image), 2, name)
        np.random.set_state(before)  # noqa: NPY002
    np.testing.assert_array_equal(np.asarray(corrupt(image, name, 2, seed=7, index=5)), expected)


def test_the_librarys_generator_is_put_back_and_its_absence_named(photo, monkeypatch):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    corrupt(photo(80), "fog", 2, seed=0, index=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    with pytest.raises(ValueError, match="at least 32 px, got 80x20"):
        corrupt(photo(80).resize((80, 20)), "fog", 2, seed=0, index=0)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match=r"hf-nullspace\[corruptions\]"):
        corrupt(photo(80), "fog", 2, seed=0, index=0)


@pytest.mark.parametrize("size", [(64, 64), (8, 8), (17, 60), (33, 200), (200, 120)])
def test_any_size_and_shape(photo, size, capsys):
    image = photo(64).resize(size)
    for name in CORRUPTIONS:
        for index in range(6):  # every overlay of frost
            assert corrupt(image, name, 1 + index % 5, seed=0, index=index).size == size
    assert capsys.readouterr().out == ""
