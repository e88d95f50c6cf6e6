"""recipes/analyze.py on tiny models: what it writes is true by NumPy, and what it says of bad input is one line."""

import json
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from transformers import Swinv2Config, Swinv2ForImageClassification

from hf_nullspace.data.sources import load_image_dataset
from recipe_calls import call_recipe, check_refused, saved_model
from tiny_models import numpy_patches, numpy_projection, tiny_model, tiny_resnet

call = partial(call_recipe, "analyze")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tiny_model("deit"), tmp_path_factory.mktemp("deit"))


def test_a_model_is_analyzed(saved, tmp_path, capsys):
    call("--model_name_or_path", saved, "--output_dir", tmp_path, "--images", 2)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "analysis.json").read_text())
    patch, spectrum = found["patch_embedding"], np.linalg.svd(numpy_projection(tiny_model("deit"))[0], compute_uv=False)
    assert patch["dimension"] == 48 - np.sum(spectrum > patch["tolerance"]) == 24
    np.testing.assert_allclose(patch["singular_values"], spectrum)
    check = patch["check"]
    assert check["logit_change_by_null_pattern"] < 1e-4 < 0.1 < check["logit_change_by_random_pattern"]
    assert check["residual"] < 1e-6
    direction = found["layer_norm_direction"]
    assert direction["exact"]
    assert direction["dimension"] == 16
    assert direction["float64"]["logit_change"] < 1e-10 < direction["own_precision"]["logit_change"] < 1e-2
    layers = found["proposition_1"]["layers"]
    assert found["proposition_1"]["prefix_tokens"] == 2
    assert [len(row["asymmetry"]) for row in layers] == [2, 2]
    attention = tiny_model("deit").deit.layers[1].attention
    query, key = (linear.weight.detach().double().numpy()[12:] for linear in (attention.q_proj, attention.k_proj))
    matrix = query.T @ key
    asymmetry = np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix)
    assert layers[1]["asymmetry"][1] == pytest.approx(asymmetry)
    assert min(min(row["head_change"]) for row in layers) > 1e-3
    assert "nullspace dimension 24 at the tolerance" in said
    assert "LayerNorm direction: exact, dimension 16" in said
    assert "0 of 2 layers satisfy the conditions" in said
    for name in ("patch_embedding.png", "proposition_1.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 1000
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_real_images_and_another_precision(saved, tmp_path, capsys):
    call(
        "--model_name_or_path", saved, "--output_dir", tmp_path, "--dataset_name", "digits", "--images", 3,
        "--stored_dtype", "bfloat16",
    )  # fmt: skip
    found = json.loads((tmp_path / "analysis.json").read_text())
    check = found["patch_embedding"]["check"]
    assert check["images"] == 3
    rows, weight = load_image_dataset("digits", "test"), numpy_projection(tiny_model("deit"))[0]
    pixels = [np.asarray(rows[row]["image"].convert("RGB").resize((16, 16), 2)) / 127.5 for row in (0, 1, 2)]
    patches = numpy_patches(np.stack(pixels) - np.roll(pixels, 1, 0))
    hidden = 1 - np.sum((patches @ scipy.linalg.orth(weight.T)) ** 2) / np.sum(patches**2)
    assert check["invisible_share_of_differences"] == pytest.approx(hidden, rel=1e-3)
    assert found["patch_embedding"]["tolerance"] > 1000 * 48 * np.finfo(np.float32).eps
    assert found["patch_embedding"]["dimension"] == 24
    assert "bfloat16" in found["command"]["stored_dtype"]
    capsys.readouterr()


def test_another_attention_is_reported_as_not_measured(tmp_path, capsys):
    config = Swinv2Config(
        image_size=16, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=5
    )
    torch.manual_seed(0)
    saved_model(Swinv2ForImageClassification(config), tmp_path)
    call("--model_name_or_path", tmp_path, "--output_dir", tmp_path / "out", "--images", 2)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert "Proposition 1: not measured: Swinv2ForImageClassification (model type swinv2)" in said
    assert found["proposition_1"]["layers"] == []
    assert found["patch_embedding"]["dimension"] == 24
    assert found["layer_norm_direction"]["exact"]
    assert not (tmp_path / "out" / "proposition_1.png").exists()


def test_table_4_of_configurations_and_models(saved, tmp_path, capsys):
    call("--table4", "192:16", "768:8", saved, "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "table4.json").read_text())["rows"]
    assert [(row["features"], row["dimension"], row["paper"]) for row in rows] == [
        (192, 576, 576),
        (768, 0, 0),
        (24, 24, None),
    ]
    assert [len(row["singular_values"]) for row in rows] == [192, 192, 24]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["192", "16", "576", "576"]
    with Image.open(tmp_path / "table4.png") as picture:
        assert picture.width > 900


def test_a_model_without_patches_is_refused(tmp_path, capsys):
    words = ["--model_name_or_path", saved_model(tiny_resnet(), tmp_path)]
    message = "ResNetForImageClassification has no patch embedding"
    check_refused(capsys, message, "analyze", *words, output=tmp_path / "out")
