"""Pixels in, logits out: one normalisation, and nothing but [0, 1] gets through."""

import numpy as np
import pytest
import torch

from hf_nullspace.robustness.pixel_model import PixelModel


def test_it_normalises_exactly_once(tiny_vit, pixels):
    mean, std = np.array(tiny_vit.mean), np.array(tiny_vit.std)
    normalised = (pixels.numpy() - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = tiny_vit.model(torch.from_numpy(normalised)).logits
        torch.testing.assert_close(tiny_vit(pixels), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [-1e-6, 1 + 1e-6, float("nan"), float("inf"), 255.0])
def test_values_outside_the_unit_interval_are_an_error(tiny_vit, pixels, bad):
    pixels[3, 1, 2, 5] = bad
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        tiny_vit(pixels)


def test_logits_are_float32_whatever_the_model_computes_in(tiny_vit, pixels):
    exact = tiny_vit(pixels).detach()
    assert exact.dtype == torch.float64
    single = PixelModel(tiny_vit.model.float(), tiny_vit.mean, tiny_vit.std)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = single(pixels.float())
    half = PixelModel(tiny_vit.model.bfloat16(), tiny_vit.mean, tiny_vit.std)(pixels.float())
    for logits in (mixed, half):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), exact, rtol=0.1, atol=0.1)


def test_gradients_reach_the_pixels_in_bf16(tiny_vit, pixels):
    half = PixelModel(tiny_vit.model.bfloat16(), tiny_vit.mean, tiny_vit.std)
    pixels = pixels.float().requires_grad_()
    (gradient,) = torch.autograd.grad(half(pixels).sum(), pixels)
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0


def test_it_accepts_a_module_that_returns_plain_logits(linear, pixels):
    model = PixelModel(linear, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    torch.testing.assert_close(model(pixels[..., :4, :4]), linear(pixels[..., :4, :4]))


def test_columns_put_logits_into_another_order(tiny_vit, pixels):
    picked = PixelModel(tiny_vit.model, tiny_vit.mean, tiny_vit.std, columns=[7, 0, 3])
    torch.testing.assert_close(picked(pixels), tiny_vit(pixels)[:, [7, 0, 3]], rtol=0, atol=0)
