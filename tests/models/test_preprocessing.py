"""Preprocessing against the image processors themselves, and the images that break naive conversions."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor

from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor, rgb_image
from tiny_models import FAMILIES, tiny_model

PLAIN = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": (16, 16), "resize": (16, 16)}


def random_image(height=37, width=51, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def processors():
    """Name -> image processor as the published checkpoints of each family have it, at small sizes."""
    small = {"size": {"height": 20, "width": 24}}
    shortest = {"size": {"shortest_edge": 22}, "crop_size": {"height": 16, "width": 16}}
    return {
        "vit": transformers.ViTImageProcessorPil(**small),
        "deit": transformers.DeiTImageProcessorPil(**small, crop_size={"height": 16, "width": 16}),
        "beit": transformers.BeitImageProcessorPil(**small),
        "dinov2": transformers.BitImageProcessorPil(**shortest, image_mean=[0.485, 0.456, 0.406]),
        "swin": transformers.ViTImageProcessorPil(**small, resample=3),
        "siglip": transformers.SiglipImageProcessorPil(**small),
        "clip": transformers.CLIPImageProcessorPil(**shortest),
        "crop larger than resized": transformers.CLIPImageProcessorPil(size={"shortest_edge": 9}, crop_size=17),
        "no resize, crop only": transformers.DeiTImageProcessorPil(do_resize=False, crop_size=18),
        "int size": transformers.ViTImageProcessorPil(size=18),
        "no normalisation": transformers.ViTImageProcessorPil(**small, do_normalize=False),
        "lanczos": transformers.ViTImageProcessorPil(**small, resample=1),
    }


@pytest.mark.parametrize("name", processors())
@pytest.mark.parametrize("shape", [(37, 51), (64, 23), (16, 16), (7, 5)])
def test_equals_the_processor_bit_for_bit(name, shape):
    processor = processors()[name]
    image = random_image(*shape)
    preprocessing = Preprocessing.from_processor(processor)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    pixels = preprocessing.pixels_from_image(image)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, *preprocessing.size) == expected.shape
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert torch.equal(preprocessing.normalize(pixels), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"image_mean": 0.25, "image_std": 0.75},
    ],
)
def test_other_ranges_are_the_same_numbers_from_pixels_in_0_1(settings):
    processor = transformers.ViTImageProcessorPil(size={"height": 20, "width": 24}, **settings)
    preprocessing = Preprocessing.from_processor(processor)
    pixels = preprocessing.pixels_from_image(random_image())
    expected = processor(random_image(), return_tensors="pt")["pixel_values"][0].float()
    assert pixels.max() <= 1
    torch.testing.assert_close(preprocessing.normalize(pixels), expected, rtol=1e-6, atol=1e-6)


def test_normalize_is_the_formula_and_denormalize_its_inverse():
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.25, 2.0), (2, 2), None)
    pixels = torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixel_values = preprocessing.normalize(pixels)
    by_hand = np.stack(
        [(pixels[:, i].numpy() - m) / s for i, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)])], 1
    )
    np.testing.assert_allclose(pixel_values.numpy(), by_hand, rtol=1e-12)
    torch.testing.assert_close(preprocessing.denormalize(pixel_values), pixels, rtol=1e-12, atol=1e-12)
    assert preprocessing.denormalize(torch.full((3, 1, 1), 9.0)).max() > 1  # not clipped


def test_size_replaces_the_geometry_and_leaves_a_fitting_image_alone():
    preprocessing = Preprocessing.from_processor(processors()["clip"])
    image = random_image(24, 24)
    untouched = preprocessing.pixels_from_image(image, size=(24, 24))
    assert torch.equal(untouched, torch.from_numpy(np.array(image).transpose(2, 0, 1)).float() / 255)
    squashed = preprocessing.pixels_from_image(random_image(), size=(10, 30))
    by_hand = np.array(random_image().resize((30, 10), Image.Resampling.BICUBIC))
    assert torch.equal(squashed, torch.from_numpy(by_hand.transpose(2, 0, 1)).float() / 255)


def test_every_mode_becomes_rgb():
    rgb = random_image(6, 4)
    grey = rgb.convert("L")
    assert np.array_equal(np.array(rgb_image(grey)), np.array(grey)[..., None].repeat(3, -1))
    transparent = Image.fromarray(np.dstack([np.array(rgb), np.full((6, 4), 7, np.uint8)]))
    assert transparent.mode == "RGBA"
    assert np.array_equal(np.array(rgb_image(transparent)), np.array(rgb))
    palette = rgb.quantize(16)
    assert np.array_equal(np.array(rgb_image(palette)), np.array(palette.convert("RGB")))
    palette.info["transparency"] = b"\x00\xff"  # Pillow warns about the direct conversion
    assert np.array_equal(np.array(rgb_image(palette)), np.array(rgb.quantize(16).convert("RGB")))
    for mode in ("1", "LA", "CMYK", "YCbCr", "HSV"):
        assert rgb_image(rgb.convert("L").convert("LA") if mode == "LA" else rgb.convert(mode)).mode == "RGB"


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode == "I;16"
        converted = np.array(rgb_image(image))
    expected = np.round(values / 257).astype(np.uint8)  # 65535 / 257 = 255
    assert np.array_equal(converted, expected[..., None].repeat(3, -1))


def test_a_greyscale_model_gets_one_channel():
    processor = transformers.ViTImageProcessorPil(size=12, image_mean=[0.3], image_std=[0.2])
    preprocessing = Preprocessing.from_processor(processor)
    grey = random_image(12, 12).convert("L")
    expected = processor(grey, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(preprocessing.normalize(preprocessing.pixels_from_image(grey)), expected)
    assert expected.shape == (1, 12, 12)


def test_a_made_processor_loads_by_auto_class_and_does_the_same(tmp_path):
    made = make_image_processor((20, 28), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resample=3)
    made.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    expected = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (20, 28), (20, 28), 3)
    assert Preprocessing.from_processor(made) == Preprocessing.from_processor(loaded) == expected
    grey = random_image().convert("L")  # pipelines convert by themselves, a script may not
    assert loaded(grey, return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 28)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_check_fits_lets_through_goes_through_the_model(family):
    model = tiny_model(family)
    Preprocessing(**PLAIN).check_fits(model.config)
    with torch.no_grad():
        assert model(pixel_values=torch.zeros(1, 3, 16, 16)).logits.shape == (1, 5)


@pytest.mark.parametrize("family", ["vit", "deit", "vit_msn", "siglip", "clip"])
def test_another_size_than_the_models_names_both(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=r"makes 24x32 images.*takes 16x16 .*\"height\": 16"):
        Preprocessing(**{**PLAIN, "size": (24, 32)}).check_fits(model.config)
    with pytest.raises((ValueError, RuntimeError)), torch.no_grad():  # SigLIP: only "size of tensor a (48) ..."
        model(pixel_values=torch.zeros(1, 3, 24, 32))


def test_models_that_follow_the_input_only_need_whole_patches():
    model = tiny_model("dinov2")
    Preprocessing(**{**PLAIN, "size": (24, 32)}).check_fits(model.config)
    with torch.no_grad():
        assert model(pixel_values=torch.zeros(1, 3, 24, 32)).logits.shape == (1, 5)
    with pytest.raises(ValueError, match="makes 18x16 images, which 4x4 patches of the dinov2 model do not divide"):
        Preprocessing(**{**PLAIN, "size": (18, 16)}).check_fits(model.config)
