"""The attack of pyramid adversarial training against equation 4 written with indices; its objective against a loop."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.training.pyramid import PyramidPGD, cells, enlarged, other_classes
from tiny_attacks import EPS, agree, denormalise, normalise, trained
from tiny_models import tiny_model
from written_out import logits_of

SCALES, MULTIPLIERS = (20, 3, 1), (4.0, 2.0, 1.0)
"""Of 16 px: one square that is larger, six a side of which the last is cut, and the pixels."""


def perturbed(pixels, deltas):
    """C(x + sum of m_s delta_s): the pixel (i, j) has the value (i // s, j // s) of delta_s."""
    for scale, factor, delta in zip(SCALES, MULTIPLIERS, deltas, strict=True):
        place = torch.arange(16) // scale
        pixels = pixels + factor * delta[:, :, place][:, :, :, place]
    return pixels.clamp(0, 1)


def pyramid(vit, x, y, seed, t):
    """Three steps of EPS / 6 from zero that lower the loss of another class, drawn from (seed, t, i)."""
    targets = []
    for index, label in enumerate(y.tolist()):
        generator = torch.Generator().manual_seed(derive_seed(derive_seed(seed, t, index)))
        targets.append((label + int(torch.randint(1, 5, (), generator=generator))) % 5)
    pixels, deltas = denormalise(x), [torch.zeros(len(x), 3, n, n, dtype=x.dtype) for n in (1, 6, 16)]
    for _ in range(3):
        deltas = [delta.clone().requires_grad_() for delta in deltas]
        loss = cross_entropy(logits_of(vit, normalise(perturbed(pixels, deltas))), torch.tensor(targets))
        gradients = torch.autograd.grad(loss, deltas)
        with torch.no_grad():
            deltas = [(d - EPS / 6 * g.sign()).clamp(-EPS, EPS) for d, g in zip(deltas, gradients, strict=True)]
    return normalise(perturbed(pixels, deltas))


def test_pyramid_is_the_loop_without_the_trainer(tmp_path):
    settings = {"pyramid_scales": list(SCALES), "pyramid_multipliers": list(MULTIPLIERS)}
    trainer = trained(tmp_path, objective="pyramid", **settings)
    cost = trainer.cost.summary()
    assert cost["forward_equivalents"] == 4 * 8 * (3 * 2 + 2 * 3)

    def loss(vit, x, y, step):
        return cross_entropy(logits_of(vit, x), y) + cross_entropy(logits_of(vit, pyramid(vit, x, y, 42, step)), y)

    agree(trainer, loss, tmp_path)


def test_a_square_is_cut_at_the_border_and_a_large_one_is_the_whole_image():
    delta = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert enlarged(delta, 2, (3, 5))[0, 0].tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    assert enlarged(delta[..., :1, :1], 7, (3, 5)).unique().tolist() == [0]
    assert [cells((3, 5), scale) for scale in (1, 2, 7)] == [(3, 5), (2, 3), (1, 1)]
    assert cells((224, 224), 32) == (7, 7), "as in the authors' configuration: 7, 14 and 224 squares a side"


def test_each_scale_stays_within_its_bound():
    """From grey nothing is clipped to [0, 1]: twelve steps of eps / 6 end at +-eps of each scale, or between."""
    pixels, labels = torch.full((4, 3, 16, 16), 0.5), torch.arange(4)
    model = PixelModel(tiny_model(), (0.5,) * 3, (0.5,) * 3)
    for scales, factors in (((4,), (20.0,)), ((4, 1), (20.0, 1.0))):
        attack = PyramidPGD(eps=0.01, steps=12, scales=scales, multipliers=factors)
        change = attack(model, pixels, labels, seeds=[1, 2, 3, 4]) - pixels
        assert 0.5 * 0.01 * sum(factors) < change.abs().max() <= 0.01 * sum(factors) + 1e-6
        squares = change.unfold(2, 4, 4).unfold(3, 4, 4)
        spread = (squares.amax((-1, -2)) - squares.amin((-1, -2))).max()
        assert spread <= (2 * 0.01 if 1 in scales else 0) + 1e-6
    assert PyramidPGD().settings()["step"] == pytest.approx(1 / 255)


def test_targets_are_other_classes_and_come_from_the_seed_alone():
    labels = torch.tensor([0, 1, 2, -100] * 100)
    targets = other_classes(labels, 3, range(400))
    assert not (targets == labels).any()
    assert sorted(targets.unique().tolist()) == [0, 1, 2]
    share = (targets[0::4] == 1).double().mean()
    assert abs(share - 0.5) < 4 * 0.05, "four standard errors of 100 draws"
    assert other_classes(labels[5:6], 3, [5]) == targets[5]
