"""The adapter against the models' own attention: heads put together are what the module computes."""

import pytest
import torch
from torch import nn

from hf_nullspace.linear.attention import head_outputs
from hf_nullspace.models.attention import (
    NoAttentionWeightsError,
    attention_inputs,
    attention_weights,
    prefix_tokens,
)
from hf_nullspace.models.patch_embedding import embedding_shape
from tiny_models import FAMILIES, images, tiny_model

PREFIX = {"vit": 1, "deit": 2, "beit": 1, "dinov2": 1, "vit_msn": 1, "swin": 0, "siglip": 0, "clip": 1}


def with_biases(model):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model.double()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_heads_are_what_the_module_computes(family):
    """The output projection made the identity, an attention module returns its heads side by side."""
    model = with_biases(tiny_model(family))
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):  # Swin adds it to the scores, whatever the input
            nn.init.zeros_(parameter)
    layers = attention_weights(model)
    assert len(layers) == 2
    outputs = []
    for weights in layers:
        module = model.get_submodule(weights.name)
        for name, last in module.named_children():
            if name in ("o_proj", "out_proj"):
                nn.init.eye_(last.weight)
                nn.init.zeros_(last.bias)
        module.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    inputs = attention_inputs(model, images())
    for weights, tokens, output in zip(layers, inputs, outputs, strict=True):
        heads = head_outputs(weights, tokens)
        side_by_side = heads.transpose(1, 2).flatten(2)
        torch.testing.assert_close(side_by_side, output, rtol=1e-6, atol=1e-6)  # eager attention: float32 softmax


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefix_tokens_are_those_that_are_no_patches(family):
    model = tiny_model(family).double()
    assert prefix_tokens(model) == PREFIX[family]
    if family != "swin":  # whose attention sees windows
        tokens = attention_inputs(model, images())[0].shape[1]
        assert tokens - embedding_shape(model, images()).patches == prefix_tokens(model)


@torch.no_grad()
def test_registers_are_prefix_tokens():
    model = tiny_model("dinov2_with_registers")
    assert prefix_tokens(model) == 4
    assert attention_inputs(model, images().float())[0].shape[1] == 4 + 16


def test_names_of_older_versions_are_found_too():
    """Before transformers 5.12 the maps were called query, key and value, one module deeper."""
    model = tiny_model("vit")
    expected = attention_weights(model)
    for layer in model.vit.layers:
        attention, inner = layer.attention, nn.Module()
        inner.num_attention_heads = attention.num_attention_heads
        inner.query, inner.key, inner.value = attention.q_proj, attention.k_proj, attention.v_proj
        layer.attention = nn.Module()
        layer.attention.attention = inner
    found = attention_weights(model)
    assert [weights.name for weights in found] == [f"vit.layers.{n}.attention.attention" for n in (0, 1)]
    assert all(torch.equal(one.key, other.key) for one, other in zip(found, expected, strict=True))


def test_other_kinds_of_attention_are_named():
    model = tiny_model("vit")
    for layer in model.vit.layers:
        layer.attention.q_proj = nn.Identity()
    with pytest.raises(NoAttentionWeightsError, match=r"transformers 5\.\d+\.\d+ has no linear maps named"):
        attention_weights(model)
    model = tiny_model("vit")
    del model.vit.layers[0].attention.num_attention_heads
    with pytest.raises(NoAttentionWeightsError, match="does not say how many heads"):
        attention_weights(model)
