"""recipes/finetune.py with a model and data by Hub id: a real server on this machine, the real clients."""

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_nullspace import NullspaceNoise
from hf_nullspace.models.preprocessing import make_image_processor
from recipe_calls import SHORT_RUN, call_recipe
from tiny_models import tiny_model

NAMES = [f"class {index}" for index in range(5)]


@pytest.fixture
def hub(hub_here, tmp_path):
    """someone/vit, and someone/pictures with the splits train and test; nothing in the cache."""
    tiny_model().save_pretrained(tmp_path / "hub" / "models" / "someone" / "vit")
    make_image_processor(16).save_pretrained(tmp_path / "hub" / "models" / "someone" / "vit")
    place = tmp_path / "hub" / "datasets" / "someone" / "pictures"
    place.mkdir(parents=True)
    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        images = [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"img": images, "label": [index % 5 for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / f"{split}-00000-of-00001.parquet")
    return hub_here


def finetune(output, *words):
    names = ["--model_name_or_path=someone/vit", "--dataset_name=someone/pictures", f"--output_dir={output}"]
    call_recipe("finetune", *names, *SHORT_RUN, *words)


def error_of(output, capfd, *words):
    """The one line of a call that fails."""
    with pytest.raises(SystemExit) as stopped:
        finetune(output, *words)
    assert stopped.value.code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    return error


@pytest.mark.parametrize(
    ("file", "name"), [("model.safetensors", "someone/vit"), ("train-00000-of-00001.parquet", "someone/pictures")]
)
def test_an_interrupted_download_is_one_line_and_can_be_repeated(hub, tmp_path, capfd, file, name):
    hub.cut = {file}
    assert name in error_of(tmp_path / "out", capfd)
    assert any(file in question for question in hub.asked), "the file has to be asked for, to be cut"
    hub.cut = set()
    finetune(tmp_path / "out")
    assert NullspaceNoise.from_pretrained(tmp_path / "out").provenance.base_model == "someone/vit"
    assert NullspaceNoise.from_pretrained(tmp_path / "out").provenance.revision is not None


@pytest.mark.parametrize("what", ["dataset_name", "model_name_or_path"])
def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path, capfd, what):
    assert "someone/else" in error_of(tmp_path / "out", capfd, f"--{what}=someone/else")
