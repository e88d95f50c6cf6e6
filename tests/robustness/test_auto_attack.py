"""AutoAttack through pyautoattack: the threat model, the number of targets, and nothing left behind."""

import sys

import pytest
import torch

from hf_nullspace.robustness.attacks.auto import AutoAttack
from hf_nullspace.robustness.attacks.gradient import PGD
from hf_nullspace.robustness.suite import Attacked

SMALL = {"queries": 20, "iterations": 5}


@pytest.mark.parametrize("attack", [AutoAttack(4 / 255, **SMALL), AutoAttack(0.3, norm="l2", **SMALL)], ids=repr)
def test_threat_model_strength_and_state(tiny_vit, pixels, attack):
    model = tiny_vit.float()
    pixels = pixels.float()
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    model.train()
    state = torch.random.get_rng_state()
    adversarial = attack(model, pixels, labels, seeds=range(6))
    again = attack(model, pixels, labels, seeds=range(6))
    torch.testing.assert_close(adversarial, again, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    change = (adversarial - pixels).flatten(1)
    assert (change.abs().amax(1) if attack.norm == "linf" else change.norm(dim=1)).max() <= attack.eps + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    model.eval()
    weaker = PGD(attack.eps, norm=attack.norm, steps=5)(model, pixels, labels, seeds=range(6))
    right = [int((model(p).argmax(1) == labels).sum()) for p in (pixels, weaker, adversarial)]
    assert right[0] == 6
    assert right[2] <= right[1]
    assert right[2] < 6


def test_few_classes_need_fewer_targets_and_the_name_says_so(make_linear):
    five, pixels, labels = make_linear(classes=5), torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"use AutoAttack\(targets=4\)"):
        AutoAttack(**SMALL)(five, pixels, labels, seeds=[0, 1])
    with pytest.raises(ValueError, match=r"5 targets need 6 classes, the model has 5: use AutoAttack\(targets=4\)"):
        AutoAttack(targets=5, **SMALL)(five, pixels, labels, seeds=[0, 1])
    with pytest.raises(ValueError, match=r"use AutoAttack\(targets=3\)"):
        AutoAttack(targets=4)(make_linear(classes=4), pixels, labels, seeds=[0, 1])
    attack = AutoAttack(targets=4, **SMALL)
    assert "targets=4" in repr(attack)
    assert attack(five, pixels, labels, seeds=[0, 1]).shape == pixels.shape
    with pytest.raises(ValueError, match="the DLR loss needs 4 classes"):
        AutoAttack(targets=2)(make_linear(classes=3), pixels, labels, seeds=[0, 1])


def test_without_the_library_the_extra_is_named(linear, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"hf-nullspace\[attacks\]"):
        AutoAttack()(linear, torch.rand(1, 3, 4, 4), torch.tensor([0]), seeds=[0])


def test_its_cost_in_forward_passes():
    """APGD-CE, and APGD-DLR and FAB on each target: a forward and a backward pass a step; Square: its queries."""
    assert AutoAttack().cost == 100 * 3 * (1 + 9 + 9) + 5000
    assert Attacked(AutoAttack(targets=2, iterations=5, queries=20)).cost == 1 + 5 * 3 * 5 + 20


def test_the_standard_is_the_default():
    assert repr(AutoAttack()) == "AutoAttack(eps=8/255, norm='linf', targets=9, queries=5000, iterations=100)"
