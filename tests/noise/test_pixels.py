"""The pixel preimage of a noise against NumPy's least squares, and against the model that should see the same."""

import numpy as np
import pytest
import torch

from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.models.patch_embedding import embedding_shape, find_patch_embedding, patch_embedding_noise
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.pixels import pixel_preimage
from tiny_models import FAMILIES, normal, tiny_model

STD = (0.27, 0.26, 0.1)


def embeddings_of(model, pixel_values):
    with torch.no_grad():
        output = find_patch_embedding(model)(pixel_values)
    output = output[0] if isinstance(output, tuple) else output
    return output.flatten(2).transpose(1, 2) if output.dim() == 4 else output


@pytest.mark.parametrize(("features", "rank"), [(6, 6), (20, 12), (6, 3)], ids=["wide", "tall", "rank 3"])
def test_numpy_finds_the_same_preimage(features, rank):
    weight = (normal(features, rank, seed=1) @ normal(rank, 12, seed=2)).reshape(features, 3, 2, 2)
    noise = normal(1, 6, features, seed=3)
    found = pixel_preimage(PatchNullspace.from_weight(weight), noise, (2, 3))
    theta, wanted = weight.flatten(1).numpy(), noise[0].numpy()
    answer, *_ = np.linalg.lstsq(theta, wanted.T, rcond=1e-12)
    np.testing.assert_allclose(found.patches.numpy(), answer.T, rtol=1e-8, atol=1e-10)
    rest = wanted - answer.T @ theta.T
    np.testing.assert_allclose(found.residuals.numpy(), np.linalg.norm(rest, axis=1), atol=1e-10)
    assert found.residual == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(wanted), abs=1e-12)
    assert (found.residual < 1e-12) == (rank == features)


@pytest.mark.parametrize("family", FAMILIES)
def test_added_to_images_it_changes_the_embeddings_by_what_it_says(family):
    model = tiny_model(family).double()
    nullspace, pixel_values = PatchNullspace.from_model(model), normal(2, 3, 16, 16, seed=4)
    shape = embedding_shape(model, pixel_values)
    noise = normal(1, shape.patches, shape.features, seed=5)
    found = pixel_preimage(nullspace, noise, shape.grid)
    weight = nullspace.weight.numpy()
    expected = noise.numpy() @ (weight @ np.linalg.pinv(weight)).T  # W W^+ v
    change = found.pixel_values()
    assert change.shape == (1, 3, 16, 16)
    plain, changed = embeddings_of(model, pixel_values), embeddings_of(model, pixel_values + change)
    if family != "swin":  # whose embedding ends in a LayerNorm
        np.testing.assert_allclose((changed - plain).numpy(), np.broadcast_to(expected, plain.shape), atol=1e-9)
    assert (plain - changed).abs().max() > 1e-3
    np.testing.assert_allclose(found.embedding_change.numpy(), expected, atol=1e-9)


def test_a_noise_in_the_range_is_an_image_perturbation():
    """24 features of 48 numbers: every noise has a preimage, and the logits are those of the noise itself."""
    model = tiny_model().double()
    preprocessing = Preprocessing((0.48, 0.46, 0.41), STD, (16, 16), (16, 16))
    pixels = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    noise = normal(1, 16, 24, seed=7)
    found = pixel_preimage(PatchNullspace.from_model(model), noise, (4, 4))
    assert found.residual < 1e-10
    with torch.no_grad():
        clean = model(preprocessing.normalize(pixels)).logits
        perturbed = model(preprocessing.normalize(pixels + found.pixels(STD))).logits
        with patch_embedding_noise(model, noise):
            noisy = model(preprocessing.normalize(pixels)).logits
    torch.testing.assert_close(perturbed, noisy, rtol=1e-8, atol=1e-8)
    assert (clean - noisy).abs().max() > 0.1


def test_in_pixels_there_is_a_smaller_one_where_std_differs():
    nullspace, noise = PatchNullspace.from_model(tiny_model()), normal(1, 4, 24, seed=8)
    converted = pixel_preimage(nullspace, noise, (2, 2)).pixels(STD)
    smallest = pixel_preimage(nullspace.in_pixels(STD), noise, (2, 2)).pixel_values()
    weight = nullspace.weight.double().numpy() / np.repeat(STD, 16)
    patch = smallest[0, :, :4, 4:].reshape(-1).numpy()  # the second patch of the first row
    np.testing.assert_allclose(weight @ patch, noise[0, 1].numpy(), atol=1e-4)
    assert smallest.norm() < 0.95 * converted.norm()


def test_a_border_is_left_alone_and_no_noise_is_no_change():
    nullspace = PatchNullspace.from_model(tiny_model())
    change = pixel_preimage(nullspace, normal(1, 4, 24), (2, 2)).pixel_values((9, 10))
    assert change.shape == (1, 3, 9, 10)
    assert change[..., 8:, :].abs().max() == change[..., 8:].abs().max() == 0 < change.abs().max()
    nothing = pixel_preimage(nullspace, torch.zeros(1, 4, 24), (2, 2))
    assert nothing.residual == nothing.patches.abs().max() == 0
