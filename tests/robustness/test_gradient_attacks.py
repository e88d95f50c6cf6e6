"""FGSM, PGD and MI-FGSM against closed forms on a linear model, foolbox, and the paper's formula in NumPy."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_nullspace.robustness.attacks.base import readable
from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD
from hf_nullspace.robustness.attacks.patch_fool import PatchFool
from hf_nullspace.robustness.pixel_model import PixelModel

SEEDS = [11, 12, 13, 14, 15, 16]
ATTACKS = [
    FGSM(4 / 255),
    PGD(8 / 255),
    PGD(8 / 255, random_start=False),
    PGD(0.5, norm="l2"),
    MIM(8 / 255),
    MIM(8 / 255, decay=0.5, steps=3),
]


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


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_image_does_not_depend_on_its_batch(tiny_vit, pixels, attack):
    pixels, labels = torch.cat([pixels, 1 - pixels, pixels.flip(3)])[:16], torch.arange(16) % 10
    together = attack(tiny_vit, pixels, labels, seeds=range(16))
    for b in (0, 7, 15):
        alone = attack(tiny_vit, pixels[b : b + 1], labels[b : b + 1], seeds=[b])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_the_threat_model_holds_and_the_model_is_left_alone(tiny_vit, pixels, labels, attack):
    tiny_vit.train()
    tiny_vit.model.classifier.eval()
    frozen_parameter = tiny_vit.model.classifier.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in tiny_vit.state_dict().items()}
    with torch.no_grad():
        adversarial = attack(tiny_vit, pixels, labels, seeds=SEEDS)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    change = (adversarial - pixels).flatten(1)
    size = change.abs().amax(1) if attack.norm == "linf" else change.norm(dim=1)
    assert (size <= attack.eps + 1e-12).all()
    assert (size > attack.eps / 2).all()
    assert not adversarial.requires_grad
    assert tiny_vit.training
    assert not tiny_vit.model.classifier.training
    assert not frozen_parameter.requires_grad
    assert sum(p.requires_grad for p in tiny_vit.parameters()) == len(list(tiny_vit.parameters())) - 1
    assert all(p.grad is None for p in tiny_vit.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny_vit.state_dict().items())


def test_an_exception_leaves_the_model_as_it_was(tiny_vit, pixels, labels):
    tiny_vit.train()

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = tiny_vit.model.classifier.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        PGD()(tiny_vit, pixels, labels, seeds=SEEDS)
    handle.remove()
    assert all(module.training for module in tiny_vit.modules())
    assert all(p.requires_grad and p.grad is None for p in tiny_vit.parameters())


def test_inside_inference_mode(tiny_vit, pixels, labels):
    with torch.inference_mode():
        inner = FGSM()(tiny_vit, pixels * 1, labels * 1)
    torch.testing.assert_close(inner, FGSM()(tiny_vit, pixels, labels), rtol=0, atol=0)


def test_random_starts_are_uniform_in_the_ball(linear):
    linear.weight.data.zero_()  # no gradient: what is left is the start
    pixels = torch.full((400, 3, 4, 4), 0.5, dtype=torch.float64)
    labels = torch.zeros(400, dtype=torch.long)
    box = PGD(0.1)(linear, pixels, labels, seeds=range(400)) - 0.5
    assert abs(box.var().item() - 0.1**2 / 3) < 2e-4
    ball = (PGD(0.1, norm="l2")(linear, pixels, labels, seeds=range(400)) - 0.5).flatten(1).norm(dim=1)
    assert abs(((ball / 0.1) ** 48).mean().item() - 0.5) < 0.05  # (r / eps)^d is uniform
    assert not torch.equal(box[0], box[1])


def test_names_say_every_setting():
    assert repr(FGSM()) == "FGSM(eps=1/255)"
    assert repr(PGD()) == "PGD(eps=8/255, step=2/255, steps=10, norm='linf', random_start=True)"
    assert repr(PGD(0.5, norm="l2")) == "PGD(eps=0.5, step=0.125, steps=10, norm='l2', random_start=True)"
    assert repr(MIM()) == "MIM(eps=1/255, step=0.1/255, steps=10, decay=1)"
    assert repr(FGSM(8 / 225)) == "FGSM(eps=0.0355556)"


@pytest.mark.parametrize(
    ("value", "written"),
    [(8 / 255, "8/255"), (0.25 / 255, "0.25/255"), (1.0, "1"), (0.2, "0.2"), (0.0, "0"), (0.1234567, "0.123457"),
     (3, "3"), (None, "None"), ("linf", "'linf'"), (1e-3 / 255, "0.001/255"), (1.1e-9 + 0.002, "0.002"),
     (-4 / 255, "-4/255")],
)  # fmt: skip
def test_a_setting_is_written_as_one_writes_it(value, written):
    assert readable(value) == written


def test_bad_arguments_are_named(linear):
    pixels, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="one seed per image"):
        PGD()(linear, pixels, labels)
    with pytest.raises(ValueError, match="one seed per image"):
        PGD()(linear, pixels, labels, seeds=[1])
    with pytest.raises(ValueError, match="one label per image"):
        FGSM()(linear, pixels, labels[:1])


@pytest.mark.parametrize(
    ("attack", "steps"),
    [
        (FGSM(), 1),
        (PGD(steps=7), 7),
        (PGD(0.5, norm="l2", steps=3), 3),
        (MIM(steps=5), 5),
        (CW(steps=9, abort_early=False), 1 + 9),
    ],
    ids=repr,
)
def test_one_forward_and_backward_per_step(tiny_vit, pixels, labels, attack, steps):
    """CW's first forward finds out which images are wrong already."""
    forwards, backwards = [], []
    with torch.no_grad():
        labels = tiny_vit(pixels).argmax(1)
    tiny_vit.model.register_forward_hook(lambda *_: forwards.append(1))
    tiny_vit.model.classifier.register_full_backward_hook(lambda *_: backwards.append(1))
    attack(tiny_vit, pixels, labels, seeds=SEEDS)
    assert len(forwards) == steps
    assert len(backwards) == steps - isinstance(attack, CW)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attack", [*ATTACKS, CW(c=20), PatchFool(steps=5)], ids=repr)
def test_on_a_gpu_as_on_the_cpu(tiny_vit, pixels, labels, attack, dtype):
    """The threat model holds and the attack works; in float32 the random start and most signs are the CPU's."""
    model, pixels = PixelModel(tiny_vit.model.to("cuda", dtype), tiny_vit.mean, tiny_vit.std), pixels.float()
    adversarial = attack(model, pixels.cuda(), labels.cuda(), seeds=SEEDS)
    assert adversarial.is_cuda
    assert adversarial.dtype == torch.float32
    torch.testing.assert_close(attack.project(adversarial, pixels.cuda()), adversarial, rtol=0, atol=1e-6)
    if dtype == torch.float32:
        model = PixelModel(tiny_vit.model.to("cpu"), tiny_vit.mean, tiny_vit.std)
        expected = attack(model, pixels, labels, seeds=SEEDS)
        assert ((adversarial.cpu() - expected).abs() < 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("attack", [*ATTACKS, CW(c=20), PatchFool(steps=20)], ids=repr)
def test_bf16_models_and_autocast(tiny_vit, pixels, attack, mixed):
    """Pixels and results stay float32, the threat model holds, and the attack still works."""
    exact, pixels = PixelModel(tiny_vit.model.float(), tiny_vit.mean, tiny_vit.std), pixels.float()
    with torch.no_grad():
        labels = exact(pixels).argmax(1)
        before = F.cross_entropy(exact(pixels), labels).item()
    model = exact if mixed else PixelModel(copy.deepcopy(tiny_vit.model).bfloat16(), tiny_vit.mean, tiny_vit.std)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        adversarial = attack(model, pixels, labels, seeds=SEEDS)
    assert adversarial.dtype == torch.float32
    assert adversarial.isfinite().all()
    torch.testing.assert_close(attack.project(adversarial, pixels), adversarial, rtol=0, atol=1e-6)
    with torch.no_grad():
        after = F.cross_entropy(exact(adversarial), labels).item()
    assert after > before + 0.05
