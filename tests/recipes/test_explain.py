"""recipes/explain.py on a tiny DeiT: what it writes is what the library says, and bad input is one line."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from hf_nullspace.explain.lrp import lrp_map
from hf_nullspace.explain.maps import saliency_maps
from recipe_calls import call_recipe, check_refused, saved_model
from tiny_models import tiny_model

call = partial(call_recipe, "explain")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, two images of its size, and one of another size and mode."""
    folder = saved_model(tiny_model("deit"), tmp_path_factory.mktemp("deit"))
    values = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for name, image in zip("ab", values, strict=False):
        Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(values[2]).convert("L").resize((40, 24)).save(folder / "grey.png")
    return folder


def test_maps_of_several_images(place, tmp_path, capsys):
    names = [str(place / name) for name in ("a.png", "a.png", "b.png", "grey.png")]
    call("--model_name_or_path", place, "--image", *names, "--output_dir", tmp_path)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "explain.json").read_text())
    rows, model = found["images"], tiny_model("deit")
    assert [row["image"] for row in rows] == names
    pixels = np.stack([np.asarray(Image.open(name)) for name in names[:3]]).astype(np.float32) / 255
    pixel_values = torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        confidences, predictions = model(pixel_values=pixel_values).logits.softmax(-1).max(1)
    expected = {**saliency_maps(model, pixel_values), "lrp": lrp_map(model, pixel_values)}
    for index in range(3):
        assert rows[index]["prediction"] == rows[index]["explained_class"] == f"class {predictions[index]}"
        assert rows[index]["confidence"] == pytest.approx(float(confidences[index]), rel=1e-5)
        assert list(rows[index]["maps"]) == list(rows[index]["correlation_with_first"]) == list(expected)
        for method, maps in expected.items():
            np.testing.assert_allclose(rows[index]["maps"][method], maps[index], rtol=0.02, atol=1e-5)
    for method in ("raw", "rollout", "generic"):
        assert rows[1]["correlation_with_first"][method] == pytest.approx(1)
        first, other = (np.ravel(rows[index]["maps"][method]) for index in (0, 2))
        assert rows[2]["correlation_with_first"][method] == pytest.approx(np.corrcoef(first, other)[0, 1], rel=1e-4)
    assert said.count("against the first: raw r = ") == 3
    assert f"{names[2]}: class {predictions[2]}" in said
    with Image.open(tmp_path / "explain.png") as picture:
        assert picture.width > 1300
        assert picture.height > 1000
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(colours[::7], axis=0)) > 1000


def test_one_image_some_methods_and_a_class(place, tmp_path, capsys):
    for target in ("class 3", "3"):
        call(
            "--model_name_or_path", place, "--image", place / "a.png", "--method", "lrp", "generic", "lrp",
            "--target_class", target, "--output_dir", tmp_path,
        )  # fmt: skip
        (row,) = json.loads((tmp_path / "explain.json").read_text())["images"]
        assert list(row["maps"]) == ["lrp", "generic"]
        assert row["explained_class"] == "class 3"
        assert "explained as class 3\n" in capsys.readouterr().out


def test_a_map_that_is_constant_has_no_correlation(place, tmp_path, capsys):
    """With a classifier that reads nothing no gradient speaks for any class, and Grad-CAM is zero everywhere."""
    model = tiny_model("deit")
    torch.nn.init.zeros_(model.classifier.weight)
    names = [place / "a.png", place / "b.png"]
    words = ["--model_name_or_path", saved_model(model, tmp_path), "--image", *names, "--method", "grad_cam"]
    call(*words, "--output_dir", tmp_path)
    second = json.loads((tmp_path / "explain.json").read_text())["images"][1]
    assert second["correlation_with_first"] == {"grad_cam": None}
    assert "grad_cam r undefined" in capsys.readouterr().out


def test_a_model_that_lrp_does_not_know_is_explained_by_rollout(place, tmp_path, capsys):
    words = ["--model_name_or_path", saved_model(tiny_model("dinov2"), tmp_path), "--image", place / "a.png"]
    message = "its model type is dinov2; expected a ViT, DeiT"
    check_refused(capsys, message, "explain", *words, output=tmp_path / "out")
    call(*words, "--method", "rollout", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "explain.png").exists()
