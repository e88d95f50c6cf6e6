"""Each check passes on a sound model and fails on a model that is broken in exactly that way."""

import pytest
import torch
from torch import nn

from hf_nullspace.robustness import checks as each
from hf_nullspace.robustness.attacks.gradient import PGD
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
    ("wrap", "failed", "concerns"),
    [
        ({"after": lambda z: z.softmax(-1)}, "logits, not probabilities", "all"),
        ({"after": lambda z: z / 0}, "logits, not probabilities", "all"),
        ({"after": lambda z: z + torch.randn_like(z)}, "deterministic", "all"),
        ({"before": Staircase.apply}, "gradients", "attacks"),
        ({"before": Staircase.apply}, "accuracy falls to 0 as eps grows", "attacks"),
        ({"before": Misleading.apply}, "accuracy falls to 0 as eps grows", "attacks"),
    ],
)
def test_a_broken_model_fails_the_check_for_it(tiny_vit, batch, wrap, failed, concerns):
    checks = run(tiny_vit, batch, wrap)
    assert not checks[failed].passed
    assert failed in unreliable(list(checks.values()), attack=True)
    about_all = unreliable(list(checks.values()), attack=False)
    assert failed in about_all if concerns == "all" else about_all == []
    assert str(checks[failed]).startswith("FAILED")


def test_wrong_labels_mode_and_range_are_seen(tiny_vit, batch):
    with torch.no_grad():
        labels = (tiny_vit(batch).argmax(1) + 1) % 10
    assert "better than chance" in unreliable(run_checks(tiny_vit, batch, labels), attack=False)
    for module in tiny_vit.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    tiny_vit.train()
    failed = unreliable(run_checks(tiny_vit, batch, labels), attack=False)
    assert "eval mode" in failed
    assert tiny_vit.training
    dark = unreliable(run_checks(tiny_vit, batch / 255, labels), attack=False)
    assert "input range" in dark


@pytest.mark.parametrize(
    ("values", "passed"),
    [
        ([0.0, 0.3, 1.0], True),
        ([0.01, 0.49, 0.51], True),
        ([-0.01, 0.3, 1.0], False),
        ([0.0, 0.3, 1.01], False),
        ([0.5, 0.6, 1.0], False),
        ([0.0, 0.1, 0.5], False),
        ([0.49, 0.5, 0.51], False),
        ([0.0] * 2 + [0.51] * 2000, False),
    ],
)
def test_pixels_are_between_0_and_1_on_both_sides_of_the_middle_and_not_all_alike(values, passed):
    assert each.input_range(torch.tensor(values))[0] == passed


@pytest.mark.parametrize(
    ("n", "right", "falls", "steps"),
    [
        # (radius, steps) -> images that are still right: 8/255 after 2 and after 10, 127.5/255 after 10
        (100, (50, 50, 5), True, True),
        (100, (50, 50, 6), False, True),
        (100, (4, 4, 5), False, True),
        (100, (4, 4, 4), True, True),
        (100, (50, 52, 0), True, True),
        (100, (50, 53, 0), True, False),
        (10, (5, 6, 0), True, True),
        (10, (5, 7, 0), True, False),
        (10, (5, 5, 1), False, True),
    ],
)
def test_verdicts_on_attacks_by_hand(n, right, falls, steps):
    table = dict(zip([(8 / 255, 2), (8 / 255, 10), (0.5, 10)], right, strict=True))
    found = [check(lambda *asked: table[asked], 8 / 255, n) for check in (each.falls_to_zero, each.more_steps)]
    assert [passed for passed, _ in found] == [falls, steps]
    assert f"{right[1]} right at 8/255, {right[2]} at 127.5/255" in found[0][1]


def test_an_attack_of_a_radius_and_steps_runs_once(tiny_vit, batch, monkeypatch):
    asked = []
    inner = PGD.perturb
    monkeypatch.setattr(PGD, "perturb", lambda self, *given: asked.append(self) or inner(self, *given))
    run(tiny_vit, batch)
    assert asked == [PGD(8 / 255), PGD(0.5), PGD(8 / 255, steps=2)]


@pytest.mark.parametrize(("rows", "passed"), [(6, True), (10, False)])
def test_gradients_that_are_zero_for_most_pixels_are_not_sound(rows, passed):
    """Of each image the first rows carry no gradient; none of the images has a gradient of zero."""
    gradient = torch.ones(16, 3, 16, 16)
    gradient[:, :, :rows] = 0
    seen = f"zero for 0 of 16 images, {100 * rows / 16:.0f}% of all values zero"
    assert each.gradients(gradient) == (passed, seen)
    gradient[3] = 0
    assert not each.gradients(gradient)[0]
    gradient[3] = torch.inf
    assert not each.gradients(gradient)[0]


@pytest.mark.parametrize(
    ("after", "passed", "words"),
    [
        (lambda z: z, True, "logits in ["),
        (lambda z: z.log_softmax(-1), True, "log-probabilities in ["),
        (lambda z: z.softmax(-1) * 1.01, True, "logits in ["),
        (lambda z: z.softmax(-1) * 1.0005, False, "sums to 1"),
        (lambda z: z.softmax(-1) - 1e-3, True, "logits in ["),
        (lambda z: -z.exp(), True, "logits in ["),
    ],
)
def test_what_logits_are_taken_for(after, passed, words):
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = each.logits_not_probabilities(after(logits))
    assert found[0] == passed
    assert words in found[1]


@pytest.mark.parametrize(("right", "classes", "passed"), [(4, 10, True), (3, 10, False), (2, 10, False), (16, 2, True),
                                                          (15, 2, True), (14, 2, False)])  # fmt: skip
def test_better_than_chance_is_twice_chance_or_nine_in_ten(right, classes, passed):
    logits = torch.zeros(16, classes)
    logits[:, 0] = 1
    labels = torch.tensor([0] * right + [1] * (16 - right))
    assert each.better_than_chance(logits, labels)[0] == passed


@pytest.mark.parametrize(("gap", "passed"), [(0.0, True), (0.9e-4, True), (1.1e-4, False)])
def test_two_forwards_may_differ_by_rounding(gap, passed):
    assert each.deterministic(torch.zeros(2, 3), torch.tensor([[0.0, gap, 0.0], [0.0, 0.0, 0.0]]))[0] == passed


def test_an_attack_that_noise_beats_fails(tiny_vit, batch, monkeypatch):
    class Lazy:
        def __init__(self, eps, steps=10):
            self.steps = steps

        def __call__(self, model, pixels, labels, *, seeds):
            return pixels if self.steps >= 10 else 1 - pixels

    monkeypatch.setattr(each, "PGD", Lazy)
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
