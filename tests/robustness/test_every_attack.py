"""What holds for every attack: its threat model, images on their own, settings and names, precisions, devices."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from hf_nullspace.robustness.attacks.auto import AutoAttack
from hf_nullspace.robustness.attacks.base import readable
from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD
from hf_nullspace.robustness.attacks.patch_fool import PatchFool
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.plans import ATTACKS as KINDS
from hf_nullspace.robustness.suite import Attacked

SEEDS = [11, 12, 13, 14, 15, 16]
BOUNDED = [
    FGSM(4 / 255),
    PGD(8 / 255),
    PGD(8 / 255, random_start=False),
    PGD(0.5, norm="l2"),
    MIM(8 / 255),
    MIM(8 / 255, decay=0.5, steps=3),
]
PATCH = [
    PatchFool(steps=6),
    PatchFool(steps=6, num_patch=3),
    PatchFool(steps=6, choice="saliency"),
    PatchFool(steps=6, choice="random", num_patch=2),
    PatchFool(steps=6, attention_weight=0.0, choice="random"),
    PatchFool(steps=6, mild="linf", eps=8 / 255),
    PatchFool(steps=6, mild="l2", eps=0.3),
    PatchFool(steps=6, sparse=5, num_patch=2, sparse_freeze=4),
    PatchFool(steps=6, original_projection=True, early_stop=True),
]
ATTACKS = [*BOUNDED, CW(c=20), CW(c=1e-2, steps=20, binary_search_steps=3, abort_early=True), *PATCH]
PRECISE = [*BOUNDED, CW(c=20), PatchFool(steps=20)]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_image_does_not_depend_on_its_batch(tiny_vit, pixels, attack):
    pixels = torch.cat([pixels, 1 - pixels, pixels.flip(3)])[:16]
    with torch.no_grad():
        labels = tiny_vit(pixels).argmax(1)
    together = attack(tiny_vit, pixels, labels, seeds=range(16))
    assert ((together - pixels).flatten(1).norm(dim=1) > 0).sum() > 8
    tolerance = 1e-7 if isinstance(attack, PatchFool) else 1e-9  # eager attention is float32 inside
    for b in (0, 7, 15):
        alone = attack(tiny_vit, pixels[b : b + 1], labels[b : b + 1], seeds=[b])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_the_threat_model_holds_and_the_model_is_left_alone(tiny_vit, pixels, predicted, left_as_it_was, attack):
    with left_as_it_was(), torch.no_grad():
        adversarial = attack(tiny_vit, pixels, predicted, seeds=SEEDS)
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    change = adversarial - pixels
    if isinstance(attack, PatchFool):
        changed = F.max_pool2d(change.abs().amax(1, keepdim=True), 4).flatten(1) > 0
        assert (changed.sum(1) <= attack.num_patch).all()
        assert changed.any(1).all()
        if attack.mild == "linf":
            assert change.abs().max() <= 8 / 255 + 1e-12
        if attack.mild == "l2":
            assert change.flatten(2).norm(dim=2).max() <= 0.3 + 1e-12
        if attack.sparse:
            assert ((change.abs().amax(1) > 0).flatten(1).sum(1) <= attack.sparse).all()
    if attack in BOUNDED:
        size = change.flatten(1).abs().amax(1) if attack.norm == "linf" else change.flatten(1).norm(dim=1)
        assert (size <= attack.eps + 1e-12).all()
        assert (size > attack.eps / 2).all()


@pytest.mark.parametrize("attack", [PGD(), PatchFool(steps=5)], ids=repr)
def test_an_exception_leaves_the_model_as_it_was(tiny_vit, pixels, predicted, left_as_it_was, attack):
    seen = []

    def fail(*_):
        seen.append(tiny_vit.model.config._attn_implementation)
        if len(seen) == 3:
            raise RuntimeError("out of memory")

    handle = tiny_vit.model.classifier.register_forward_hook(fail)
    with left_as_it_was(), pytest.raises(RuntimeError, match="out of memory"):
        attack(tiny_vit, pixels, predicted, seeds=SEEDS)
    handle.remove()
    assert seen == ["eager" if isinstance(attack, PatchFool) else "sdpa"] * 3


def test_inside_inference_mode(tiny_vit, pixels, predicted):
    with torch.inference_mode():
        inner = FGSM()(tiny_vit, pixels * 1, predicted * 1)
    torch.testing.assert_close(inner, FGSM()(tiny_vit, pixels, predicted), rtol=0, atol=0)


# ---- settings and names


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind in KINDS.values() for field in dataclasses.fields(kind)],
    ids=lambda value: getattr(value, "name", None),
)
def test_no_setting_takes_what_is_no_value_of_its_kind(kind, field):
    """Also those that will be added: every number needs a smallest value."""
    wrong = [math.nan, math.inf, -1, -0.5, "other", [1]]
    wrong += [] if field.default is None else [None]
    wrong += [1] if isinstance(field.default, bool) else [True]
    wrong += [2.5] if "int" in str(field.type) else []
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{kind.__name__}: {field.name}=.*: expected") as refused:
            kind(**{field.name: value})
        assert "\n" not in str(refused.value)


USUAL = "choice='attention', num_patch=1, steps=250, lr=0.22, attention_weight=0.002"


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (FGSM(), "FGSM(eps=1/255)"),
        (FGSM(8 / 225), "FGSM(eps=0.0355556)"),
        (PGD(), "PGD(eps=8/255, step=2/255, steps=10, norm='linf', random_start=True)"),
        (PGD(0.5, norm="l2"), "PGD(eps=0.5, step=0.125, steps=10, norm='l2', random_start=True)"),
        (MIM(), "MIM(eps=1/255, step=0.1/255, steps=10, decay=1)"),
        (AutoAttack(), "AutoAttack(eps=8/255, norm='linf', targets=9, queries=5000, iterations=100)"),
        (PatchFool(), f"PatchFool({USUAL})"),  # what is switched off is left out
        (PatchFool(mild="linf", eps=8 / 255), f"PatchFool({USUAL}, mild='linf', eps=8/255)"),
        (PatchFool(sparse=20), f"PatchFool({USUAL}, sparse=20, sparse_freeze=200)"),
        (PatchFool(early_stop=True, attention_layer=2), f"PatchFool({USUAL}, attention_layer=2, early_stop=True)"),
    ],
)
def test_a_name_says_every_setting(attack, name):
    assert repr(attack) == name


def test_variants_have_names_of_their_own():
    assert len({repr(attack) for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize(
    ("value", "written"),
    [(8 / 255, "8/255"), (0.25 / 255, "0.25/255"), (1.0, "1"), (0.2, "0.2"), (0.0, "0"), (0.1234567, "0.123457"),
     (3, "3"), (None, "None"), ("linf", "'linf'"), (1e-3 / 255, "0.001/255"), (1.1e-9 + 0.002, "0.002"),
     (-4 / 255, "-4/255")],
)  # fmt: skip
def test_a_setting_is_written_as_one_writes_it(value, written):
    assert readable(value) == written


# ---- cost


@pytest.mark.parametrize(
    ("attack", "steps"),
    [(FGSM(), 1), (PGD(steps=7), 7), (PGD(0.5, norm="l2", steps=3), 3), (MIM(steps=5), 5), (CW(steps=9), 1 + 9)],
    ids=repr,
)
def test_one_forward_and_backward_per_step(tiny_vit, pixels, predicted, attack, steps):
    """CW's first forward finds out which images are wrong already."""
    forwards, backwards = [], []
    tiny_vit.model.register_forward_hook(lambda *_: forwards.append(1))
    tiny_vit.model.classifier.register_full_backward_hook(lambda *_: backwards.append(1))
    attack(tiny_vit, pixels, predicted, seeds=SEEDS)
    assert len(forwards) == steps
    assert len(backwards) == steps - isinstance(attack, CW)


@pytest.mark.parametrize(
    ("attack", "passes"),
    [
        (FGSM(), 3),
        (PGD(steps=7), 7 * 3),
        (CW(steps=9, binary_search_steps=2), 2 * 9 * 3),
        # a forward and a backward pass, and as much again for the attentions
        (PatchFool(steps=10), 10 * 6),
        (PatchFool(steps=10, attention_weight=0.0), 10 * 3),
        # APGD-CE, and APGD-DLR and FAB on each target: a forward and a backward pass a step; Square: its queries
        (AutoAttack(), 100 * 3 * (1 + 9 + 9) + 5000),
        (AutoAttack(targets=2, iterations=5, queries=20), 5 * 3 * 5 + 20),
    ],
)
def test_its_cost_in_forward_passes(attack, passes):
    assert Attacked(attack).cost == 1 + passes


# ---- precisions and devices


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("attack", PRECISE, ids=repr)
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attack", [*BOUNDED, CW(c=20), PatchFool(steps=5)], ids=repr)
def test_on_a_gpu_as_on_the_cpu(tiny_vit, pixels, attack, dtype):
    """The threat model holds and the attack works; in float32 the random start and most signs are the CPU's."""
    model, pixels = PixelModel(tiny_vit.model.to("cuda", dtype), tiny_vit.mean, tiny_vit.std), pixels.float()
    labels = torch.arange(6)
    adversarial = attack(model, pixels.cuda(), labels.cuda(), seeds=SEEDS)
    assert adversarial.is_cuda
    assert adversarial.dtype == torch.float32
    torch.testing.assert_close(attack.project(adversarial, pixels.cuda()), adversarial, rtol=0, atol=1e-6)
    if dtype == torch.float32:
        model = PixelModel(tiny_vit.model.to("cpu"), tiny_vit.mean, tiny_vit.std)
        expected = attack(model, pixels, labels, seeds=SEEDS)
        assert ((adversarial.cpu() - expected).abs() < 1e-3).float().mean() > 0.9
