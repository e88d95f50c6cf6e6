"""The LayerNorm direction: exact where every branch reads through a LayerNorm, refuted where it does not."""

import pytest
import torch
import transformers
from torch import nn

from hf_nullspace.linear.layer_norm import (
    DirectionCheck,
    NotANullspaceError,
    check_direction,
    exact_encoder_nullspace,
)
from tiny_models import FAMILIES, IMAGE, LABELS, SIZES, tiny_model

STAGES = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "strides": [4, 2], "patch_sizes": [7, 3]}
HEADS = {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
SUBSAMPLE = ["Subsample", 4, 4, 2, 2, 2]

# Families of this test only: a configuration, the class, and where the patch embedding is if its patches overlap.
OTHERS = {
    "data2vec": lambda: transformers.Data2VecVisionForImageClassification(
        transformers.Data2VecVisionConfig(**SIZES, **IMAGE, **LABELS, use_absolute_position_embeddings=True)
    ),
    "ijepa": lambda: transformers.IJepaForImageClassification(transformers.IJepaConfig(**SIZES, **IMAGE, **LABELS)),
    "swinv2": lambda: transformers.Swinv2ForImageClassification(
        transformers.Swinv2Config(
            **LABELS, image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
    ),
    "hiera": lambda: transformers.HieraForImageClassification(
        transformers.HieraConfig(
            **LABELS, image_size=[32, 32], embed_dim=8, depths=[1, 1], num_heads=[1, 2], num_query_pool=1,
            masked_unit_size=[4, 4], masked_unit_attention=[True, False], mlp_ratio=2.0,
        )
    ),
    "segformer": lambda: transformers.SegformerForImageClassification(
        transformers.SegformerConfig(**STAGES, **HEADS, **LABELS)
    ),
    "poolformer": lambda: transformers.PoolFormerForImageClassification(
        transformers.PoolFormerConfig(**STAGES, **LABELS, padding=[2, 1], mlp_ratio=2.0)
    ),
    "levit": lambda: transformers.LevitForImageClassification(
        transformers.LevitConfig(
            **LABELS, image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1],
            key_dim=[4, 4, 4], down_ops=[SUBSAMPLE, SUBSAMPLE],
        )
    ),
}  # fmt: skip
EMBEDDING_TYPES = {
    "hiera": "HieraPatchEmbeddings",
    "segformer": "SegformerOverlapPatchEmbeddings",
    "poolformer": "PoolFormerEmbeddings",
    "levit": "LevitPatchEmbeddings",
}


def build(family):
    """A tiny model, images for it, and its patch embedding where it has to be named (the first of its type)."""
    if family in FAMILIES:
        return tiny_model(family), images(16), None
    torch.manual_seed(0)
    model = OTHERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    if family not in EMBEDDING_TYPES:
        return model, images(16), None
    module = next(module for module in model.modules() if type(module).__name__ == EMBEDDING_TYPES[family])
    return model, images(32), module


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [*FAMILIES, "data2vec", "ijepa", "swinv2", "hiera", "segformer"])
def test_one_constant_per_token_changes_nothing(family):
    model, pixel_values, module = build(family)
    found = exact_encoder_nullspace(model, pixel_values, patch_embedding=module)
    assert found.check.norm == 1000
    assert found.check.logit_change < 1e-12 * found.check.largest_logit
    assert found.check.control_change > 0.1 * found.check.largest_logit
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters()), "the model itself is not cast"


@pytest.mark.parametrize(("family", "norm_layer"), [("poolformer", nn.GroupNorm), ("levit", nn.BatchNorm1d)])
def test_models_with_another_normalisation_refute_it(family, norm_layer):
    model, pixel_values, module = build(family)
    assert any(isinstance(part, norm_layer) for part in model.modules())
    with pytest.raises(NotANullspaceError, match=r"changes the logits by \d"):
        exact_encoder_nullspace(model, pixel_values, patch_embedding=module)
    check = check_direction(model.double(), pixel_values, patch_embedding=module)
    assert check.logit_change > 1e-3 * check.control_change


def test_without_a_layer_norm_the_direction_is_seen():
    model = tiny_model("vit")
    model.vit.layers[0].layernorm_before = nn.Identity()
    with pytest.raises(NotANullspaceError, match="ViTForImageClassification: one constant per token, of norm 50"):
        exact_encoder_nullspace(model, images(16), norm=50)


def test_the_verdict_is_a_millionth_of_the_control():
    """Float32 attention has 1e-7 of the control; a LayerNorm that lets a share of the means pass has more."""
    for share, verdict in ((1e-7, True), (1e-6, True), (1.01e-6, False), (1e-5, False)):
        assert DirectionCheck(1000.0, share * 8, 8.0, 1.0).is_rounding == verdict


def test_a_sample_is_added_where_the_position_embedding_is():
    """Without our hook: the noise as part of the position embedding of a ViT in float64."""
    model, pixel_values = tiny_model("vit").double(), images(16).double()
    found = exact_encoder_nullspace(model, pixel_values)
    noise = found.sample(torch.Generator().manual_seed(2), norm=1858.0)
    assert noise.shape == (1, 16, 24)
    assert (found.dimension, found.patches, found.features) == (16, 16, 24)
    assert torch.linalg.vector_norm(noise).item() == pytest.approx(1858, rel=1e-12)
    assert noise.std(-1).max() < 1e-12
    assert noise[0, :, 0].unique().numel() == 16
    with torch.no_grad():
        clean = model(pixel_values).logits
        model.vit.embeddings.position_embeddings[:, 1:] += noise
        torch.testing.assert_close(model(pixel_values).logits, clean, rtol=1e-11, atol=1e-12)


def test_own_precision_loses_the_bits_that_large_constants_push_out():
    model, pixel_values = tiny_model("vit"), images(16)
    small, large = (check_direction(model, pixel_values, norm=norm) for norm in (10.0, 1e5))
    assert 0 < small.logit_change < 1e-4 < large.logit_change
    assert not model.training
    assert check_direction(model.train(), pixel_values, norm=10.0) == small
    assert model.training
    assert check_direction(torch.compile(model, backend="eager"), pixel_values, norm=10.0) == small
    assert (
        check_direction(model, pixel_values, norm=10.0, seed=0)
        == small
        != check_direction(model, pixel_values, norm=10.0, seed=1)
    )


def test_constants_and_control_are_opposite_and_equally_large():
    """What really arrives at the first layer: all of the constants is token mean, nothing of the control is."""
    model, arrived = tiny_model("vit").double(), []
    model.vit.layers[0].register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
    check = check_direction(model, images(16), norm=70.0)
    clean, shifted, controlled = arrived[-3:]
    for noise, share in ((shifted - clean, 1.0), (controlled - clean, 0.0)):
        means = noise.mean(-1, keepdim=True).expand_as(noise)
        for image, of_image in zip(noise, means, strict=True):
            assert image.norm().item() == pytest.approx(check.norm, rel=1e-12)
            assert of_image.norm().item() == pytest.approx(share * check.norm, abs=1e-10)
        assert torch.equal(noise[:, 0], torch.zeros_like(noise[:, 0])), "CLS is no patch"


def test_what_cannot_be_checked_is_an_error():
    model = tiny_model("vit")
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(NotANullspaceError, match="there is nothing to verify"):
        exact_encoder_nullspace(model, images(16))
