"""Rounding that the model sees least, against every way to round a small patch, by NumPy."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from hf_nullspace.linear.box import nearest_invisible_image
from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.linear.rounding import round_unseen
from tiny_models import uniform

STD = (0.27, 0.26, 0.1)


def small_nullspace():
    weight = torch.randn(3, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return PatchNullspace.from_weight(weight).in_pixels(STD)


def invisible(nullspace, source, target):
    return nearest_invisible_image(nullspace, source, target, iterations=5000, tolerance=1e-10)[0]


def test_no_flip_helps_and_few_of_all_ways_to_round_are_better():
    nullspace, source = small_nullspace(), (uniform(4, 3, 2, 2) * 255).round() / 255
    pixels = invisible(nullspace, source, uniform(4, 3, 2, 2, seed=1))
    found = round_unseen(nullspace, source, pixels)
    weight = nullspace.weight.numpy()
    for start, wish, rounded in zip(
        *(each.reshape(4, 12).numpy() * 255 for each in (source, pixels, found)), strict=True
    ):
        assert np.abs(rounded - rounded.round()).max() < 1e-9
        assert np.abs(rounded - wish).max() < 1
        low, high = np.floor(wish), np.ceil(wish)
        ways = np.array(list(itertools.product((0, 1), repeat=12)))
        ways = low + ways * (high - low)
        errors = np.linalg.norm((ways - start) @ weight.T, axis=1)
        own = np.linalg.norm((rounded.round() - start) @ weight.T)
        nearest = np.linalg.norm((wish.round() - start) @ weight.T)
        assert own <= nearest + 1e-9
        neighbours = np.abs(ways - rounded.round()).sum(1) == 1
        assert errors[neighbours].min() >= own - 1e-9
        assert (errors < own - 1e-9).mean() < 0.05


def test_the_unit_of_the_weights_does_not_matter():
    nullspace, source = small_nullspace(), (uniform(4, 3, 2, 2) * 255).round() / 255
    pixels = invisible(nullspace, source, uniform(4, 3, 2, 2, seed=1))
    found = round_unseen(nullspace, source, pixels)
    for unit in (2.0**-20, 2.0**20):
        other = dataclasses.replace(nullspace, weight=nullspace.weight * unit)
        assert torch.equal(round_unseen(other, source, pixels), found)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 4), (4, 2)])
def test_an_8_bit_image_and_a_border_stay(height, width):
    weight = torch.randn(3, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nullspace = PatchNullspace.from_weight(weight).in_pixels(STD)
    source = (uniform(1, 3, 7, 9, seed=4) * 255).round() / 255
    assert torch.equal(round_unseen(nullspace, source, source), source)
    pixels = uniform(1, 3, 7, 9, seed=5)
    found = round_unseen(nullspace, source, pixels)
    rows, columns = 7 - 7 % height, 9 - 9 % width
    nearest = (pixels * 255).round() / 255
    torch.testing.assert_close(found[:, :, rows:], nearest[:, :, rows:])
    torch.testing.assert_close(found[..., columns:], nearest[..., columns:])
    flipped = (found != nearest)[0].any(0)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            assert flipped[top : top + height, left : left + width].any()
