"""The explanation of an invisible change, from files: held to the wish's and to noises, by NumPy and saliency maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_nullspace.explain.agreement import explain_change, noise_as_large, noise_as_visible
from hf_nullspace.explain.grid import correlations_with_first, methods_for, plot_grid
from hf_nullspace.explain.lrp import lrp_map
from hf_nullspace.explain.maps import saliency_maps
from hf_nullspace.invisible.images import Judge, make_invisible, write_png
from hf_nullspace.models.preprocessing import make_image_processor
from tiny_models import numpy_patches, numpy_projection, tiny_model

STD = (0.27, 0.26, 0.1)


def picture(seed):
    values = np.random.default_rng(seed).integers(32, 224, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(values)


def judge_of(family="vit"):
    return Judge.from_model(tiny_model(family), make_image_processor(16, std=STD))


def levels(image):
    return np.asarray(image).astype(int)


def relative_change(image, source):
    """||E(image) - E(source)|| / ||E(source)|| of the patch embeddings E, by NumPy."""
    weight, bias = numpy_projection(tiny_model())
    got, wanted = (
        numpy_patches((levels(each) / 255 - 0.5) / np.array(STD)) @ weight.T + bias for each in (image, source)
    )
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def generator():
    return torch.Generator().manual_seed(0)


def test_the_explanation_stays_and_the_targets_is_another(tmp_path):
    """Figures 6 and 7, on files that were written and read back."""
    judge = judge_of()
    source, target = picture(0), picture(1)
    result = make_invisible(judge, source, target).image
    files = write_png(source, tmp_path / "a.png"), write_png(result, tmp_path / "b.png")
    found = explain_change(judge, files[0], target, files[1], methods=("raw", "rollout", "generic", "lrp"))
    correlations = found.correlations()
    pixels = np.stack([levels(image) for image in (*map(Image.open, files), target)]) / 255
    pixel_values = torch.tensor((pixels - 0.5) / STD).permute(0, 3, 1, 2).float()
    maps = saliency_maps(judge.model, pixel_values, ("raw", "rollout", "generic"))
    maps["lrp"] = lrp_map(judge.model, pixel_values)
    with torch.no_grad():
        assert found.predictions[:3] == judge.model(pixel_values=pixel_values).logits.argmax(1).tolist()
    for method, three in maps.items():
        rows = three.flatten(1).numpy()
        loose = 0.05 if method == "lrp" else 1e-4
        for name, row in (("result", rows[1]), ("wish", rows[2])):
            assert correlations[method][name] == pytest.approx(np.corrcoef(rows[0], row)[0, 1], abs=loose)
    for method in ("raw", "rollout", "generic"):
        assert correlations[method]["result"] > 0.995 > 0.9 > correlations[method]["wish"]
        assert correlations[method]["noise_as_visible"] > 0.995 > correlations[method]["noise_as_large"]
    kept = found.summary()
    assert kept["correlation_with_source"] == correlations
    errors = {name: row["embedding_error"] for name, row in kept["images"].items()}
    assert errors["source"] == 0
    assert errors["noise_as_visible"] == pytest.approx(errors["result"], rel=0.2)
    assert errors["noise_as_large"] > 10 * errors["result"]
    assert explain_change(judge, source, target, Image.open(files[1])).correlations()["lrp"] == correlations["lrp"]


@pytest.mark.parametrize("error", [2e-3, 3e-3])
def test_noise_that_is_seen_as_much_moves_single_levels(error):
    source = picture(2)
    noisy = noise_as_visible(judge_of(), source, error, generator())
    moved = levels(noisy) - levels(source)
    assert set(np.unique(moved)) == {-1, 0, 1}
    assert relative_change(noisy, source) == pytest.approx(error, rel=0.2)


def test_noise_that_is_seen_stays_inside_of_8_bits_and_has_an_end():
    values = np.zeros((16, 16, 3), dtype=np.uint8)
    values[:, 8:] = 255
    source = Image.fromarray(values)
    moved = levels(noise_as_visible(judge_of(), source, 1.0, generator())) - levels(source)
    assert (moved[:, :8] == 1).all()
    assert (moved[:, 8:] == -1).all()
    assert (levels(noise_as_visible(judge_of(), source, 0.0, generator())) == levels(source)).all()


def test_noise_as_large_has_the_size_of_the_change():
    source = Image.new("RGB", (64, 64), (128, 128, 128))
    change = np.random.default_rng(0).choice([-20, 0, 20], (64, 64, 3))
    noisy = noise_as_large(source, Image.fromarray((128 + change).astype(np.uint8)), generator())
    noise = levels(noisy) - 128
    assert noise.std() == pytest.approx(change.std(), rel=0.03)
    assert abs(np.corrcoef(noise.ravel(), change.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("family", "methods", "reason"),
    [("deit", ["rollout", "lrp"], None), ("dinov2", ["rollout"], "its model type is dinov2"), ("swin", [], "CLS")],
)
def test_methods_that_do_not_fit_the_model_are_left_out_with_the_reason(family, methods, reason):
    available, said = methods_for(tiny_model(family), ["rollout", "lrp"])
    assert available == methods
    assert said is None if reason is None else reason in said
    assert methods_for(tiny_model("dinov2"), ["raw"]) == (["raw"], None)


def test_a_model_without_explanation_is_still_looked_at():
    found = explain_change(judge_of("siglip"), picture(3), picture(4), picture(3))
    assert found.maps == found.correlations() == {}
    assert "is not known to classify by a CLS token" in found.summary()["not_explained"]
    assert found.embedding_errors[1] == 0 < found.embedding_errors[2]


def test_constant_maps_have_no_correlation(tmp_path):
    maps = {"raw": torch.stack([torch.eye(4), torch.ones(4, 4), 1 - torch.eye(4)])}
    assert [row["raw"] for row in correlations_with_first(maps)] == pytest.approx([1, None, -1])
    assert correlations_with_first({}) == []
    path = plot_grid(torch.rand(3, 3, 16, 16, generator=generator()), ["one", "two", "three"], maps, tmp_path / "a.png")
    with Image.open(path) as drawn:
        assert drawn.height > 1.3 * drawn.width
