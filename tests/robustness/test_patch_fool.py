"""Patch-Fool against a plain transcription in normalised space, and its threat model in every variant."""

import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import ViTForImageClassification

from hf_nullspace.models.attention import attention_implementation
from hf_nullspace.robustness.attacks.base import seeded_like
from hf_nullspace.robustness.attacks.patch_fool import PatchFool, without_conflict
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.suite import Attacked

SEEDS = [1, 2, 3, 4, 5, 6]
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture
def labels(tiny_vit, pixels):
    with torch.no_grad():
        return tiny_vit(pixels).argmax(1)


def vit_of(layers):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**(SIZES | {"num_hidden_layers": layers}), num_labels=10)
    model = ViTForImageClassification(config).double()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return PixelModel(model, MEAN, STD).eval()


@pytest.fixture
def deep_vit():
    return vit_of(6)


def transcription(model, image, label, noise, *, steps, conflict_power):
    """One image, one patch, in normalised space with torch's Adam and StepLR, as the paper's listing runs."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (model.mean, model.std))
    x, random = (image[None] - mean) / std, (noise[None] - mean) / std
    vit = model.model
    vit.set_attn_implementation("eager")
    with torch.no_grad():
        attention = vit(x, output_attentions=True).attentions[3]  # the middle of six layers
    patch = int(attention.mean(1).mean(1)[0, 1:].argmax())
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    row, column = divmod(patch, 4)
    mask[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    delta = random.clone().requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=0.22)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.95)
    for _ in range(steps):
        outputs = vit(x * (1 - mask) + delta * mask, output_attentions=True)
        ce = F.cross_entropy(outputs.logits, label[None])
        (ce_gradient,) = torch.autograd.grad(ce, delta, retain_graph=True)
        total = ce_gradient.clone()
        for layer in (1, 2):
            log_attention = outputs.attentions[layer].mean(1)[0].log()
            (pull,) = torch.autograd.grad(log_attention[:, 1 + patch].mean(), delta, retain_graph=True)
            if F.cosine_similarity(pull.flatten(), ce_gradient.flatten(), dim=0) < 0:
                pull = pull - (pull * ce_gradient).sum() / ce_gradient.norm() ** conflict_power * ce_gradient
            total += 0.002 * pull
        delta.grad = -total
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            delta.copy_(((delta * std + mean).clamp(0, 1) - mean) / std)
    return (x * (1 - mask) + delta.detach() * mask) * std + mean


@pytest.mark.parametrize("original", [False, True])
def test_it_is_the_transcription(deep_vit, pixels, original):
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    ours = PatchFool(steps=25, original_projection=original)(deep_vit, pixels, labels, seeds=SEEDS)
    noise = seeded_like(pixels, SEEDS, "uniform")
    for b in range(6):
        power = 1 if original else 2
        theirs = transcription(deep_vit, pixels[b], labels[b], noise[b], steps=25, conflict_power=power)
        torch.testing.assert_close(ours[b : b + 1], theirs, rtol=0, atol=1e-5)  # eager attention is float32 inside


def test_conflicting_gradients_are_made_orthogonal():
    gradient = torch.tensor([[3.0, 0.0], [3.0, 0.0]]).view(2, 1, 1, 2)
    pull = torch.tensor([[-2.0, 1.0], [2.0, 1.0]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).view(2, 1, 1, 2)
    torch.testing.assert_close(without_conflict(pull, gradient), expected)
    original = torch.tensor([[4.0, 1.0], [2.0, 1.0]]).view(2, 1, 1, 2)
    torch.testing.assert_close(without_conflict(pull, gradient, original=True), original)
    assert without_conflict(pull, 0 * gradient).isfinite().all()


def changed_patches(adversarial, pixels, patch=4):
    change = (adversarial - pixels).abs().amax(1, keepdim=True)
    return F.max_pool2d(change, patch).flatten(1) > 0


VARIANTS = [
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


@pytest.mark.parametrize("attack", VARIANTS, ids=repr)
def test_only_the_patches_change_and_the_model_is_left_alone(tiny_vit, pixels, labels, attack):
    tiny_vit.train()
    implementation = tiny_vit.model.config._attn_implementation
    adversarial = attack(tiny_vit, pixels, labels, seeds=SEEDS)
    changed = changed_patches(adversarial, pixels)
    assert (changed.sum(1) <= attack.num_patch).all()
    assert changed.any(1).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    change = adversarial - pixels
    if attack.mild == "linf":
        assert change.abs().max() <= 8 / 255 + 1e-12
    if attack.mild == "l2":
        assert change.flatten(2).norm(dim=2).max() <= 0.3 + 1e-12
    if attack.sparse:
        assert ((change.abs().amax(1) > 0).flatten(1).sum(1) <= attack.sparse).all()
    assert tiny_vit.model.config._attn_implementation == implementation == "sdpa"
    assert all(module.training for module in tiny_vit.modules())
    assert all(p.requires_grad and p.grad is None for p in tiny_vit.parameters())


@pytest.mark.parametrize("attack", VARIANTS, ids=repr)
def test_an_image_does_not_depend_on_its_batch(tiny_vit, pixels, attack):
    pixels = torch.cat([pixels, 1 - pixels, pixels.flip(3)])[:16]
    with torch.no_grad():
        labels = tiny_vit(pixels).argmax(1)
    together = attack(tiny_vit, pixels, labels, seeds=range(16))
    for b in (0, 9, 15):
        alone = attack(tiny_vit, pixels[b : b + 1], labels[b : b + 1], seeds=[b])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-7)


def test_patches_are_chosen_by_attention_or_saliency(tiny_vit, pixels, labels):
    with attention_implementation(tiny_vit.model, "eager"):
        attentions = tiny_vit.outputs(pixels, output_attentions=True).attentions[1].detach()
    by_attention = attentions.numpy().mean((1, 2))[:, 1:].argmax(1)
    leaf = pixels.clone().requires_grad_()
    F.cross_entropy(tiny_vit(leaf), labels, reduction="sum").backward()
    strength = leaf.grad.abs().sum(1).unflatten(2, (4, 4)).unflatten(1, (4, 4)).sum((2, 4))
    by_saliency = strength.flatten(1).argmax(1)
    for choice, expected in (("attention", by_attention), ("saliency", by_saliency)):
        adversarial = PatchFool(choice=choice, steps=1)(tiny_vit, pixels, labels, seeds=SEEDS)
        assert changed_patches(adversarial, pixels).int().argmax(1).tolist() == expected.tolist()


@pytest.mark.parametrize(("layers", "index"), [(2, 1), (5, 2), (7, 3), (9, 4), (10, 4), (12, 4)])
def test_the_layer_whose_attention_chooses(layers, index, pixels):
    """Index 4, as the authors' code has it for 12 layers; the middle one of fewer than 10."""
    model = vit_of(layers)
    with torch.no_grad():  # sharper attention, so that layers differ in their choice
        for layer in model.model.vit.layers:
            layer.attention.q_proj.weight.mul_(30)
            layer.attention.k_proj.weight.mul_(30)
        with attention_implementation(model.model, "eager"):
            attentions = model.outputs(pixels, output_attentions=True).attentions
    choices = [a.mean((1, 2))[:, 1:].argmax(1).tolist() for a in attentions]
    assert all(choices[other] != choices[index] for other in range(layers) if other != index)
    labels = torch.zeros(6, dtype=torch.long)
    for attack in (PatchFool(steps=1, attention_weight=0.0), PatchFool(steps=1, attention_layer=index)):
        adversarial = attack(model, pixels, labels, seeds=SEEDS)
        assert changed_patches(adversarial, pixels).int().argmax(1).tolist() == choices[index]


def test_sparse_scores_are_frozen_at_their_step(tiny_vit, pixels, labels):
    """Which pixels change after 6 steps that learn until step 3 is what 3 steps choose, and before any, the start."""

    def places(steps, freeze):
        attack = PatchFool(steps=steps, sparse=32, num_patch=4, sparse_freeze=freeze, choice="saliency")
        return (attack(tiny_vit, pixels, labels, seeds=SEEDS) != pixels).any(1)

    assert torch.equal(places(6, 3), places(3, 200))
    assert torch.equal(places(6, 5), places(5, 200))
    assert not torch.equal(places(6, 3), places(4, 200))
    start = seeded_like(pixels[:, :1], [seed + 1 for seed in SEEDS], "uniform")[:, 0]
    for chosen, frozen, score in zip(places(1, 0), places(6, 0), start, strict=True):
        assert torch.equal(chosen, frozen)
        patches = F.max_pool2d(chosen[None].double(), 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[0] > 0
        assert patches.sum() == 64
        assert score[chosen].min() > score[patches & ~chosen].max()


def test_sparse_scores_end_with_pixels_that_hurt_more(tiny_vit, pixels, labels):
    """After learning, the loss is higher than with the pixels that the start happened to pick."""

    def loss(freeze):
        attack = PatchFool(steps=40, sparse=4, num_patch=4, sparse_freeze=freeze, attention_weight=0.0)
        adversarial = attack(tiny_vit, pixels, labels, seeds=SEEDS)
        return F.cross_entropy(tiny_vit(adversarial), labels).item()

    assert loss(30) > loss(0)


def test_early_stop_drops_finished_images_and_is_not_weaker(tiny_vit, pixels, labels):
    labels[0] = (labels[0] + 1) % 10
    sizes = []
    handle = tiny_vit.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    kwargs = {"steps": 40, "num_patch": 4}
    early = PatchFool(early_stop=True, **kwargs)(tiny_vit, pixels, labels, seeds=SEEDS)
    handle.remove()
    assert sizes[0] == 6
    assert sizes[-1] < 5
    last = PatchFool(**kwargs)(tiny_vit, pixels, labels, seeds=SEEDS)
    wrong = [(tiny_vit(adversarial).argmax(1) != labels).sum() for adversarial in (early, last)]
    assert wrong[0] >= wrong[1] > 1


def model_of(family):
    vision = {**SIZES}
    configs = {
        "ViT": lambda: transformers.ViTConfig(**SIZES, num_labels=5),
        "DeiT": lambda: transformers.DeiTConfig(**SIZES, num_labels=5),
        "Beit": lambda: transformers.BeitConfig(**SIZES, num_labels=5),
        "Dinov2WithRegisters": lambda: transformers.Dinov2WithRegistersConfig(**SIZES, num_labels=5),
        "ViTMSN": lambda: transformers.ViTMSNConfig(**SIZES, num_labels=5),
        "Siglip": lambda: transformers.SiglipConfig(vision_config=vision, num_labels=5),
        "CLIP": lambda: transformers.CLIPConfig(vision_config=vision, num_labels=5),
        "Swin": lambda: transformers.SwinConfig(
            embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2, num_labels=5
        ),
        "ResNet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=5),
    }
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForImageClassification")(configs[family]())


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Beit", "Dinov2WithRegisters", "ViTMSN", "Siglip", "CLIP"])
def test_any_vit_with_attentions(family, pixels):
    model = PixelModel(model_of(family), MEAN, STD).eval()
    labels = torch.zeros(6, dtype=torch.long)
    adversarial = PatchFool(steps=3)(model, pixels.float(), labels, seeds=SEEDS)
    assert changed_patches(adversarial, pixels.float()).sum(1).tolist() == [1] * 6
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}


@pytest.mark.parametrize(("family", "message"), [("Swin", "needs global attention"), ("ResNet", "has no patches")])
def test_models_without_global_attention_are_refused(family, message, pixels):
    model = PixelModel(model_of(family), MEAN, STD).eval()
    with pytest.raises(ValueError, match=message):
        PatchFool(steps=1)(model, pixels.float(), torch.zeros(6, dtype=torch.long), seeds=SEEDS)


def test_a_configuration_that_knows_no_attention_is_left_alone(tiny_vit, pixels, labels):
    tiny_vit.model.other = torch.nn.Identity()
    tiny_vit.model.other.config = types.SimpleNamespace(width=3)
    PatchFool(steps=1)(tiny_vit, pixels, labels, seeds=SEEDS)
    assert vars(tiny_vit.model.other.config) == {"width": 3}


def test_its_cost_in_forward_passes():
    """A step is a forward and a backward pass, and as much again for the attentions."""
    assert Attacked(PatchFool(steps=10)).cost == 1 + 10 * 6
    assert Attacked(PatchFool(steps=10, attention_weight=0.0)).cost == 1 + 10 * 3


def test_an_l_inf_radius_is_at_most_1():
    assert PatchFool(mild="linf", eps=1.0).eps == 1
    assert PatchFool(mild="l2", eps=3.0).eps == 3
    with pytest.raises(ValueError, match=r"PatchFool: eps=1\.5: expected a radius for pixels in \[0, 1\]"):
        PatchFool(mild="linf", eps=1.5)


def test_an_exception_restores_attention_and_mode(tiny_vit, pixels, labels):
    tiny_vit.train()
    seen = []

    def fail(*_):
        seen.append(tiny_vit.model.config._attn_implementation)
        if len(seen) == 3:
            raise RuntimeError("out of memory")

    handle = tiny_vit.model.classifier.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        PatchFool(steps=5)(tiny_vit, pixels, labels, seeds=SEEDS)
    handle.remove()
    assert seen == ["eager"] * 3
    assert tiny_vit.model.config._attn_implementation == "sdpa"
    assert all(module.training for module in tiny_vit.modules())
    assert all(p.requires_grad for p in tiny_vit.parameters())


def test_bf16_stays_finite(tiny_vit, pixels, labels):
    model = PixelModel(tiny_vit.model.bfloat16(), MEAN, STD)
    adversarial = PatchFool(steps=4)(model, pixels.float(), labels, seeds=SEEDS)
    assert adversarial.dtype == torch.float32
    assert adversarial.isfinite().all()


def test_names_leave_out_what_is_switched_off():
    usual = "PatchFool(choice='attention', num_patch=1, steps=250, lr=0.22, attention_weight=0.002"
    assert repr(PatchFool()) == f"{usual})"
    assert repr(PatchFool(mild="linf", eps=8 / 255)) == f"{usual}, mild='linf', eps=8/255)"
    assert repr(PatchFool(sparse=20)) == f"{usual}, sparse=20, sparse_freeze=200)"
    assert repr(PatchFool(early_stop=True, attention_layer=2)) == f"{usual}, attention_layer=2, early_stop=True)"
    assert len({repr(attack) for attack in VARIANTS}) == len(VARIANTS)


def test_bad_settings_are_named(linear, tiny_vit, pixels, labels):
    with pytest.raises(ValueError, match="expected 'attention' or 'saliency' or 'random'"):
        PatchFool(choice="best")
    with pytest.raises(ValueError, match="expected both"):
        PatchFool(mild="linf")
    with pytest.raises(ValueError, match=r"attention_layer=2, but the model has 2 layers"):
        PatchFool(attention_layer=2)(tiny_vit, pixels, labels, seeds=SEEDS)
    with pytest.raises(ValueError, match="the image has 16 patches"):
        PatchFool(num_patch=17)(tiny_vit, pixels, labels, seeds=SEEDS)
    with pytest.raises(TypeError, match="needs a PixelModel"):
        PatchFool()(linear, pixels, labels, seeds=SEEDS)
