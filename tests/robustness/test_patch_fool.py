"""Patch-Fool against a plain transcription in normalised space; which patches and pixels it takes, of which models."""

import types

import pytest
import torch
import torch.nn.functional as F

from hf_nullspace.models.attention import attention_implementation
from hf_nullspace.robustness.attacks.base import seeded_like
from hf_nullspace.robustness.attacks.patch_fool import PatchFool, without_conflict
from hf_nullspace.robustness.pixel_model import PixelModel
from tiny_models import tiny_model

SEEDS = [1, 2, 3, 4, 5, 6]


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
def test_it_is_the_transcription(make_vit, pixels, original):
    model, labels = make_vit(6), torch.tensor([0, 1, 2, 3, 4, 5])
    ours = PatchFool(steps=25, original_projection=original)(model, pixels, labels, seeds=SEEDS)
    noise = seeded_like(pixels, SEEDS, "uniform")
    for b in range(6):
        power = 1 if original else 2
        theirs = transcription(model, pixels[b], labels[b], noise[b], steps=25, conflict_power=power)
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


def test_patches_are_chosen_by_attention_or_saliency(tiny_vit, pixels, predicted):
    with attention_implementation(tiny_vit.model, "eager"):
        attentions = tiny_vit.outputs(pixels, output_attentions=True).attentions[1].detach()
    by_attention = attentions.numpy().mean((1, 2))[:, 1:].argmax(1)
    leaf = pixels.clone().requires_grad_()
    F.cross_entropy(tiny_vit(leaf), predicted, reduction="sum").backward()
    strength = leaf.grad.abs().sum(1).unflatten(2, (4, 4)).unflatten(1, (4, 4)).sum((2, 4))
    by_saliency = strength.flatten(1).argmax(1)
    for choice, expected in (("attention", by_attention), ("saliency", by_saliency)):
        adversarial = PatchFool(choice=choice, steps=1)(tiny_vit, pixels, predicted, seeds=SEEDS)
        assert changed_patches(adversarial, pixels).int().argmax(1).tolist() == expected.tolist()


@pytest.mark.parametrize(("layers", "index"), [(2, 1), (5, 2), (7, 3), (9, 4), (10, 4), (12, 4)])
def test_the_layer_whose_attention_chooses(make_vit, layers, index, pixels):
    """Index 4, as the authors' code has it for 12 layers; the middle one of fewer than 10."""
    model = make_vit(layers)
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


def test_sparse_scores_are_frozen_at_their_step(tiny_vit, pixels, predicted):
    """Which pixels change after 6 steps that learn until step 3 is what 3 steps choose, and before any, the start."""

    def places(steps, freeze):
        attack = PatchFool(steps=steps, sparse=32, num_patch=4, sparse_freeze=freeze, choice="saliency")
        return (attack(tiny_vit, pixels, predicted, seeds=SEEDS) != pixels).any(1)

    assert torch.equal(places(6, 3), places(3, 200))
    assert torch.equal(places(6, 5), places(5, 200))
    assert not torch.equal(places(6, 3), places(4, 200))
    start = seeded_like(pixels[:, :1], [seed + 1 for seed in SEEDS], "uniform")[:, 0]
    for chosen, frozen, score in zip(places(1, 0), places(6, 0), start, strict=True):
        assert torch.equal(chosen, frozen)
        patches = F.max_pool2d(chosen[None].double(), 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[0] > 0
        assert patches.sum() == 64
        assert score[chosen].min() > score[patches & ~chosen].max()


def test_sparse_scores_end_with_pixels_that_hurt_more(tiny_vit, pixels, predicted):
    """After learning, the loss is higher than with the pixels that the start happened to pick."""

    def loss(freeze):
        attack = PatchFool(steps=40, sparse=4, num_patch=4, sparse_freeze=freeze, attention_weight=0.0)
        adversarial = attack(tiny_vit, pixels, predicted, seeds=SEEDS)
        return F.cross_entropy(tiny_vit(adversarial), predicted).item()

    assert loss(30) > loss(0)


def test_early_stop_drops_finished_images_and_is_not_weaker(tiny_vit, pixels, predicted):
    predicted[0] = (predicted[0] + 1) % 10
    sizes = []
    handle = tiny_vit.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    kwargs = {"steps": 40, "num_patch": 4}
    early = PatchFool(early_stop=True, **kwargs)(tiny_vit, pixels, predicted, seeds=SEEDS)
    handle.remove()
    assert sizes[0] == 6
    assert sizes[-1] < 5
    last = PatchFool(**kwargs)(tiny_vit, pixels, predicted, seeds=SEEDS)
    wrong = [(tiny_vit(adversarial).argmax(1) != predicted).sum() for adversarial in (early, last)]
    assert wrong[0] >= wrong[1] > 1


def attacked(classifier, pixels, **settings):
    model = PixelModel(classifier, (0.5,) * 3, (0.25,) * 3).eval()
    return PatchFool(**settings)(model, pixels.float(), torch.zeros(6, dtype=torch.long), seeds=SEEDS)


@pytest.mark.parametrize("family", ["vit", "deit", "beit", "vit_msn", "siglip", "clip", "dinov2_with_registers"])
def test_any_vit_with_attentions(family, pixels):
    model = tiny_model(family)
    adversarial = attacked(model, pixels, steps=3)
    assert changed_patches(adversarial, pixels.float()).sum(1).tolist() == [1] * 6
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}


def test_a_configuration_that_knows_no_attention_is_left_alone(tiny_vit, pixels, predicted):
    tiny_vit.model.other = torch.nn.Identity()
    tiny_vit.model.other.config = types.SimpleNamespace(width=3)
    PatchFool(steps=1)(tiny_vit, pixels, predicted, seeds=SEEDS)
    assert vars(tiny_vit.model.other.config) == {"width": 3}
