"""Losses of views: divergences against SciPy, a consistency weight against a loop, images that have no label."""

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch.nn.functional import cross_entropy, softmax

from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.training.losses import divergence, mean_over_images, view_loss
from tiny_attacks import EPS, agree, pgd, trained
from written_out import logits_of


def test_divergences_are_scipys():
    clean, other = 3 * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = clean.softmax(-1).numpy(), other.softmax(-1).numpy()
    assert divergence(clean, other).numpy() == pytest.approx(rel_entr(p, q).sum(-1), rel=1e-12)
    assert divergence(clean, other, "js").numpy() == pytest.approx(jensenshannon(p, q, axis=-1) ** 2, rel=1e-9)
    assert divergence(clean, clean + 7, "js").abs().max() < 1e-12, "the same prediction"
    half = [each.to(torch.bfloat16) for each in (clean, other)]
    for kind in ("kl", "js"):
        assert torch.equal(divergence(*half, kind), divergence(*(each.float() for each in half), kind))


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_a_divergence_has_a_gradient_where_predictions_are_certain(kind):
    clean = torch.tensor([[300.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).requires_grad_()
    other = torch.tensor([[0.0, 300.0, 0.0], [1.0, 1.0, 1.0]]).requires_grad_()
    apart = divergence(clean, other, kind)
    apart.sum().backward()
    assert apart.tolist() == pytest.approx([300.0 if kind == "kl" else math.log(2), 0.0], abs=1e-6)
    assert clean.grad.isfinite().all()
    assert other.grad.isfinite().all()


def kl(z, other):
    p, q = softmax(z, 1), softmax(other, 1)
    return (p * (p / q).log()).sum(1).mean()


def js(z, other):
    p, q = softmax(z, 1), softmax(other, 1)
    middle = (p + q) / 2
    return ((p * (p / middle).log() + q * (q / middle).log()).sum(1) / 2).mean()


@pytest.mark.parametrize("distance", [kl, js])
def test_consistency_is_the_loop_without_the_trainer(tmp_path, distance):
    """Each view beside the clean one has its divergence from it; that of Madry has none. No pass is added."""
    settings = {"consistency": 3.0, "consistency_loss": distance.__name__}
    trainer = trained(tmp_path, objective="random+fast+madry", epsilon=0.1, **settings)
    assert trainer.cost.passes("training")["forward"] == 4 * 8 * 4, "clean, noisy, fast, adversarial"
    assert trainer.cost.passes("attack")["forward"] == 4 * 8 * (1 + 3)
    bank = [noise.tensor for noise in load_noise_bank(tmp_path / "noises")]

    def loss(vit, x, y, step):
        fast, adversarial = pgd(vit, x, y, 42, step, steps=1, step=1.25 * EPS), pgd(vit, x, y, 42, step)
        clean, noisy = logits_of(vit, x), logits_of(vit, x, bank[step // 2])
        others = [noisy, logits_of(vit, fast)]
        entropy = 2 * cross_entropy(clean, y) + sum(cross_entropy(other, y) for other in others)
        entropy = entropy + cross_entropy(logits_of(vit, adversarial), y)
        return entropy + 3 * sum(distance(clean, other) for other in others)

    agree(trainer, loss, tmp_path)


def test_images_labelled_minus_100_count_for_nothing():
    values, labels = torch.tensor([1.0, float("inf"), 5.0]), torch.tensor([0, -100, 2])
    assert mean_over_images(values, labels, None) == 3
    assert mean_over_images(values, labels, 4) == 1.5
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    expected = cross_entropy(logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(view_loss(logits, labels, None), expected)
    torch.testing.assert_close(view_loss(logits, labels, 4), expected / 2)


def test_the_loss_of_half_precision_logits_is_that_of_float32():
    logits, labels = 8 * torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.arange(6) % 5
    assert torch.equal(view_loss(logits, labels, None), cross_entropy(logits.float(), labels))
    assert view_loss(logits.double(), labels, None).dtype == torch.float64
