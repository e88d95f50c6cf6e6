"""Scaling and combinations against direct evaluation, with the forward pass and the influence written out."""

import numpy as np
import pytest
import torch

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise, find_patch_embedding
from hf_nullspace.noise.closure import GRID, Combinations, Scaling, combinations, scaling
from tiny_models import normal, tiny_model
from written_out import influence_of


@pytest.fixture
def model():
    return tiny_model().double()


def noises(count):
    return [0.3 * normal(1, 16, 24, seed=10 + index) for index in range(count)]


BATCHES = [normal(3, 3, 16, 16, seed=1), normal(2, 3, 16, 16, seed=2)]


def influence_directly(model, noise):
    """Over all images at once."""
    return influence_of(model, torch.cat(BATCHES), noise)


def test_scaling_is_the_influence_at_every_factor(model):
    factors, vectors = (0.0, 0.25, 1.0, -2.0), noises(2)
    found = scaling(model, BATCHES, vectors, factors, chunk_size=2)
    assert (found.factors, found.images) == (factors, 5)
    expected = [[influence_directly(model, factor * vector) for factor in factors] for vector in vectors]
    np.testing.assert_allclose(found.influence, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.mean, np.mean(expected, axis=0), rtol=1e-9, atol=1e-15)
    assert (found.influence[:, 0] == 0).all()
    assert found.influence[:, 2].min() > 1e-4, "the noise has to matter for the test to mean anything"


def test_combinations_are_the_influence_over_the_grid(model):
    one, two, three = noises(3)
    ones, twos = (0.0, 0.5, 1.0), (-1.0, 0.0, 0.5, 1.0)
    found = combinations(model, BATCHES, [(one, two), (two, three)], ones, twos)
    expected = [
        [[influence_directly(model, a * v + b * w) for b in twos] for a in ones] for v, w in ((one, two), (two, three))
    ]
    np.testing.assert_allclose(found.influence, expected, rtol=1e-9, atol=1e-15)
    convex = found.convex()
    assert [point[:2] for point in convex] == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    np.testing.assert_allclose([point[2] for point in convex], np.mean(expected, 0)[[0, 1, 2], [3, 2, 1]])


def test_the_grid_is_the_papers_and_the_axes_are_scalings(model):
    one, two = noises(2)
    assert (len(GRID), GRID[0], GRID[3], GRID[-1]) == (11, 0.0, 0.3, 1.0)
    found = combinations(model, BATCHES[1:], [(one, two)])
    curves = scaling(model, BATCHES[1:], [one, two])
    torch.testing.assert_close(found.influence[0, :, 0], curves.influence[0])
    torch.testing.assert_close(found.influence[0, 0, :], curves.influence[1])
    assert len(found.convex()) == 11


def test_clean_logits_are_computed_once_and_the_model_is_left_alone(model):
    calls = []
    handle = find_patch_embedding(model).register_forward_hook(lambda *args: calls.append(1))
    model.train()
    steps = []
    scaling(model, BATCHES, noises(2), (0.5, 1.0), on_step=lambda done, total: steps.append((done, total)))
    handle.remove()
    assert len(calls) == len(BATCHES) * (1 + 4)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not find_patch_embedding(model)._forward_hooks


def test_a_persistent_hook_stays(model):
    hook = PatchEmbeddingNoise(model)
    found = scaling(model, BATCHES, noises(1), (1.0,), hook=hook)
    assert found.influence.item() == pytest.approx(influence_directly(model, noises(1)[0]), rel=1e-9)
    assert len(find_patch_embedding(model)._forward_hooks) == 1


def test_the_papers_claim_on_scaling_is_a_share():
    influence = torch.tensor([[0.0, 0.004, 0.02, 0.04], [0.0, 0.03, 0.01, 0.04]], dtype=torch.float64)
    assert Scaling((0.0, 0.25, 0.5, 1.0), influence, 5).share_below_proportion() == 0.75
    with pytest.raises(ValueError, match="expected 1 and some between"):
        Scaling((0.0, 0.5), influence[:, :2], 5).share_below_proportion()
    for factors in ((0.0, 1.0), (1.0, 1.5), (-0.5, 1.0), (1.0,)):
        with pytest.raises(ValueError, match="expected 1 and some between"):
            Scaling(factors, influence[:, : len(factors)], 5).share_below_proportion()
    assert Scaling((1.0, 0.5), influence[:, [3, 2]], 5).share_below_proportion() == 1.0, "equal is not above"
    beyond = Combinations((-1.0, 0.0, 2.0), (-1.0, 1.0, 2.0), torch.ones(1, 3, 3), 5)
    assert beyond.convex() == [(0.0, 1.0, 1.0)]
    grid = Combinations((0.0, 0.3), (0.7, 1.0), torch.ones(1, 2, 2), 5)
    assert grid.convex() == [(0.0, 1.0, 1.0), (0.3, 0.7, 1.0)]
