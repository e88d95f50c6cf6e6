"""CW-L2 against foolbox and against the closest point of a linear model's boundary."""

import pytest
import torch

from hf_nullspace.robustness.attacks.carlini_wagner import CW, lead


def test_lead_is_shift_invariant_also_for_negative_logits():
    logits = torch.tensor([[1.0, 5.0, 3.0], [-9.0, -4.0, -1.0]])
    labels = torch.tensor([1, 0])
    torch.testing.assert_close(lead(logits, labels), torch.tensor([-2.0, 8.0]))
    torch.testing.assert_close(lead(logits - 100, labels), torch.tensor([-2.0, 8.0]))


def foolbox_attack(foolbox, attack):
    return foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=attack.binary_search_steps,
        steps=attack.steps,
        stepsize=attack.lr,
        confidence=attack.kappa,
        initial_const=attack.c,
        abort_early=attack.abort_early,
    )


@pytest.mark.parametrize(
    "attack",
    [
        CW(),
        CW(c=20, steps=30, lr=0.02, abort_early=True),
        CW(c=20, kappa=0.5, abort_early=True),
        CW(c=1e-2, steps=20, lr=0.02, binary_search_steps=5, abort_early=True),
        CW(c=5),
    ],
    ids=repr,
)
def test_foolbox_agrees(tiny_vit, pixels, predicted, foolbox, attack):
    labels = predicted
    labels[5] = (labels[5] + 1) % 10  # wrong from the start: nothing to do
    oracle = foolbox_attack(foolbox, attack)
    wrapped = foolbox.PyTorchModel(tiny_vit, bounds=(0, 1), device="cpu")
    ours = attack(tiny_vit, pixels, labels)
    for b in range(6):  # one at a time: foolbox stops a whole batch together
        criterion = foolbox.criteria.Misclassification(labels[b : b + 1])
        theirs = oracle.run(wrapped, pixels[b : b + 1], criterion)[0]
        torch.testing.assert_close(ours[b], theirs, rtol=0, atol=2e-5)
    moved = (ours - pixels).flatten(1).norm(dim=1)
    if attack.c > 1 or attack.binary_search_steps > 1:
        assert (moved[:5] > 1e-3).sum() >= 3
    if attack.kappa == 0:
        assert moved[5] == 0


def test_it_finds_the_nearest_point_of_a_linear_boundary(linear):
    linear.weight.data, linear.bias.data = linear.weight.data[:2], linear.bias.data[:2]
    pixels = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.4 + 0.3
    with torch.no_grad():
        logits = linear(pixels)
        linear.bias.data = -logits.mean(0) + torch.tensor([0.4, 0.0])
        labels = linear(pixels).argmax(1)
        direction = linear.weight[1] - linear.weight[0]
        gap = linear(pixels).diff(dim=1).abs().flatten()
    nearest = gap / direction.norm()
    adversarial = CW(c=0.1, steps=400, binary_search_steps=8)(linear, pixels, labels)
    assert (linear(adversarial).argmax(1) != labels).all()
    distance = (adversarial - pixels).flatten(1).norm(dim=1)
    assert (distance >= nearest).all()
    torch.testing.assert_close(distance, nearest, rtol=0.03, atol=1e-3)


def test_finished_images_leave_the_batch(tiny_vit, pixels, predicted):
    predicted[:3] = (predicted[:3] + 1) % 10
    sizes = []
    tiny_vit.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    CW(c=20, steps=100, lr=0.05, abort_early=True)(tiny_vit, pixels, predicted)
    assert sizes[:2] == [6, 3]
    assert sizes[-1] < 3
    assert len(sizes) <= 101
