"""Maps against transcriptions in NumPy, a hand-written one-layer model, and what the nullspace says of them."""

import numpy as np
import pytest
import torch

from hf_nullspace.explain.grid import all_maps
from hf_nullspace.explain.maps import MAPS, correlation, saliency_maps
from hf_nullspace.models.attention import attention_gradients
from tiny_models import images, tiny_model

PREFIX = {"vit": 1, "deit": 2}
METHODS = [*MAPS, "lrp"]


# ---- the definitions, written out in NumPy for one image


def raw_by_hand(attentions, gradients, prefix):
    return attentions[-1].mean(0)[0, prefix:]


def rollout_by_hand(attentions, gradients, prefix):
    product = np.eye(attentions[0].shape[-1])
    for attention in attentions:
        mixed = attention.mean(0) + np.eye(len(product))
        product = np.matmul(mixed / mixed.sum(axis=1)[:, None], product)
    return product[0, prefix:]


def grad_cam_by_hand(attentions, gradients, prefix):
    total = 0
    for attention, gradient in zip(attentions[-1], gradients[-1], strict=True):
        total = total + attention[0, prefix:] * np.mean(gradient[0, prefix:])
    return np.maximum(total / len(attentions[-1]), 0)


def generic_by_hand(attentions, gradients, prefix):
    relevance = np.eye(attentions[0].shape[-1])
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + np.mean(np.maximum(attention * gradient, 0), axis=0) @ relevance
    return relevance[0, prefix:]


BY_HAND = {"raw": raw_by_hand, "rollout": rollout_by_hand, "grad_cam": grad_cam_by_hand, "generic": generic_by_hand}


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("family", ["vit", "deit"])
def test_maps_are_the_numpy_transcription(family, method):
    model = tiny_model(family).double()
    maps = saliency_maps(model, images(), [method], targets=2)[method]
    assert maps.shape == (3, 4, 4)
    assert maps.min() >= 0
    assert maps.flatten(1).std(1).max() > 0  # Grad-CAM may find nothing that speaks for the class
    found = attention_gradients(model, images(), 2)
    for index in range(3):
        attentions, gradients = ([layer[index].numpy() for layer in one] for one in (found.attentions, found.gradients))
        expected = BY_HAND[method](attentions, gradients, PREFIX[family]).reshape(4, 4)
        # The terms of a map cancel, and each rounds by 1e-16 of its own size: about that of the largest value.
        np.testing.assert_allclose(maps[index], expected, rtol=0, atol=1e-12 * expected.max())


# ---- what holds for every map


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_an_image_has_the_same_map_alone_and_in_a_batch(family):
    model = tiny_model(family).double()
    targets = torch.tensor([4, 0, 2])
    together = all_maps(model, images(), METHODS, targets)
    assert list(together) == METHODS
    for index in range(3):
        alone = all_maps(model, images()[index : index + 1], METHODS, targets[index : index + 1])
        for method, maps in alone.items():
            expected, rounding = together[method][index], 1e-7 if method == "lrp" else 1e-12
            assert expected.min() >= 0
            torch.testing.assert_close(maps[0], expected, rtol=0, atol=rounding * expected.max().item())


def test_the_class_matters_to_maps_of_gradients_only():
    model = tiny_model("vit").double()
    one, other = (saliency_maps(model, images(), targets=target) for target in (0, 3))
    assert [method for method in MAPS if not torch.equal(one[method], other[method])] == ["grad_cam", "generic"]
    predicted = attention_gradients(model, images()).targets
    for method, maps in saliency_maps(model, images()).items():
        torch.testing.assert_close(maps, saliency_maps(model, images(), [method], predicted)[method])


def test_registers_are_no_patches():
    maps = saliency_maps(tiny_model("dinov2_with_registers"), images().float())
    assert {tuple(one.shape) for one in maps.values()} == {(3, 4, 4)}


def test_half_precision_is_mapped_in_float32():
    maps = saliency_maps(tiny_model("vit").bfloat16(), images().bfloat16())
    assert {one.dtype for one in maps.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        maps = saliency_maps(tiny_model("vit"), images().float())
    assert {one.dtype for one in maps.values()} == {torch.float32}


def test_correlation_is_that_of_numpy():
    first, second = (
        torch.rand(2, 4, 4, generator=generator) for generator in [torch.Generator().manual_seed(0)] for _ in (0, 1)
    )
    expected = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    np.testing.assert_allclose(correlation(first, second), expected, rtol=1e-6)
    assert correlation(first, torch.ones(2, 4, 4)).isnan().all()
    assert torch.equal(correlation(first, second[:1])[:1], correlation(first, second)[:1])
