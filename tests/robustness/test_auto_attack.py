"""AutoAttack through pyautoattack: the threat model, the number of targets, and nothing left behind."""

import sys

import pytest
import torch

from hf_nullspace.robustness.attacks.auto import AutoAttack
from hf_nullspace.robustness.attacks.gradient import PGD

SMALL = {"queries": 20, "iterations": 5}


@pytest.mark.parametrize("attack", [AutoAttack(4 / 255, **SMALL), AutoAttack(0.3, norm="l2", **SMALL)], ids=repr)
def test_threat_model_strength_and_state(tiny_vit, pixels, left_as_it_was, attack):
    model = tiny_vit.float()
    pixels = pixels.float()
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    state = torch.random.get_rng_state()
    with left_as_it_was():
        adversarial, again = (attack(model, pixels, labels, seeds=range(6)) for _ in range(2))
    torch.testing.assert_close(adversarial, again, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
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
    pixels, labels = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    attack = AutoAttack(targets=4, **SMALL)
    assert "targets=4" in repr(attack)
    assert attack(make_linear(classes=5), pixels, labels, seeds=[0, 1]).shape == pixels.shape
    with pytest.raises(ValueError, match="the DLR loss needs 4 classes"):
        AutoAttack(targets=2)(make_linear(classes=3), pixels, labels, seeds=[0, 1])


def test_without_the_library_the_extra_is_named(linear, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"hf-nullspace\[attacks\]"):
        AutoAttack()(linear, torch.rand(1, 3, 4, 4), torch.tensor([0]), seeds=[0])
