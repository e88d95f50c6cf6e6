"""The patch embedding's nullspace against SciPy, table 4 of the paper, and the models themselves."""

import numpy as np
import pytest
import scipy.linalg
import torch
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

from hf_nullspace.linear.patch import (
    PatchNullspace,
    default_tolerance,
    join_patches,
    patches_in_pixels,
    split_patches,
)
from hf_nullspace.models.patch_embedding import find_patch_embedding, patch_projection
from hf_nullspace.models.preprocessing import Preprocessing
from tiny_models import FAMILIES, tiny_model

# Table 4: features D, patch size, dimension of the nullspace; ViT-B/16 is below.
TABLE_4 = [
    (192, 16, 576),
    (384, 32, 2688),
    (384, 16, 384),
    pytest.param(768, 32, 2304, marks=pytest.mark.slow),
    (768, 8, 0),
    pytest.param(1024, 32, 2048, marks=pytest.mark.slow),
    (1024, 16, 0),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weight(features, patch, channels=3, dtype=torch.float32):
    return torch.randn(features, channels, patch, patch, generator=generator()).to(dtype)


def weight_of_rank(rank, features=768, size=768, dtype=torch.float32, decades=2):
    """(features, 3, side, side) with the given rank before it is stored, and a spectrum that falls by 10**decades."""
    left, _ = torch.linalg.qr(torch.randn(features, features, generator=generator(1), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, size, generator=generator(2), dtype=torch.float64))
    spectrum = torch.logspace(1, 1 - decades, rank, dtype=torch.float64)
    side = int((size // 3) ** 0.5)
    return ((left[:, :rank] * spectrum) @ right[:rank]).reshape(features, 3, side, side).to(dtype)


@pytest.mark.parametrize(("features", "patch", "dimension"), TABLE_4)
def test_dimensions_of_table_4(features, patch, dimension):
    torch.manual_seed(0)
    embedding = ViTPatchEmbeddings(ViTConfig(hidden_size=features, patch_size=patch, image_size=2 * patch))
    nullspace = PatchNullspace.from_weight(embedding.projection.weight)
    assert nullspace.dimension() == dimension
    assert nullspace.weight.shape == (features, 3 * patch**2)


def test_vit_b_16_of_rank_766_in_float32_has_2_dimensions():
    stored = weight_of_rank(766)
    nullspace = PatchNullspace.from_weight(stored)
    assert nullspace.dimension() == 2
    assert nullspace.sample(generator()).shape == (1, 3, 16, 16)
    own_eps = default_tolerance(nullspace.singular_values, nullspace.weight.shape, torch.float64)
    assert nullspace.dimension(own_eps) == 0, "float64's own tolerance does not know that the weights were rounded"
    assert PatchNullspace.from_weight(stored.double(), stored_dtype=torch.float32).dimension() == 2
    counts = [nullspace.dimension(tolerance) for tolerance in (0, 1e-3, 1, 5, 11)]
    assert counts == sorted(counts)
    assert (counts[0], counts[1], counts[-1]) == (0, 2, 768)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("features", "size", "rank"), [(48, 48, 40), (192, 768, 192), (300, 192, 150)])
def test_half_precision_counts_what_rounding_has_lifted_and_no_more(dtype, features, size, rank):
    exact = weight_of_rank(rank, features=features, size=size)
    stored = PatchNullspace.from_weight(exact.to(dtype))
    assert stored.dimension() == PatchNullspace.from_weight(exact).dimension() == size - rank
    error = (exact.to(dtype).double() - exact.double()).flatten(1).numpy()
    assert 1 < stored.tolerance / np.linalg.norm(error, 2) < 4
    loaded_as_float32 = PatchNullspace.from_weight(exact.to(dtype).float(), stored_dtype=dtype)
    assert loaded_as_float32.tolerance == stored.tolerance


@pytest.mark.parametrize("shape", [(300, 192), (48, 768)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_tolerance_in_closed_form(shape, dtype):
    """Of half precision the norm of a matrix of rounding errors, of others NumPy's and SciPy's: s_max * max * eps."""
    spectrum = torch.linspace(5, 1, min(shape), dtype=torch.float64)
    eps = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23, torch.float64: 2**-52}[dtype]
    expected = 5 * max(shape) * eps
    if eps > 2**-23:
        rms = np.sqrt(np.sum(spectrum.numpy() ** 2) / (shape[0] * shape[1]))
        expected = eps / 2 * rms * (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    assert default_tolerance(spectrum, shape, dtype) == pytest.approx(expected, rel=1e-12)
    assert default_tolerance(spectrum[:0], shape, dtype) == 0


def test_half_precision_hides_real_singular_values_that_are_smaller_than_its_rounding():
    exact = weight_of_rank(48, features=48, size=48, decades=4)
    assert PatchNullspace.from_weight(exact).dimension() == 0
    assert PatchNullspace.from_weight(exact.bfloat16()).dimension() > 0


def test_the_summary_counts_at_a_tenth_and_at_ten_times_of_the_tolerance():
    stored = torch.diag_embed(torch.tensor([5.0, 3.0, 0.5, 0.05], dtype=torch.float64))
    padded = torch.nn.functional.pad(stored, (0, 8)).reshape(4, 3, 2, 2)
    found = PatchNullspace.from_weight(padded, tolerance=0.1).summary()
    assert (found["features"], found["patch"], found["weight_dtype"]) == (4, [3, 2, 2], "float64")
    dimensions = [found[name] for name in ("dimension_at_a_tenth", "dimension", "dimension_at_ten_times")]
    assert dimensions == [8, 9, 10]
    assert found["singular_values"] == pytest.approx([5, 3, 0.5, 0.05])


def test_scipy_finds_the_same_nullspace():
    nullspace = PatchNullspace.from_weight(weight(20, 4))
    expected = scipy.linalg.null_space(nullspace.weight.double().numpy())
    assert expected.shape == (48, 28)
    assert nullspace.basis.shape == (28, 48)
    assert scipy.linalg.subspace_angles(expected, nullspace.basis.T.numpy()).max() < 1e-12
    np.testing.assert_allclose(nullspace.basis @ nullspace.basis.T, np.eye(28), atol=1e-13)
    np.testing.assert_allclose(
        nullspace.singular_values, scipy.linalg.svdvals(nullspace.weight.double().numpy()), rtol=1e-12
    )
    patches = nullspace.sample(generator(3), 5).flatten(1).numpy()
    np.testing.assert_allclose(patches @ expected @ expected.T, patches, atol=1e-13)


def test_samples_are_normal_in_every_direction_of_the_nullspace():
    nullspace = PatchNullspace.from_weight(weight(20, 4))
    coefficients = nullspace.sample(generator(4), 20000, std=3.0).flatten(1) @ nullspace.basis.T
    np.testing.assert_allclose(np.cov(coefficients.T.numpy()), 9 * np.eye(28), atol=0.5)


def test_projection_is_idempotent_symmetric_and_onto_the_nullspace():
    nullspace = PatchNullspace.from_weight(weight(20, 4))
    one, two = torch.randn(2, 2, 3, 8, 12, generator=generator(5), dtype=torch.float64)
    projected = nullspace.project(one)
    torch.testing.assert_close(nullspace.project(projected), projected, rtol=0, atol=1e-13)
    torch.testing.assert_close((projected * two).sum(), (one * nullspace.project(two)).sum(), rtol=1e-12, atol=1e-12)
    basis = scipy.linalg.null_space(nullspace.weight.double().numpy())
    first_patch = one[1, :, :4, 8:].reshape(48).numpy()
    np.testing.assert_allclose(projected[1, :, :4, 8:].reshape(48), basis @ (basis.T @ first_patch), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_stay_to_rounding_for_every_family(family, dtype):
    model = tiny_model(family).to(dtype)
    projection = patch_projection(find_patch_embedding(model))
    if family == "swin":  # 12 pixels of a patch and 12 features: take one away, or there is no nullspace
        projection.weight.data[-1] = projection.weight.data[0]
    nullspace = PatchNullspace.from_model(model)
    assert nullspace.dimension() == (1 if family == "swin" else 24)
    images = torch.randn(2, 3, 16, 16, generator=generator(6), dtype=dtype)
    pattern = nullspace.project(torch.randn(2, 3, 16, 16, generator=generator(7), dtype=dtype)) * 10
    clean, changed = model(images).logits, model(images + pattern).logits
    visible = model(images + 10 * torch.randn(2, 3, 16, 16, generator=generator(7), dtype=dtype)).logits
    rounding = 2e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(changed, clean, rtol=rounding, atol=rounding)
    assert (visible - clean).abs().max() > 100 * rounding
    patch = nullspace.sample(generator())[0].to(dtype)
    tiled = patch.repeat(1, 16 // patch.shape[1], 16 // patch.shape[2])
    torch.testing.assert_close(model(images + tiled).logits, clean, rtol=rounding, atol=rounding)


def test_the_residual_is_the_models_own_rounding():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        stored = weight(20, 4, dtype=dtype)
        nullspace = PatchNullspace.from_weight(stored, stored_dtype=torch.float64)
        patches = nullspace.sample(generator(8), 10)
        eps = torch.finfo(dtype).eps
        assert eps / 100 < nullspace.residual(patches) < 10 * eps, dtype
        assert nullspace.residual(torch.randn(10, 3, 4, 4, generator=generator(9))) > 0.2


def test_null_patterns_in_pixels_know_the_std_of_every_channel():
    model = tiny_model().double()
    preprocessing = Preprocessing((0.48, 0.46, 0.41), (0.27, 0.26, 0.1), (16, 16), (16, 16))
    normalised = PatchNullspace.from_model(model)
    nullspace = normalised.in_pixels(preprocessing.std)
    assert nullspace.dimension() == normalised.dimension() == 24
    basis = scipy.linalg.null_space(normalised.weight.double().numpy()) * np.repeat(preprocessing.std, 16)[:, None]
    assert scipy.linalg.subspace_angles(basis, nullspace.basis.T.numpy()).max() < 1e-12
    pixels = torch.rand(2, 3, 16, 16, generator=generator(10), dtype=torch.float64)
    sampled = patches_in_pixels(normalised.sample(generator()), preprocessing.std)[0].repeat(1, 4, 4)
    with torch.no_grad():
        clean, changed = (model(preprocessing.normalize(each)).logits for each in (pixels, pixels + sampled))
    torch.testing.assert_close(changed, clean, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("std", [0.25, 2.0])
def test_one_std_for_all_channels_scales_the_spectrum_and_the_tolerance(std):
    """Then diag(1 / std) is a number: the counts at a tenth and at ten times of the tolerance stay what they are."""
    normalised = PatchNullspace.from_weight(weight_of_rank(40, features=48, size=48))
    pixels = normalised.in_pixels((std,) * 3)
    assert pixels.tolerance == pytest.approx(normalised.tolerance / std, rel=1e-12)
    np.testing.assert_allclose(pixels.singular_values[:40], normalised.singular_values[:40] / std, rtol=1e-6)
    assert pixels.dimension(pixels.tolerance) == pixels.dimension() == normalised.dimension() == 8


def test_the_tolerance_in_pixels_covers_what_the_smallest_std_lifts():
    """theta sees the third channel alone, whose std is the smallest: a zero of theta grows by 1 / min(std)."""
    lone = torch.zeros(6, 3, 2, 2, dtype=torch.float64)
    lone[:, 2] = torch.randn(6, 2, 2, generator=generator(14), dtype=torch.float64)
    smallest = float(PatchNullspace.from_weight(lone).singular_values[3])
    normalised = PatchNullspace.from_weight(lone, tolerance=1.001 * smallest)
    pixels = normalised.in_pixels((0.5, 0.4, 0.1))
    assert pixels.dimension(pixels.tolerance) == pixels.dimension() == normalised.dimension() == 9
    assert pixels.dimension(pixels.tolerance / 1.01) == 8


def test_patches_come_in_the_order_of_the_embeddings():
    images = torch.randn(2, 3, 8, 12, generator=generator(12))
    patches = split_patches(images, (3, 4, 4))
    torch.testing.assert_close(patches, torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2))
    torch.testing.assert_close(join_patches(patches, (3, 4, 4), (8, 12)), images)
    large = torch.randn(1, 3, 64, 80, generator=generator(15))
    torch.testing.assert_close(join_patches(split_patches(large, (3, 4, 4)), (3, 4, 4), (64, 80)), large)


def test_beyond_the_last_whole_patch_nothing_changes():
    nullspace = PatchNullspace.from_weight(weight(20, 4))
    images = torch.randn(1, 3, 10, 9, generator=generator(13))
    projected = nullspace.project(images)
    assert projected.shape == images.shape
    assert (projected[:, :, 8:].abs().max(), projected[..., 8:].abs().max()) == (0, 0)
    torch.testing.assert_close(projected[:, :, :8, :8], nullspace.project(images[:, :, :8, :8]))


def test_the_dtype_of_the_checkpoint_survives_a_cast():
    model = tiny_model("vit")
    model.config.dtype = torch.float32
    single, double = PatchNullspace.from_model(model), PatchNullspace.from_model(model.double())
    assert double.tolerance == pytest.approx(single.tolerance)
