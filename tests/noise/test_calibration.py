"""Scaling a noise to a wanted influence, against SciPy's root finder and on real models."""

import itertools
import math

import pytest
import scipy.optimize
import torch

from hf_nullspace.models.patch_embedding import embedding_shape, patch_embedding_noise
from hf_nullspace.noise.algorithm1 import start_noise
from hf_nullspace.noise.calibration import NoiseNotCalibratedError, calibrate, scale_into, scale_to_influence
from tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.03, 0.3])
@pytest.mark.parametrize("start", [1e-3, 1.0, 300.0])
def test_the_factor_is_scipys_root(epsilon, start):
    def influence(factor):
        return factor**2 / (1 + factor**2)

    factor, found, _ = scale_to_influence(influence, epsilon, start=start, tolerance=1e-6)
    assert found == influence(factor)
    assert factor == pytest.approx(scipy.optimize.brentq(lambda f: influence(f) - epsilon, 0, 100), rel=1e-5)


def test_a_curve_that_is_not_monotone_is_crossed():
    def influence(factor):
        return factor * (1.5 + torch.sin(torch.tensor(20 * factor)).item()) / 10

    for start in (0.01, 1.0, 50.0):
        assert scale_to_influence(influence, 0.1, start=start)[1] == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("start", [1.0, 1e9])
def test_a_long_plateau_beside_epsilon_is_crossed(start):
    def influence(factor):
        return 0.027 * min(factor, 1.0) + min(1e-7 * factor, 0.006)

    assert scale_to_influence(influence, 0.03, start=start)[1] == pytest.approx(0.03, rel=0.02)


def test_forward_passes_are_few():
    asked = []
    scale_to_influence(lambda factor: asked.append(factor) or (factor / 37) ** 2, 0.03)
    assert len(asked) == scale_to_influence(lambda factor: (factor / 37) ** 2, 0.03)[2] < 15


@pytest.mark.parametrize("largest", [3.0, 10.0, 37.0])
@pytest.mark.parametrize("start", [0.01, 1.0, 50.0])
def test_no_factor_is_larger_than_allowed(largest, start):
    """Not asked for while bracketing, and the largest that is inside is told where epsilon is beyond it."""
    asked = []

    def influence(factor):
        asked.append(factor)
        return (factor / 37) ** 2 * 0.03

    if largest == 37:
        _, found, count = scale_to_influence(influence, 0.03, start=start, largest=largest)
        assert 0.98 * 0.03 <= found <= 0.03
        assert count == len(asked)
    else:
        assert scale_to_influence(influence, 0.03, start=start, largest=largest)[:2] == (largest, influence(largest))
        asked.pop()
    assert max(asked) <= largest
    assert len(asked) <= 14, "it is not asked again where it cannot go further"
    steps = [after / before for before, after in itertools.pairwise(asked)]
    assert all(0.5 <= step <= 2 for step in steps)


@pytest.mark.parametrize("start", [1.0, 1e-3, 1e4])
def test_where_small_factors_do_nothing_at_all_epsilon_is_found(start):
    def influence(factor):
        return max(0.0, factor - 10) ** 2

    factor, found, _ = scale_to_influence(influence, 0.03, start=start)
    assert found == influence(factor) == pytest.approx(0.03, rel=0.02)


def test_where_nothing_is_inside_nothing_is_told_to_be():
    with pytest.raises(
        NoiseNotCalibratedError, match=f"no factor between 1 and {2**-40:g} .* it is 1: the influence jumps there"
    ):
        scale_to_influence(lambda factor: 1.0, 0.03)


def test_what_cannot_be_reached_gives_the_smallest_factor_with_nearly_the_largest_influence_below():
    factor, found, _ = scale_to_influence(lambda factor: min(factor, 0.01), 0.03, start=1e-4)
    assert 0.98 * 0.01 <= found <= 0.01
    assert factor < 0.03
    factor, found, _ = scale_to_influence(lambda factor: factor / 1000 if factor <= 3 else 1.0, 0.03)
    assert 0.98 * 0.003 <= found <= 0.003
    assert factor <= 3
    scaled = scale_to_influence(lambda factor: factor * 1e-5 if factor < 1000 else math.nan, 0.03)
    assert 500 <= scaled.factor < 1000, "half precision ends where the next doubling would be NaN"
    with pytest.raises(FloatingPointError, match="noise times 1 is NaN"):
        scale_to_influence(lambda factor: math.nan, 0.03)
    with pytest.raises(ValueError, match="positive influence"):
        scale_to_influence(lambda factor: factor, 0.0)


def test_scaling_into_epsilon_ends_below_it():
    factor, found, _ = scale_into(lambda factor: factor**2, 0.04)
    assert 0.96 * 0.04 <= found == factor**2 <= 0.04
    assert scale_into(lambda factor: 0.01 * factor, 0.04, largest=1.0)[:2] == (1.0, 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family(family):
    model = tiny_model(family).train()
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    direction = start_noise(embedding_shape(model, images), 1.0, seed=3)
    (found,) = calibrate(model, [direction], 0.005, [images[:5], images[5:]], chunk_size=4)
    assert found.images == 12
    assert torch.allclose(found.noise, found.factor * direction)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        clean = model(pixel_values=images).logits.softmax(-1)
        with patch_embedding_noise(model, found.noise):
            noisy = model(pixel_values=images).logits.softmax(-1)
    assert float((noisy - clean).square().sum(-1).mean()) == pytest.approx(0.005, rel=0.021)
