"""Benchmarks of images: their counts are those of other code, and a page has the numbers of its results."""

import json
import runpy
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.invisible.images import Judge
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.robustness.corruptions import CORRUPTIONS
from recipe_calls import saved_model
from tiny_models import IMAGE, SIZES, numpy_patches, numpy_projection, tiny_model

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "snow, frost": ("snow", "frost"),
    "elastic": ("elastic_transform",),
    "jpeg": ("jpeg_compression",),
}
"""Columns of docs/augmentation.md that are means over several corruptions, or short names."""
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    sys.path.insert(0, str(BENCHMARKS))  # as where a script is run by its name
    try:
        return runpy.run_path(str(BENCHMARKS / f"{name}.py"))
    finally:
        sys.path.remove(str(BENCHMARKS))


def call(name, *words):
    arguments, sys.argv = sys.argv, [name, *map(str, words)]
    try:
        load(name)["main"]()
    finally:
        sys.argv = arguments


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tiny_model(), tmp_path_factory.mktemp("vit"))


def test_pairs_of_images(saved, tmp_path, capsys):
    words = ["--model", saved, "--dataset", "digits", "--pairs", 1, "--search_pairs", 1, "--iterations", 100]
    call("invisible_images", *words, "--pictures", tmp_path, "--output", tmp_path / "found.json")
    found, said = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    assert found["settings"]["model"] == saved.name
    weight, _ = numpy_projection(tiny_model())
    for kind in ("target", "mark"):
        summary, single = found["summary"][kind], found["pairs"][kind]
        assert summary["prediction stays"]["count"] == sum(single["match"])
        assert summary["change of confidence"]["median"] == pytest.approx(
            statistics.median(single["confidence_change"]), rel=1e-3
        )
        assert summary["strength at a change of 1e-4"]["n"] == 1
        assert summary["r, rollout, result"]["lowest"] > 0.99
        errors = [summary[f"embedding error, {stage}"]["highest"] for stage in ("box", "eight_bit", "nearest_levels")]
        assert errors == sorted(errors)
        assert f"{kind}, 1 pairs" in said
        source, wish, result = (
            np.asarray(Image.open(tmp_path / f"{kind}-0" / f"{name}.png")) / 255
            for name in ("source", "wish", "result")
        )
        way = 1 - np.linalg.norm(result - wish) / np.linalg.norm(source - wish)
        assert single["way to the wish"][0] == pytest.approx(way, rel=1e-2)
        seen, wanted = (np.linalg.norm(numpy_patches(each - source) @ weight.T) for each in (result, wish))
        assert seen < 0.05 * wanted
        assert (tmp_path / f"{kind}-0" / "explanations.png").exists()


def test_the_baseline_is_the_projection_clipped_and_rounded(saved):
    judge = Judge.from_model(tiny_model(), make_image_processor(16))
    values = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    source, wish = (Image.fromarray(each) for each in values)
    image = np.asarray(load("invisible_images")["projected"](judge, source, wish))
    (start, goal), (weight, _) = numpy_patches(values / 255), numpy_projection(tiny_model())
    change = (goal - start) - (goal - start) @ weight.T @ np.linalg.inv(weight @ weight.T) @ weight
    expected = np.clip(start + change, 0, 1) * 255
    assert np.abs(numpy_patches(image) - expected).max() < 0.51


def test_copies_and_innocent_models_are_counted(tmp_path, capsys):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, num_labels=10))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    saved = saved_model(model, tmp_path / "ten-classes")
    words = ["--model", saved, "--dataset", "digits", "--others", 2, "--layers", 1, "--steps", 3, "--batch", 8]
    words += ["--finetune_steps", 1, "--train_images", 40, "--images", 6, "--patterns", 2, "--fingerprints", 2]
    call("ownership", *words, "--name", "none", "--picture", tmp_path / "scores.png", "--copies", saved)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if " score " in line]
    assert sum(" copy " in line for line in lines) == 1 + 1 + 6 + 3 + 1 + 2
    assert sum(" evasion " in line for line in lines) == 3
    assert sum(" innocent " in line for line in lines) == 2 + 2 * 2
    same = next(line for line in lines if "the same file" in line)
    assert float(same.split("score ")[1].split()[0]) < 0.01
    assert "innocent: 0 of 6 at most 0.1 [0.0%, 39.0%]" in said
    with Image.open(tmp_path / "scores.png") as picture:
        assert picture.width > 500


def test_the_nearest_sample_of_an_augmentation():
    """Of samples at distances 5, 3 and 13 from a corruption that is 10 away from the unchanged images."""
    nearest, target = load("augmentation_overlap")["nearest"], torch.tensor([1.0, 2.0])
    drawn = target + torch.tensor([[3.0, 4.0], [0.0, 3.0], [5.0, 12.0]])
    assert nearest(drawn, target + torch.tensor([6.0, 8.0]), target) == 0.3
    assert nearest(drawn[2:], target + torch.tensor([6.0, 8.0]), target) == 1.0, "no sample is nearer"


def test_the_page_has_the_distances_of_the_results():
    root = BENCHMARKS.parent
    distances = json.loads((root / "benchmarks" / "results" / "augmentation_overlap.json").read_text())["distance"]
    text = (root / "docs" / "augmentation.md").read_text(encoding="utf-8")
    lines = text[text.index("| as the model sees it |") :].partition("\n\n")[0].splitlines()
    table = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    columns = [GROUPS.get(name, (name.replace(" ", "_"),)) for name in table[0][1:]]
    assert sorted(name for column in columns for name in column) == sorted(CORRUPTIONS)
    assert [row[0] for row in table[2:]] == list(distances)
    for name, *cells in table[2:]:
        for cell, column in zip(cells, columns, strict=True):
            assert float(cell) == pytest.approx(statistics.mean(distances[name][each] for each in column), abs=0.00501)
