"""Proposition 1 on weights built to satisfy it, on weights that miss one condition, and against SciPy."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from hf_nullspace.linear.attention import (
    constructed_noise,
    head_changes,
    layer_conditions,
    null_direction,
    principal_angles,
)
from hf_nullspace.models.attention import AttentionWeights
from tiny_models import normal

HEADS, FEATURES, TOKENS = 3, 24, 7


def proposition_weights(*, symmetric=True, contained=True, collinear=True):
    """Weights by the remark below the proposition, Q = B P and K = B P D, with or without each condition; and biases.

    Condition 3: the first column of head 1's B is one of head 0's, and its row 0 is zero elsewhere, so that row 0 of
    M_1 is a multiple of that column.
    """
    width = FEATURES // HEADS
    frames, mixes = normal(HEADS, FEATURES, width), torch.linalg.qr(normal(HEADS, width, width, seed=1))[0]
    eigenvalues = normal(HEADS, 1, width, seed=2)
    if collinear:
        mixes[1] = torch.eye(width, dtype=torch.float64)
        frames[1, :, 0] = frames[0, :, 0]
        frames[1, 0, 1:] = 0
    query, key = frames @ mixes, frames @ mixes * eigenvalues
    if not symmetric:
        query = normal(HEADS, FEATURES, width, seed=3)
        if collinear:
            query[1, 0, 1:] = 0
    value = key @ normal(HEADS, width, width, seed=4) if contained else normal(HEADS, FEATURES, width, seed=5)
    biases = (normal(HEADS, width, seed=seed) for seed in (6, 7, 8))
    return AttentionWeights("built", query, key, value, *biases)


def changes(weights, norm=100.0):
    inputs = normal(2, TOKENS, FEATURES, seed=9)
    noise = constructed_noise(null_direction(weights), TOKENS, torch.Generator().manual_seed(10), norm)
    assert torch.linalg.matrix_norm(noise).item() == pytest.approx(norm)
    assert torch.linalg.matrix_rank(noise[0]) == 1
    return head_changes(weights, inputs, noise)


def test_where_the_conditions_hold_no_head_sees_the_noise():
    weights = proposition_weights()
    found = layer_conditions(weights)
    assert found.hold(1e-10)
    assert found.stack_rank == FEATURES - 1
    direction = null_direction(weights)
    for query, key, value in zip(weights.query, weights.key, weights.value, strict=True):
        assert (query @ key.T @ direction).abs().max() < 1e-12
        assert (value.T @ direction).abs().max() < 1e-12
    assert changes(weights).max() < 1e-11
    other = head_changes(weights, normal(2, TOKENS, FEATURES), 0.1 * normal(1, TOKENS, FEATURES, seed=11))
    assert other.min() > 1e-2, "other noise, a thousandth of the norm, is seen"


@pytest.mark.parametrize("missing", ["symmetric", "contained", "collinear"])
def test_each_condition_is_needed_and_measured(missing):
    weights = proposition_weights(**{missing: False})
    found = layer_conditions(weights)
    assert not found.hold()
    assert (found.asymmetry.max() > 0.5) == (missing == "symmetric")
    assert (found.largest_angle.max() > 0.5) == (missing == "contained")
    assert (found.collinearity > 1e-3) == (missing == "collinear")
    assert (found.stack_rank == FEATURES) == (missing == "collinear")
    assert changes(weights).max() > 0.1


def test_measures_are_those_of_numpy_and_scipy():
    weights = proposition_weights(symmetric=False, contained=False, collinear=False)
    found = layer_conditions(weights)
    matrices = [(query @ key.T).numpy() for query, key in zip(weights.query, weights.key, strict=True)]
    for head, matrix in enumerate(matrices):
        asymmetry = np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix)
        assert found.asymmetry[head].item() == pytest.approx(asymmetry, rel=1e-12)
        assert 1.2 < asymmetry < 1.6, "unrelated Q and K give about sqrt(2)"
        angles = scipy.linalg.subspace_angles(scipy.linalg.orth(matrix.T), weights.value[head].numpy())
        np.testing.assert_allclose(found.value_angles[head], angles[::-1], rtol=1e-9)
    spectrum = scipy.linalg.svdvals(np.concatenate(matrices))
    assert found.smallest_singular_value == pytest.approx(spectrum[-1] / spectrum[0], rel=1e-9)
    distances = [
        np.linalg.norm(row - basis @ (basis.T @ row)) / np.linalg.norm(row)
        for m, matrix in enumerate(matrices)
        for n, other in enumerate(matrices)
        for basis in [scipy.linalg.orth(other.T)]
        for row in matrix
        if m != n
    ]
    assert found.collinearity == pytest.approx(min(distances), rel=1e-10)


def test_a_space_larger_than_the_one_it_should_lie_in_has_right_angles():
    rows = torch.linalg.qr(normal(6, 6))[0]
    assert principal_angles(rows[:2], rows[:4]).abs().max() < 1e-14
    angles = principal_angles(rows[:3], rows[:1])
    np.testing.assert_allclose(angles, [0, math.pi / 2, math.pi / 2], atol=1e-14)
    assert principal_angles(rows[:0], rows[:2]).shape == (0,)
    tiny = torch.tensor([[math.cos(1e-9), math.sin(1e-9)]], dtype=torch.float64)
    axis = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert principal_angles(tiny, axis).item() == pytest.approx(1e-9, rel=1e-6)


def test_the_rank_of_a_value_is_relative_to_its_largest_singular_value():
    """Diagonal, so that they are exact: 1, 1e-3 and, at 24 * eps = 5.3e-15 of the largest, one above and one below."""
    weights = proposition_weights()
    for smallest, rank in ((1e-14, 3), (1e-15, 2)):
        value = torch.zeros_like(weights.value)
        value[:, [0, 1, 2], [0, 1, 2]] = torch.tensor([1.0, 1e-3, smallest], dtype=torch.float64)
        found = layer_conditions(dataclasses.replace(weights, value=value))
        assert [len(angles) for angles in found.value_angles] == [rank] * HEADS


def test_zero_heads_and_single_heads_have_measures():
    weights = proposition_weights()
    zero = dataclasses.replace(weights, value=torch.zeros_like(weights.value))
    assert layer_conditions(zero).largest_angle.max() == 0
    tensors = (weights.query, weights.key, weights.value, weights.query_bias, weights.key_bias, weights.value_bias)
    single = AttentionWeights("one", *(tensor[:1] for tensor in tensors))
    found = layer_conditions(single)
    assert found.collinearity == 1
    assert (found.stack_rank, found.smallest_singular_value) == (FEATURES // HEADS, 0)
    assert changes(single).max() < 1e-11, "a head narrower than D has a nullspace without condition 3"


def test_random_float32_layers_of_real_size_are_not_called_singular():
    """ViT-B's 12 heads of 64: the smallest singular value is small, and no rounding."""
    draw = torch.Generator().manual_seed(0)
    matrices = (0.02 * torch.randn(12, 768, 64, generator=draw) for _ in range(3))
    found = layer_conditions(AttentionWeights("ViT-B", *matrices, *(torch.zeros(12, 64) for _ in range(3))))
    assert found.smallest_singular_value < 1e-3
    assert found.stack_rank == 768
    assert found.asymmetry.mean().item() == pytest.approx(2**0.5, rel=0.01)
