"""recipes/finetune.py with a model and data by Hub id: a real server on this machine, the real clients."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_nullspace import NullspaceNoise
from hf_nullspace.models.preprocessing import make_image_processor
from loopback_hub import LoopbackHub
from tiny_models import tiny_model

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.py"
NAMES = [f"class {index}" for index in range(5)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """someone/vit, and someone/pictures with the splits train and test."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_model().save_pretrained(folder / "models" / "someone" / "vit")
    make_image_processor(16).save_pretrained(folder / "models" / "someone" / "vit")
    place = folder / "datasets" / "someone" / "pictures"
    place.mkdir(parents=True)
    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        images = [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"img": images, "label": [index % 5 for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / f"{split}-00000-of-00001.parquet")
    with LoopbackHub(folder) as server:
        yield server


def finetune(hub, cache, output, *words):
    settings = ["--rounds=1", "--steps_per_round=1", "--global_batch_size=8", "--noise_batch_size=8",
                "--noise_max_steps=2", "--noise_pool_images=8", "--held_out_images=8", "--disable_tqdm=true",
                "--control=false", "--dataloader_pin_memory=false", "--use_cpu=true", "--save_strategy=no",
                "--corruptions", "contrast", "--severities", "3"]  # fmt: skip
    names = ["--model_name_or_path=someone/vit", "--dataset_name=someone/pictures", f"--output_dir={output}"]
    return subprocess.run(
        [sys.executable, str(RECIPE), *names, *settings, *words],
        env=os.environ | hub.environment(cache),
        capture_output=True,
        text=True,
        timeout=200,
    )


def errors(done):
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "someone/vit"),
        pytest.param("train-00000-of-00001.parquet", "someone/pictures", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_download_is_one_line_and_can_be_repeated(hub, tmp_path, file, name):
    cache, output = tmp_path / "cache", tmp_path / "out"
    hub.cut = {file}
    done = finetune(hub, cache, output)
    assert done.returncode == 2, done.stderr
    (error,) = errors(done)
    assert name in error
    assert any(file in question for question in hub.asked), "the file has to be asked for, to be cut"
    hub.cut = set()
    done = finetune(hub, cache, output)
    assert done.returncode == 0, done.stderr
    assert NullspaceNoise.from_pretrained(output).provenance.base_model == "someone/vit"
    assert NullspaceNoise.from_pretrained(output).provenance.revision is not None


@pytest.mark.parametrize("what", ["dataset_name", pytest.param("model_name_or_path", marks=pytest.mark.slow)])
def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path, what):
    done = finetune(hub, tmp_path / "cache", tmp_path / "out", f"--{what}=someone/else")
    assert done.returncode == 2
    (error,) = errors(done)
    assert "someone/else" in error
