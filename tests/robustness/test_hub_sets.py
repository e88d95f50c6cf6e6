"""Sets from a Hub: the recipe in a process of its own, `datasets` as it is, and a real server on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.robustness.label_spaces import wnids
from loopback_hub import LoopbackHub

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate_robustness.py"
COLOURS = 12


def colour(value):
    return Image.new("RGB", (40, 30), (20 * value, 255 - 20 * value, 7))


def publish(folder, names, labels):
    """A data set as on the Hub: one parquet file, labels with names in an order of their own."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [colour(value) for value in range(len(labels))], "label": [names.index(name) for name in labels]}
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """someone/adversarial with ImageNet-A's wnids backwards, someone/wrong with two of ImageNet-R's; 12 images."""
    folder = tmp_path_factory.mktemp("hub")
    datasets.disable_progress_bars()
    right = list(wnids("imagenet-a"))[::-1]
    publish(folder / "datasets" / "someone" / "adversarial", right, [right[7 * i] for i in range(COLOURS)])
    wrong = [wnid for wnid in wnids("imagenet-r") if wnid not in right]
    publish(folder / "datasets" / "someone" / "wrong", [*right[:3], *wrong[:2]], right[:3] * 4)
    with LoopbackHub(folder) as server:
        yield server


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


SEVERAL = """
import json, runpy, sys
main, codes = runpy.run_path(sys.argv[1])["main"], []
run = runpy.run_path(sys.argv[1])["run"]
for sys.argv in json.loads(sys.argv[2]):
    try:
        run(main)
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code)
print(codes)
"""


def evaluate(hub, model, folder, *calls):
    """The recipe's exit codes and standard error for each of ``calls``, (place, output folder, options)."""
    (folder / "plan.yaml").write_text("conditions: [{set: imagenet-a}]")
    usual = ["recipe", "--model_name_or_path", model, "--suite", folder / "plan.yaml", "--no_checks", "--use_cpu"]
    calls = [
        [*map(str, usual), "--location", f"imagenet-a={place}", "--output_dir", str(folder / out), *words]
        for place, out, *words in calls
    ]
    environment = os.environ | hub.environment(folder / "cache") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SEVERAL, str(RECIPE), json.dumps(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_hub_set_is_read_mapped_and_counted(hub, model, tmp_path):
    """Downloaded and as a stream; and what is not the set is an error of one line."""
    place, samples = "someone/adversarial", "--per_sample"
    codes, errors = evaluate(
        hub, model, tmp_path,
        (place, "whole", samples, "--allow_partial"), (place, "stream", samples, "--streaming"),
        ("someone/wrong", "wrong"), ("someone/nowhere", "nowhere"), (place, "partial"),
    )  # fmt: skip
    assert codes == [0, 0, 2, 2, 2], errors[-3000:]
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
