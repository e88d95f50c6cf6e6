"""recipes/watermark.py on real files: what it writes is judged again by transformers, and bad input is one line."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers import pipeline

from recipe_calls import call_recipe, check_refused, saved_model
from tiny_models import tiny_model, tiny_resnet

call = partial(call_recipe, "watermark")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, two photographs of other sizes, a logo with transparency, and what is none of these."""
    folder = tmp_path_factory.mktemp("watermark")
    saved_model(tiny_model(), folder / "model", std=(0.5, 0.4, 0.2))
    saved_model(tiny_resnet(), folder / "resnet")
    noise = np.random.default_rng(0).integers(64, 192, (2, 32, 24, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save(folder / "cat.jpg")
    Image.fromarray(noise[1]).convert("L").save(folder / "dog.png")
    logo = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(logo).ellipse((2, 2, 38, 38), fill=(255, 255, 0, 255))
    logo.save(folder / "logo.png")
    return folder


@pytest.mark.parametrize("wanted", ["mark", "target"])
def test_a_mark_is_put_on_an_image(wanted, files, tmp_path, capsys):
    other = files / {"mark": "logo.png", "target": "dog.png"}[wanted]
    words = ["--model_name_or_path", files / "model", "--image", files / "cat.jpg", "--output_dir", tmp_path]
    call(*words, f"--{wanted}", other, "--explanation_picture", wanted == "target", "--method", "rollout", "lrp")
    said, found = capsys.readouterr().out, json.loads((tmp_path / "watermark.json").read_text())
    assert "cat.jpg is 24 x 32" in said
    assert "leaves 16 x 16 alone" in said
    assert "Prediction stays class" in said
    answer = pipeline("image-classification", model=str(files / "model"))(Image.open(tmp_path / "result.png"))[0]
    assert found["verdict"]["match"]
    assert found["labels"]["prediction_source"] == found["labels"]["prediction_result"] == answer["label"]
    assert found["verdict"]["confidence_result"] == pytest.approx(answer["score"], abs=1e-5)
    assert 0.02 < found["closeness"]["reached"] < 1
    explained = found["explanations"]["correlation_with_source"]
    assert list(explained) == ["rollout", "lrp"]
    assert explained["rollout"]["result"] > 0.99 > explained["rollout"]["noise_as_large"]
    assert f"Explanation by rollout against the source's: result r = {explained['rollout']['result']:.3f}, wish" in said
    assert (tmp_path / "explanations.png").exists() == (wanted == "target")
    source, result = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("source.png", "result.png"))
    assert source.shape == result.shape == (16, 16, 3)
    assert np.abs(result - source).max() > 20
    with Image.open(tmp_path / "side_by_side.png") as picture:
        assert picture.width > 3 * picture.height
    with Image.open(files / "cat.jpg") as image:
        assert np.array_equal(source, np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))


def test_a_model_without_explanation_is_reported(files, tmp_path, capsys):
    saved_model(tiny_model("siglip"), tmp_path / "siglip")
    words = ["--image", files / "cat.jpg", "--mark", files / "logo.png", "--output_dir", tmp_path / "out"]
    call("--model_name_or_path", tmp_path / "siglip", *words, "--explanation_picture", "true")
    assert "No explanation: SiglipForImageClassification" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "watermark.json").read_text())
    assert found["explanations"]["correlation_with_source"] == {}
    assert not (tmp_path / "out" / "explanations.png").exists()


def test_a_limit_on_the_confidence_lowers_the_strength(files, tmp_path, capsys):
    words = ["--model_name_or_path", files / "model", "--image", files / "cat.jpg", "--target", files / "dog.png"]
    call(*words, "--output_dir", tmp_path, "--max_confidence_change", 1e-5)
    found = json.loads((tmp_path / "watermark.json").read_text())
    assert found["strength"] < 1
    assert found["verdict"]["confidence_change"] <= 1e-5
    assert f"at strength {found['strength']:g}" in capsys.readouterr().out


def test_a_model_without_patches_is_refused(files, tmp_path, capsys):
    words = ["--model_name_or_path", files / "resnet", "--image", files / "cat.jpg", "--mark", files / "logo.png"]
    check_refused(capsys, "no patch embedding", "watermark", *words, output=tmp_path / "out")
