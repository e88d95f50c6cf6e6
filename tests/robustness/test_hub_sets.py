"""Sets from a Hub: the recipe and `datasets` as it is, and a real server on this machine."""

import json
import re

import datasets
import pyarrow.parquet
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.robustness.label_spaces import wnids
from recipe_calls import call_recipe

COLOURS = 12


def colour(value):
    return Image.new("RGB", (40, 30), (20 * value, 255 - 20 * value, 7))


def publish(folder, names, labels):
    """A data set as on the Hub: one parquet file, labels with names in an order of their own."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [colour(value) for value in range(len(labels))], "label": [names.index(name) for name in labels]}
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")


@pytest.fixture
def hub(hub_here, tmp_path):
    """someone/adversarial with ImageNet-A's wnids backwards, someone/wrong with two of ImageNet-R's; 12 images."""
    folder = tmp_path / "hub" / "datasets" / "someone"
    datasets.disable_progress_bars()
    right = list(wnids("imagenet-a"))[::-1]
    publish(folder / "adversarial", right, [right[7 * i] for i in range(COLOURS)])
    wrong = [wnid for wnid in wnids("imagenet-r") if wnid not in right]
    publish(folder / "wrong", [*right[:3], *wrong[:2]], right[:3] * 4)
    return hub_here


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that knows ImageNet's classes by wnid, in an order of its own."""
    folder, order = tmp_path_factory.mktemp("model"), wnids()[::-1]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label=dict(enumerate(order)))
    config.label2id = {label: i for i, label in enumerate(order)}
    ViTForImageClassification(config).save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    return folder


def evaluate(model, folder, place, out, *words):
    """The recipe's exit code."""
    (folder / "plan.yaml").write_text("conditions: [{set: imagenet-a}]")
    usual = ["--model_name_or_path", model, "--suite", folder / "plan.yaml", "--no_checks", "--use_cpu"]
    try:
        call_recipe(
            "evaluate_robustness", *usual, "--location", f"imagenet-a={place}", "--output_dir", folder / out, *words
        )
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_hub_set_is_read_mapped_and_counted(hub, model, tmp_path, capfd):
    """Downloaded and as a stream; and what is not the set is an error of one line."""
    place = "someone/adversarial"
    assert evaluate(model, tmp_path, place, "whole", "--per_sample", "--allow_partial") == 0
    assert evaluate(model, tmp_path, place, "stream", "--per_sample", "--streaming") == 0
    for wrong, out in (("someone/wrong", "wrong"), ("someone/nowhere", "nowhere"), (place, "partial")):
        assert evaluate(model, tmp_path, wrong, out) == 2
    errors = capfd.readouterr().err
    assert any("/datasets/someone/adversarial/resolve/" in asked and "parquet" in asked for asked in hub.asked)
    backwards = list(wnids("imagenet-a"))[::-1]
    for out in ("whole", "stream"):
        (record,) = json.loads((tmp_path / out / "results.json").read_text())["results"]
        assert record["n"] == COLOURS
        assert record["protocol"]["note"] == f"partial: {COLOURS} of 7500 images"
        assert re.fullmatch(f"{place}, split test, commit [0-9a-f]{{40}}", record["protocol"]["from"])
        (samples,) = (tmp_path / out / "per_sample").rglob("*.parquet")
        labels = pyarrow.parquet.read_table(samples).column("label").to_pylist()
        assert [wnids()[label] for label in labels] == [backwards[7 * i] for i in range(COLOURS)]
    wrong, nowhere, partial = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "do not belong to imagenet-a (200 classes)" in wrong
    assert "someone/nowhere" in nowhere
    assert "is partial: 12 of 7500 images; complete it" in partial
