"""FGSM, PGD and MI-FGSM against closed forms on a linear model, foolbox, and the paper's formula in NumPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD

SEEDS = [11, 12, 13, 14, 15, 16]


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 4, 5])


def binary(linear):
    """Two classes: the gradient of the loss is (w_other - w_label) times a positive number, everywhere."""
    linear.weight.data, linear.bias.data = linear.weight.data[:2], linear.bias.data[:2]
    return linear


@pytest.mark.parametrize("attack", [FGSM(0.03), PGD(0.03, random_start=False), PGD(0.03), MIM(0.03, step=0.03)])
def test_linf_optimum_on_a_linear_model(linear, attack):
    model = binary(linear)
    pixels = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    away = (model.weight[1 - labels] - model.weight[labels]).detach()
    best = (pixels + 0.03 * away.sign()).clamp(0, 1)
    adversarial = attack(model, pixels, labels, seeds=SEEDS)
    torch.testing.assert_close(adversarial, best, rtol=0, atol=1e-12)


def test_l2_optimum_on_a_linear_model(linear):
    model = binary(linear)
    pixels = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    away = (model.weight[1 - labels] - model.weight[labels]).detach()
    best = pixels + 0.2 * away / away.flatten(1).norm(dim=1)[:, None, None, None]
    adversarial = PGD(0.2, norm="l2", random_start=False)(model, pixels, labels)
    torch.testing.assert_close(adversarial, best, rtol=0, atol=1e-12)
    # From a random start it comes close: with step eps / 4 the projection turns every step towards the optimum.
    started = PGD(0.2, norm="l2", steps=60)(model, pixels, labels, seeds=[1, 2])
    torch.testing.assert_close(started, best, rtol=0, atol=1e-4)


def test_foolbox_agrees_on_fgsm_and_pgd(tiny_vit, pixels, labels, foolbox):
    theirs = foolbox.attacks
    fixed = {"rel_stepsize": None, "steps": 10, "random_start": False}
    cases = [
        (FGSM(4 / 255), theirs.LinfFastGradientAttack(random_start=False), 4 / 255),
        (PGD(8 / 255, random_start=False), theirs.LinfPGD(abs_stepsize=2 / 255, **fixed), 8 / 255),
        (
            PGD(0.5, step=0.1, norm="l2", random_start=False),
            theirs.L2ProjectedGradientDescentAttack(abs_stepsize=0.1, **fixed),
            0.5,
        ),
    ]
    wrapped = foolbox.PyTorchModel(tiny_vit, bounds=(0, 1), device="cpu")
    for ours, oracle, eps in cases:
        expected = oracle.run(wrapped, pixels, foolbox.criteria.Misclassification(labels), epsilon=eps)
        assert (expected - pixels).abs().max() > 1e-3
        torch.testing.assert_close(ours(tiny_vit, pixels, labels), expected, rtol=0, atol=1e-9)


def test_mim_is_its_definition(tiny_vit, pixels, labels):
    """Dong et al. 2018, algorithm 1, one image at a time; the gradient is the only thing that torch computes."""
    eps, steps, decay = 8 / 255, 5, 0.9
    adversarial = MIM(eps, steps=steps, decay=decay)(tiny_vit, pixels, labels)
    for image, label, result in zip(pixels.numpy(), labels, adversarial.numpy(), strict=True):
        x, g = image, np.zeros_like(image)
        for _ in range(steps):
            point = torch.from_numpy(x[None]).requires_grad_()
            loss = F.cross_entropy(tiny_vit(point), label[None])
            gradient = torch.autograd.grad(loss, point)[0][0].numpy()
            g = decay * g + gradient / np.abs(gradient).sum()
            x = np.clip(np.clip(x + eps / steps * np.sign(g), image - eps, image + eps), 0, 1)
        np.testing.assert_allclose(result, x, rtol=0, atol=1e-12)


def test_mim_with_a_zero_gradient_is_no_nan(linear):
    linear.weight.data.zero_()
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(MIM()(linear, pixels, torch.tensor([0, 1])), pixels, rtol=0, atol=0)


def test_random_starts_are_uniform_in_the_ball(linear):
    linear.weight.data.zero_()  # no gradient: what is left is the start
    pixels = torch.full((400, 3, 4, 4), 0.5, dtype=torch.float64)
    labels = torch.zeros(400, dtype=torch.long)
    box = PGD(0.1)(linear, pixels, labels, seeds=range(400)) - 0.5
    assert abs(box.var().item() - 0.1**2 / 3) < 2e-4
    ball = (PGD(0.1, norm="l2")(linear, pixels, labels, seeds=range(400)) - 0.5).flatten(1).norm(dim=1)
    assert abs(((ball / 0.1) ** 48).mean().item() - 0.5) < 0.05  # (r / eps)^d is uniform
    assert not torch.equal(box[0], box[1])
