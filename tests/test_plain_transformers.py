"""What is saved loads in plain transformers, without hf_nullspace and in the oldest version that is allowed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

from hf_nullspace.hub.convert import save_converted, timm_image_processor, to_transformers
from hf_nullspace.hub.timm_vit import read_architecture
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.training.ema import FOLDER as EMA_FOLDER
from hf_nullspace.training.trainer import NullspaceTrainer
from timm_style import HEADS, MEAN, STD, timm_weights
from tiny_models import FAMILIES, tiny_model
from tiny_training import Images, config

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".venv-oldest" / "bin" / "python"  # `make oldest` makes it


def logits_of(model, processor, image):
    with torch.no_grad():
        return model.eval()(**processor(image, return_tensors="pt")).logits[0]


def save(place, families):
    """(an image, folder -> the logits of the model before it was saved): trained, averaged and converted models."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    image.save(place / "image.png")
    processor, expected = make_image_processor(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), {}
    for family in families:
        settings = config(place / family, rounds=1, steps_per_round=1, noise_max_steps=2, ema_decay=0.5)
        trainer = NullspaceTrainer(
            tiny_model(family), settings, train_dataset=Images(count=16), processing_class=processor
        )
        trainer.train()
        trainer.save_model()
        expected[place / family] = logits_of(trainer.model, processor, image)
        expected[place / family / EMA_FOLDER] = logits_of(trainer.ema.model, processor, image)
        assert not torch.equal(expected[place / family], expected[place / family / EMA_FOLDER])
    for name, distilled in (("converted", False), ("converted-distilled", True)):
        weights = timm_weights(distilled=distilled)
        model = to_transformers(weights, read_architecture(weights, HEADS)[0], list("abcde"))
        processor = timm_image_processor(16, MEAN, STD, 0.875)
        save_converted(model, processor, {}, place / name)
        expected[place / name] = logits_of(model, processor, image)
    return place / "image.png", expected


def load_plainly(python, image, folders, tmp_path):
    """Versions and answers of ``tests/load_plainly.py``, run by ``python`` away from this repository."""
    command = [str(python), str(Path(__file__).with_name("load_plainly.py")), str(image), str(tmp_path / "found.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *map(str, folders)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "found.json").read_text())


def check(found, expected):
    assert found["ours"] == []
    for folder, logits in expected.items():
        answer = found["folders"][str(folder)]
        assert answer["not_as_saved"] == [], folder
        assert answer["label"] == answer["pipeline"], folder
        np.testing.assert_allclose(answer["logits"], logits, rtol=1e-5, atol=1e-5, err_msg=str(folder))
        assert answer["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    classes = {Path(folder).name: answer["class"] for folder, answer in found["folders"].items()}
    assert classes["converted"] == classes["vit"] == "ViTForImageClassification"
    assert classes["converted-distilled"] == "DeiTForImageClassificationWithTeacher"


def test_a_saved_model_needs_no_hf_nullspace(tmp_path):
    image, expected = save(tmp_path, ["vit", "deit", "swin"])
    check(load_plainly(sys.executable, image, expected, tmp_path), expected)


@pytest.mark.slow
def test_a_saved_model_loads_in_the_oldest_versions(tmp_path):
    """Every family, written by the versions of this environment."""
    if not OLDEST.exists():
        pytest.skip("no .venv-oldest with the oldest versions that pyproject.toml allows; make oldest builds it")
    image, expected = save(tmp_path, FAMILIES)
    found = load_plainly(OLDEST, image, expected, tmp_path)
    check(found, expected)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {
        requirement.name: next(part.version for part in requirement.specifier if part.operator == ">=")
        for requirement in map(Requirement, project["dependencies"])
    }
    for name, version in found["versions"].items():
        assert version.split("+")[0].startswith(lowest[name]), f"{name} {version} is not the oldest, {lowest[name]}"
