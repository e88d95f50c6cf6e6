"""Attention maps and their gradients: those of the model itself, and nothing of the model is changed by looking."""

import pytest
import torch

from hf_nullspace.explain.lrp import lrp_map
from hf_nullspace.models.attention import (
    NoAttentionWeightsError,
    attention_gradients,
    attention_inputs,
    attention_maps,
    pre_norm_layers,
)
from tiny_models import FAMILIES, images, tiny_model


def state(model):
    """Everything about a model that looking at it could change."""
    return (
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_maps_are_those_of_eager_attention(family):
    model = tiny_model(family)
    maps = attention_maps(model, images(dtype=torch.float32))
    with torch.no_grad():
        sdpa = model(pixel_values=images(dtype=torch.float32)).logits
        model.set_attn_implementation("eager")
        output = model(pixel_values=images(dtype=torch.float32), output_attentions=True)
    assert len(maps) == len(output.attentions) == 2
    # float32 rounds by 6e-8 of values below 4; each of 2 layers has 4 products with sums of at most 32 terms.
    rounding = {"rtol": 0, "atol": 2 * 4 * 32 * 6e-8 * 4}
    for ours, theirs in zip(maps, output.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, **rounding)
    torch.testing.assert_close(output.logits, sdpa, **rounding)


@pytest.mark.parametrize("look", [attention_maps, attention_gradients, lrp_map])
@pytest.mark.parametrize("family", ["vit", "deit"])
def test_nothing_is_changed_by_looking(family, look):
    model = tiny_model(family)
    model.train()
    next(model.children()).eval()  # mixed modes
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    modes = []
    model.register_forward_pre_hook(lambda module, args: modes.append(any(part.training for part in module.modules())))
    before = state(model)
    assert "sdpa" in before[3]
    look(model, images(dtype=torch.float32))
    assert state(model) == before
    assert modes == [False]
    with pytest.raises(ValueError, match="doesn't match model"):
        look(model, torch.zeros(1, 3, 20, 20))
    assert state(model) == before


def test_a_frozen_model_without_gradients_still_has_those_of_its_attention():
    model = tiny_model("deit").double()
    expected = attention_gradients(model, images()).gradients
    model.requires_grad_(False)
    with torch.no_grad():
        frozen = attention_gradients(model, images()).gradients
    with torch.inference_mode():
        inference = attention_gradients(model, images()).gradients
    for one, other, another in zip(expected, frozen, inference, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, another)


def test_targets():
    model = tiny_model("vit").double()
    predicted = attention_gradients(model, images())
    with torch.no_grad():
        assert torch.equal(predicted.targets, model(pixel_values=images()).logits.argmax(1))
    for targets in (2, torch.tensor(2), torch.tensor([2, 2, 2]), [2, 2, 2]):
        found = attention_gradients(model, images(), targets)
        assert found.targets.tolist() == [2, 2, 2]


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_the_gradients_are_finite_differences(family):
    """One layer's output is computed again from an attention map that is moved a little, forth and back."""
    model = tiny_model(family).double()
    found = attention_gradients(model, images(1), 3)
    generator = torch.Generator().manual_seed(2)
    step = 1e-5
    for layer in (0, 1):
        direction = torch.randn(found.attentions[layer].shape, dtype=torch.float64, generator=generator)
        logits = [
            logits_with(model, family, layer, found.attentions[layer] + sign * step * direction) for sign in (1, -1)
        ]
        slope = (logits[0] - logits[1])[0, 3] / (2 * step)
        torch.testing.assert_close((found.gradients[layer] * direction).sum(), slope, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def logits_with(model, family, layer, attention):
    """Logits where one layer's output is recomputed by hand from another attention map."""
    module, inputs = getattr(model, family).layers[layer].attention, attention_inputs(model, images(1))[layer]
    values = module.v_proj(inputs).unflatten(-1, (2, -1)).transpose(1, 2)
    output = module.o_proj((attention @ values).transpose(1, 2).flatten(2))
    handle = module.register_forward_hook(lambda module, args, original: (output, attention))
    try:
        return model(pixel_values=images(1)).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("look", [attention_maps, attention_inputs])
@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel])
def test_wrappers_are_looked_through(wrap, look):
    model = tiny_model("vit").double()
    pairs = zip(look(wrap(model), images()), look(model, images()), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_other_models_are_named():
    headless = tiny_model("vit")
    headless.classifier = torch.nn.Identity()
    with pytest.raises(NoAttentionWeightsError, match="its classifier is no linear map"):
        pre_norm_layers(headless)
