"""Each function against the libraries that the published sets were made with, on the same random draws."""

import cv2
import numpy as np
import pytest
import torch
from imagecorruptions import corruptions as library
from skimage.filters import gaussian

from hf_nullspace.robustness import corruption_functions as functions
from hf_nullspace.robustness.corruptions import CIFAR


@pytest.fixture
def x(photo):
    return np.asarray(photo(32), dtype=np.float64) / 255


class Draws:
    """A generator that remembers what it gave, so that an oracle can be handed the same numbers."""

    def __init__(self, seed=0):
        self.rng, self.given = np.random.default_rng(seed), []

    def __getattr__(self, name):
        def draw(*args, **kwargs):
            self.given.append(getattr(self.rng, name)(*args, **kwargs))
            return self.given[-1]

        return draw


@pytest.mark.parametrize(("radius", "smoothing"), [*CIFAR["defocus_blur"], (3, 0.1), (6, 0.5), (8, 0.5), (10, 0.5)])
def test_defocus_is_opencvs_filter(x, radius, smoothing):
    kernel = library.disk(radius, smoothing)
    expected = np.stack([cv2.filter2D(x[..., c], -1, kernel) for c in range(3)], axis=-1)
    np.testing.assert_allclose(functions.defocus_blur(x, (radius, smoothing), None), expected, atol=1e-5)


@pytest.mark.parametrize(("radius", "sigma"), CIFAR["motion_blur"])
@pytest.mark.parametrize("angle", [-45, -20.5, 0, 33, 45, -135, -90, -60])
def test_motion_is_the_librarys(x, radius, sigma, angle):
    expected = library._motion_blur(x, radius, sigma, angle)
    np.testing.assert_allclose(functions.directed_blur(x, radius, sigma, angle=angle), expected, atol=1e-6)


def torch_zoom(x, factor):
    keep = int(np.ceil(32 / factor))
    top = (32 - keep) // 2
    crop = torch.from_numpy(x[top : top + keep, top : top + keep]).permute(2, 0, 1)[None]
    size = round(keep * factor)
    large = torch.nn.functional.interpolate(crop, size=(size, size), mode="bilinear", align_corners=True)
    top = (size - 32) // 2
    return large[0, :, top : top + 32, top : top + 32].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("factors", CIFAR["zoom_blur"])
def test_zoom_is_torchs_interpolation(x, factors):
    expected = (x + sum(torch_zoom(x, factor) for factor in factors)) / (len(factors) + 1)
    np.testing.assert_allclose(functions.zoom_blur(x, factors, None), expected, atol=1e-9)


def test_zoom_factors_are_those_of_the_table():
    """Rounding lets the authors' arange reach its end for the first two; the published set has that too."""
    assert [len(factors) for factors in CIFAR["zoom_blur"]] == [7, 12, 16, 21, 26]
    assert CIFAR["zoom_blur"][4][-1] == pytest.approx(1.25)


@pytest.mark.parametrize(("sigma", "reach", "rounds"), CIFAR["glass_blur"])
def test_glass_is_the_published_loop(x, sigma, reach, rounds):
    """The authors' loop on one array of pixels, where the tuple assignment copies instead of swapping."""
    draws = Draws()
    got = functions.glass_blur(x, (sigma, reach, rounds), draws)
    image = np.uint8(gaussian(x, sigma=sigma, channel_axis=-1) * 255 + 1e-6)
    for i in range(rounds):
        for h in range(32 - reach, reach, -1):
            for w in range(32 - reach, reach, -1):
                dy, dx = draws.given[0][i, h - 1, w - 1]
                image[h, w], image[h + dy, w + dx] = image[h + dy, w + dx], image[h, w]
    expected = gaussian(image / 255, sigma=sigma, channel_axis=-1)
    np.testing.assert_allclose(got, expected, atol=1e-9)
    assert draws.given[0].min() >= -reach
    assert draws.given[0].max() < reach


@pytest.mark.parametrize("decay", [1.75, 3])
def test_plasma_is_the_librarys(decay, monkeypatch):
    got = functions.plasma(32, decay, np.random.default_rng(5))
    monkeypatch.setattr(library.np.random, "uniform", np.random.default_rng(5).uniform)
    np.testing.assert_allclose(got, library.plasma_fractal(32, decay), atol=1e-5)


def test_fog_keeps_the_brightest_value(x):
    for strength in CIFAR["fog"]:
        foggy = functions.fog(x, strength, np.random.default_rng(0))
        assert foggy.max() <= x.max() + 1e-12
        assert foggy.std() < x.std()


@pytest.mark.parametrize("strength", CIFAR["snow"])
def test_snow_on_a_flat_image_is_brighter_grey_plus_flakes(strength):
    draws = Draws()
    flat = np.full((32, 32, 3), 0.2)
    keep = strength[-1]
    flakes = functions.snow(flat, strength, draws) - (keep * 0.2 + (1 - keep) * (0.2 * 1.5 + 0.5))
    layer, angle = draws.given
    assert -135 <= angle <= -45
    layer = functions.zoomed(layer[..., None], strength[2])[..., 0]
    layer = np.clip(np.where(layer < strength[3], 0, layer), 0, 1)
    layer = library._motion_blur(layer, strength[4], strength[5], angle)
    np.testing.assert_allclose(flakes[..., 0], layer + np.rot90(layer, 2), atol=2.1 / 255)


def test_frost_is_a_crop_of_an_overlay(x):
    draws = Draws(3)
    frosted = functions.frost(x, (0.75, 0.45), draws)
    which, top, left = draws.given
    file = ["frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg"][which]
    overlay = cv2.imread(str(library.importlib.resources.files("imagecorruptions") / "frost" / file))
    small = cv2.resize(overlay, (0, 0), fx=0.2, fy=0.2)[top : top + 32, left : left + 32, ::-1] / 255
    np.testing.assert_allclose(frosted, 0.75 * x + 0.45 * small, atol=0.45 * 2 / 255)


@pytest.mark.parametrize("strength", CIFAR["elastic_transform"])
def test_elastic_is_opencvs_affine_and_a_smooth_push(x, strength):
    draws = Draws()
    got = functions.elastic_transform(x, strength, draws)
    jitter = draws.given[0]
    corners = np.float32([[26, 26], [26, 6], [6, 6]])
    matrix = cv2.getAffineTransform(corners, corners + np.float32(jitter))
    expected = cv2.warpAffine(x, matrix, (32, 32), borderMode=cv2.BORDER_REFLECT_101)
    if strength[0]:
        push = [
            gaussian(draws.given[i], sigma=32 * strength[1], mode="reflect", truncate=3) * 32 * strength[0]
            for i in (1, 2)
        ]
        rows, columns = np.mgrid[0:32, 0:32]
        expected = functions.sample(expected, rows + push[1], columns + push[0], "reflect")
    assert np.abs(jitter).max() <= 32 * strength[2]
    assert np.abs(got - x).mean() > 0.01
    assert np.abs(got - expected).mean() < 0.003  # OpenCV rounds positions to 1/32 px
    assert np.abs(got - expected).max() < 0.05


def test_what_is_missing_is_named(x, monkeypatch):
    functions.frost_overlays.cache_clear()
    monkeypatch.setattr(functions, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"frost needs the overlays .*hf-nullspace\[corruptions\]"):
        functions.frost(x, (1, 0.2), np.random.default_rng(0))
    functions.frost_overlays.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(ImportError, match=r"need SciPy: pip install 'hf-nullspace\[corruptions\]'"):
        functions.zoom_blur(x, [1.1], np.random.default_rng(0))
