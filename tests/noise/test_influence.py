"""The measures against NumPy and closed forms."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from hf_nullspace.noise.influence import (
    centre,
    centred_norm,
    match_rate,
    noise_influence,
    permuted,
)
from tiny_models import cosine, normal


def test_influence_is_the_mean_squared_shift_of_probabilities():
    clean, noisy = normal(7, 5), normal(7, 5, seed=1)
    expected = np.mean(np.sum((softmax(noisy.numpy(), 1) - softmax(clean.numpy(), 1)) ** 2, axis=1))
    assert noise_influence(clean, noisy).item() == pytest.approx(expected, rel=1e-12)


def test_influence_lies_between_zero_and_two():
    certain = torch.tensor([[100.0, -100.0], [-100.0, 100.0]])
    assert noise_influence(certain, certain).item() == 0
    assert noise_influence(certain, certain.flip(0)).item() == 2


def test_match_rate_counts_equal_predictions():
    clean = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    noisy = torch.tensor([[2.0, 0.0], [3.0, 1.0], [9.0, 0.0], [0.0, 0.1]])
    assert match_rate(clean, noisy).item() == 0.75


def test_centred_norm_ignores_a_constant_per_token():
    noise, constant = normal(1, 6, 8), 100 * normal(1, 6, 1, seed=1)
    assert centred_norm(noise + constant).item() == pytest.approx(centred_norm(noise).item(), rel=1e-12)
    assert centre(noise).mean(-1).abs().max() < 1e-15
    expected = np.linalg.norm(noise.numpy() - noise.numpy().mean(-1, keepdims=True))
    assert centred_norm(noise).item() == pytest.approx(expected, rel=1e-12)


def test_permuted_noise_has_the_same_centred_norm_in_another_direction():
    noise = normal(1, 16, 24) + 5
    control = permuted(noise, torch.Generator().manual_seed(0))
    assert torch.linalg.vector_norm(control).item() == pytest.approx(centred_norm(noise).item(), rel=1e-12)
    assert control.mean(-1).abs().max() < 1e-14
    assert abs(cosine(centre(noise), control)) < 0.2


def test_raw_permutation_keeps_the_elements():
    noise = normal(1, 4, 3)
    control = permuted(noise, torch.Generator().manual_seed(0), raw=True)
    assert not torch.equal(control, noise)
    assert torch.equal(control.flatten().sort().values, noise.flatten().sort().values)
