"""Each check passes on a sound model and fails on a model that is broken in exactly that way."""

import pytest
import torch
from torch import nn

from hf_nullspace.robustness.checks import run_checks, unreliable
from hf_nullspace.robustness.pixel_model import PixelModel

NAMES = [
    *("eval mode", "input range", "range guarded", "logits, not probabilities", "deterministic", "better than chance"),
    *("gradients", "accuracy falls to 0 as eps grows", "more steps are not weaker", "gradients beat noise"),
]


class Wrapped(nn.Module):
    """The tiny ViT with something wrong before or after it."""

    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.inner, self.before, self.after = model, before, after

    def forward(self, pixel_values):
        return self.after(self.inner(self.before(pixel_values)).logits)


def run(model, pixels, wrap=None):
    broken = PixelModel(Wrapped(model.model, **wrap), model.mean, model.std).eval() if wrap else model
    with torch.no_grad():
        labels = broken(pixels).argmax(1)
    return {check.name: check for check in run_checks(broken, pixels, labels)}


@pytest.fixture
def batch():
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_a_sound_model_passes_everything(tiny_vit, batch):
    checks = run(tiny_vit, batch)
    assert list(checks) == NAMES
    assert all(check.passed for check in checks.values()), "\n".join(map(str, checks.values()))
    assert unreliable(list(checks.values()), attack=True) == []
    assert all(p.grad is None and p.requires_grad for p in tiny_vit.parameters())


def noisy(logits):
    return logits + torch.randn_like(logits)


class Staircase(torch.autograd.Function):
    """Pixels in eight levels, with a gradient of zero: masked gradients."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


class Misleading(torch.autograd.Function):
    """The identity, whose gradient points the wrong way."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize(
    ("wrap", "failed"),
    [
        ({"after": lambda z: z.softmax(-1)}, "logits, not probabilities"),
        ({"after": lambda z: z / 0}, "logits, not probabilities"),
        ({"after": noisy}, "deterministic"),
        ({"before": Staircase.apply}, "gradients"),
        ({"before": Staircase.apply}, "accuracy falls to 0 as eps grows"),
        ({"before": Misleading.apply}, "accuracy falls to 0 as eps grows"),
    ],
)
def test_a_broken_model_fails_the_check_for_it(tiny_vit, batch, wrap, failed):
    checks = run(tiny_vit, batch, wrap)
    assert not checks[failed].passed
    assert failed in unreliable(list(checks.values()), attack=True)
    assert str(checks[failed]).startswith("FAILED")


def test_masked_gradients_only_concern_attacks(tiny_vit, batch):
    checks = list(run(tiny_vit, batch, {"before": Staircase.apply}).values())
    assert unreliable(checks, attack=False) == []


def test_wrong_labels_mode_and_range_are_seen(tiny_vit, batch):
    with torch.no_grad():
        labels = (tiny_vit(batch).argmax(1) + 1) % 10
    assert "better than chance" in unreliable(run_checks(tiny_vit, batch, labels), attack=False)
    tiny_vit.model.config.hidden_dropout_prob = 0.1
    for module in tiny_vit.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    tiny_vit.train()
    failed = unreliable(run_checks(tiny_vit, batch, labels), attack=False)
    assert "eval mode" in failed
    assert tiny_vit.training
    dark = unreliable(run_checks(tiny_vit, batch / 255, labels), attack=False)
    assert "input range" in dark


def test_an_attack_that_noise_beats_fails(tiny_vit, batch, monkeypatch):
    from hf_nullspace.robustness import checks

    class Lazy:
        def __init__(self, eps, steps=10):
            self.steps = steps

        def __call__(self, model, pixels, labels, *, seeds):
            return pixels if self.steps >= 10 else 1 - pixels

    monkeypatch.setattr(checks, "PGD", Lazy)
    failed = [name for name, check in run(tiny_vit, batch).items() if not check.passed]
    assert {"gradients beat noise", "more steps are not weaker"} <= set(failed)


def test_an_exception_fails_and_is_told(tiny_vit, batch):
    def explode(x):
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("no backward here")
        return x

    check = run(tiny_vit, batch, {"before": explode})["gradients"]
    assert not check.passed
    assert "RuntimeError: no backward here" in check.detail
