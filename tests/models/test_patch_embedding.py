"""The hook against oracles that have none: position embeddings, and a reference forward for Swin."""

import copy

import pytest
import torch
from torch import nn

from hf_nullspace.models.patch_embedding import (
    PatchEmbeddingNoise,
    embedding_shape,
    find_patch_embedding,
    patch_embedding_noise,
)
from tiny_models import FAMILIES, images, tiny_model

FLOAT64 = torch.float64


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def random_noise(model, dtype=FLOAT64):
    shape = embedding_shape(model, images())
    return torch.randn(1, shape.patches, shape.features, dtype=dtype, generator=torch.Generator().manual_seed(2))


def noisy_logits_without_a_hook(family, model, pixel_values, noise):
    """The same computation by other means: noise on the patch rows of the position embedding."""
    if family == "swin":  # normalises before the position embedding is added, so: the forward pass, written out
        embeddings, grid = model.swin.embeddings.patch_embeddings(pixel_values)
        hidden = model.swin.embeddings.norm(embeddings + noise)
        hidden = model.swin.layernorm(model.swin.encoder(hidden, grid).last_hidden_state)
        return model.classifier(model.swin.pooler(hidden.transpose(1, 2)).flatten(1))
    model = copy.deepcopy(model)
    if family in ("siglip", "clip"):
        table = model.vision_model.embeddings.position_embedding.weight.data
        table[-noise.shape[1] :] += noise[0]
    else:
        table = next(p for name, p in model.named_parameters() if name.endswith("embeddings.position_embeddings")).data
        table[:, -noise.shape[1] :] += noise
    return model(pixel_values).logits


@torch.no_grad()
def test_noise_equals_noise_on_the_position_embedding(family):
    model = tiny_model(family).to(FLOAT64)
    noise = random_noise(model)
    with patch_embedding_noise(model, noise):
        noisy = model(images()).logits
    expected = noisy_logits_without_a_hook(family, model, images(), noise)
    assert (noisy - model(images()).logits).abs().max() > 1e-3, "the noise has to matter for the test to mean anything"
    torch.testing.assert_close(noisy, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("parts", [2, 3])
def test_the_last_part_gets_the_noise_and_the_others_do_not(family, parts):
    model = tiny_model(family).to(FLOAT64)
    noise, pixel_values = random_noise(model), images()
    clean = model(pixel_values).logits
    with patch_embedding_noise(model, noise):
        noisy = model(pixel_values).logits
    hook = PatchEmbeddingNoise(model)
    with hook.adding(noise, parts):
        together = model(torch.cat([pixel_values] * parts)).logits
        with pytest.raises(ValueError, match=f"a batch of {4 * parts - 1} is not {parts} views"):
            model(images(4 * parts - 1))
    torch.testing.assert_close(together, torch.cat([clean] * (parts - 1) + [noisy]), rtol=1e-12, atol=1e-12)


def test_embedding_shape_is_the_grid_of_patches(family):
    shape = embedding_shape(tiny_model(family), images(dtype=torch.float32))
    assert shape.grid == ((8, 8) if family == "swin" else (4, 4))
    assert (shape.patches, shape.features) == ((64, 12) if family == "swin" else (16, 24))


def test_swin_pads_the_image_to_whole_patches():
    shape = embedding_shape(tiny_model("swin"), torch.zeros(1, 3, 15, 12))
    assert (shape.grid, shape.patches) == ((8, 6), 48)


def test_the_hook_is_off_until_asked_and_leaves_no_trace():
    model, inputs = tiny_model(), images(dtype=torch.float32)
    before = model(inputs).logits
    with pytest.raises(KeyError), patch_embedding_noise(model, torch.ones(1, 16, 24)):
        raise KeyError
    hook = PatchEmbeddingNoise(model)
    assert torch.equal(model(inputs).logits, before)
    hook.remove()
    assert not hook.module._forward_hooks


def test_noise_is_cast_where_it_is_added():
    model = tiny_model().to(torch.bfloat16)
    noise = torch.ones(1, 16, 24, requires_grad=True)
    with patch_embedding_noise(model, noise):
        logits = model(images(dtype=torch.bfloat16)).logits
    (gradient,) = torch.autograd.grad(logits.float().sum(), [noise])
    assert logits.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32


def test_as_many_noises_as_images_go_to_one_image_each():
    model, inputs = tiny_model(), images(dtype=torch.float32)
    noises = torch.randn(len(inputs), 16, 24, generator=torch.Generator().manual_seed(0))
    with patch_embedding_noise(model, noises):
        together = model(inputs).logits
    for index, noise in enumerate(noises):
        with patch_embedding_noise(model, noise[None]):
            torch.testing.assert_close(model(inputs[index : index + 1]).logits[0], together[index])
    hook = PatchEmbeddingNoise(model)
    with hook.adding(noises, 2):
        twice = model(torch.cat([inputs, inputs])).logits
    torch.testing.assert_close(twice[len(inputs) :], together)
    with patch_embedding_noise(model, noises[:2]), pytest.raises(ValueError, match="2 noises for 3 images"):
        model(inputs)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrappers_are_looked_through(wrap):
    model = tiny_model()
    assert find_patch_embedding(wrap(model)) is find_patch_embedding(model)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_refused(in_place):
    model, inputs = tiny_model(), images(dtype=torch.float32)
    if in_place:
        compiled = model
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    compiled(pixel_values=inputs)
    with (
        pytest.raises(RuntimeError, match="ViTForImageClassification is compiled, and a compiled model that ran"),
        patch_embedding_noise(compiled, torch.ones(1, 16, 24)),
    ):
        compiled(pixel_values=inputs)
    assert not find_patch_embedding(model)._forward_hooks
    torch.compiler.reset()


def test_a_noise_that_no_forward_pass_had_is_a_warning():
    model, inputs = tiny_model(), images(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    clean = compiled(pixel_values=inputs).logits
    with (
        pytest.warns(UserWarning, match="no forward pass of ViTForImageClassification .* had the noise"),
        patch_embedding_noise(model, torch.ones(1, 16, 24)),
    ):
        assert torch.equal(compiled(pixel_values=inputs).logits, clean)
    torch.compiler.reset()
