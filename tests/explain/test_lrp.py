"""LRP: relevance is conserved, and a hand-written transcription by plain autograd (x * dZ/dx) finds the same."""

import pytest
import torch
from one_layer import one_layer_model, one_layer_parts
from torch.nn import functional
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from hf_nullspace.explain.lrp import linear_rule, lrp_map, propagate_relevance, safe_divide, sum_rule
from hf_nullspace.models.attention import NoAttentionWeightsError
from tiny_models import IMAGE, LABELS, SIZES, images, tiny_model

# ---- the whole, by hand: the authors' way, in which every rule is x * (gradient of Z in x, against R / Z)


def shares(operation, parts, relevance):
    leaves = [part.detach().requires_grad_() for part in parts]
    outcome = operation(*leaves)
    gradients = torch.autograd.grad(outcome, leaves, relevance / outcome.detach())
    return [leaf.detach() * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]


def through_linear(inputs, linear, relevance):
    weight = linear.weight.detach()

    def both(high, low):
        return functional.linear(high, weight.relu()) + functional.linear(low, -(-weight).relu())

    return sum(shares(both, (inputs.relu(), -(-inputs).relu()), relevance))


def through_sum(first, second, relevance):
    one, other = shares(torch.add, (first, second), relevance)
    part = one.sum().abs() / (one.sum().abs() + other.sum().abs())
    return one * (part * relevance.sum() / one.sum()), other * ((1 - part) * relevance.sum() / other.sum())


def lrp_by_hand(model, image, target):
    """The map and the relevance of the embeddings of one image, for a model of one layer."""
    part = one_layer_parts(model, image)
    (gradient,) = torch.autograd.grad(part["logits"][0, target], [part["attention"]], retain_graph=True)
    part = {name: tensor.detach() for name, tensor in part.items()}
    layer = model.vit.layers[0]
    relevance = torch.zeros_like(part["y"])
    relevance[:, 0] = through_linear(part["cls"], model.classifier, torch.eye(5, dtype=torch.float64)[[target]])
    skip, branch = through_sum(part["y"], part["mlp"], relevance)
    branch = through_linear(part["hidden"], layer.mlp.fc2, branch)
    relevance = skip + through_linear(part["norm_after"], layer.mlp.fc1, branch)
    skip, branch = through_sum(part["x"], part["attended"], relevance)
    branch = through_linear(part["joined"], layer.attention.o_proj, branch).unflatten(-1, (2, -1)).transpose(1, 2)
    of_attention, of_value = (one / 2 for one in shares(torch.matmul, (part["attention"], part["v"]), branch))
    product = shares(lambda q, k: q @ k.transpose(2, 3), (part["q"], part["k"]), of_attention)
    for name, of_heads in zip("qkv", (product[0] / 2, product[1] / 2, of_value), strict=True):
        joined = of_heads.transpose(1, 2).flatten(2)
        skip = skip + through_linear(part["norm_before"], getattr(layer.attention, f"{name}_proj"), joined)
    map_ = torch.clamp(gradient * of_attention, min=0)[0].mean(0)[0, 1:].reshape(4, 4)
    return map_, skip[0]


@pytest.mark.parametrize("target", [0, 3])
def test_a_hand_written_model_with_plain_autograd_has_the_same_map(target):
    model = one_layer_model()
    maps, relevance = lrp_map(model, images(), target), propagate_relevance(model, images(), target)
    for index in range(3):
        expected, tokens = lrp_by_hand(model, images()[index : index + 1], target)
        torch.testing.assert_close(relevance.tokens[0][index], tokens, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(maps[index], expected, rtol=1e-8, atol=1e-14)
        assert expected.std() > 0


def test_layers_are_multiplied_the_later_on_the_left():
    model = tiny_model("deit").double()
    found = propagate_relevance(model, images(), 1)
    first, last = (
        torch.eye(18) + (relevance * gradient).clamp(min=0).mean(1)
        for relevance, gradient in zip(found.attentions, found.gradients, strict=True)
    )
    expected = (last @ first)[:, 0, 2:].reshape(3, 4, 4)  # CLS and the distillation token are no patches
    torch.testing.assert_close(lrp_map(model, images(), 1), expected, rtol=0, atol=1e-12 * expected.max().item())


# ---- what holds for every model


@pytest.mark.parametrize("family", ["vit", "deit", "vit_msn"])
def test_relevance_is_conserved_in_every_layer(family):
    """From 1 at the logit down to the embeddings, per image."""
    found = propagate_relevance(tiny_model(family).double(), images())
    assert len(found.tokens) == len(found.attentions) == 2
    for tokens in found.tokens:
        torch.testing.assert_close(tokens.sum((1, 2)), torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0)


def test_relevance_of_half_precision_is_handed_down_in_float32():
    found = [propagate_relevance(tiny_model("deit").bfloat16(), images().bfloat16())]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(propagate_relevance(tiny_model("deit"), images().float()))
        maps = lrp_map(tiny_model("deit"), images().float())
    assert maps.dtype == torch.float32
    for one in found:
        torch.testing.assert_close(one.tokens[0].sum((1, 2)), torch.ones(3), rtol=1e-5, atol=0)


def test_nothing_is_divided_by_zero():
    assert safe_divide(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, -4.0, 0.0])).tolist() == [0.0, -0.5, 0.0]
    zero = torch.zeros(1, 2, 3)
    assert linear_rule(zero, torch.ones(4, 3), torch.ones(1, 2, 4)).abs().sum() == 0
    assert all(term.abs().sum() == 0 for term in sum_rule(torch.ones(1, 2, 3), -torch.ones(1, 2, 3), zero + 1))


def test_a_model_of_two_heads_is_named():
    two_heads = DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, **IMAGE, **LABELS))
    with pytest.raises(NoAttentionWeightsError, match=r"WithTeacher: .*classifier.*ViT, DeiT or ViTMSN"):
        lrp_map(two_heads, images())
