"""What the recipes pull and push: a data set on the Hub is fine-tuned on, and the run with its results goes back."""

import json
import re

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_nullspace import NoiseBank, NullspaceNoise
from hf_nullspace.models.preprocessing import make_image_processor
from recipe_calls import SHORT_RUN, call_recipe
from tiny_models import tiny_model

NAMES = [f"class {index}" for index in range(5)]
SAVED = ["--rounds=2", "--steps_per_round=1", "--save_strategy=steps", "--save_steps=1", "--control=true"]


@pytest.fixture
def published(hub_here):
    """someone/pictures, as `Dataset.push_to_hub` publishes it, and someone/vit; and nothing in the cache."""
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    random = np.random.default_rng(0)

    def split(count):
        images = [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"image": images, "label": [index % 5 for index in range(count)]}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": split(40), "test": split(10)}).push_to_hub("someone/pictures", private=True)
    tiny_model().push_to_hub("someone/vit")
    make_image_processor(16).push_to_hub("someone/vit")
    return ["--model_name_or_path=someone/vit", "--dataset_name=someone/pictures"]


def test_finetune_pushes_the_run_with_its_results(hub_here, published, tmp_path, capsys):
    """Every push of the first run fails; the same command again brings everything."""
    words = [
        *published,
        *SHORT_RUN,
        *SAVED,
        "--interpolate=true",
        f"--output_dir={tmp_path / 'run'}",
        "--push_to_hub=true",
        "--hub_model_id=lab/robust",
    ]
    refused = hub_here.fail("POST /api/models/lab/robust/commit/main", status=400, times=100)
    error = error_of(capsys, *words, "--hub_strategy=every_save", "--hub_always_push=true")
    assert 100 - refused.times == 3, "two checkpoints and the end, and nothing of the control"
    refused.times = 0
    assert f"The run in {tmp_path / 'run'} is whole; repeat the upload with" in error
    assert (tmp_path / "run" / "results.md").exists(), "it was measured and written before"
    assert hub_here.files("models", "lab/robust") == {}
    call_recipe("finetune", *words, "--hub_strategy=end")
    assert "Pushed to lab/robust" in capsys.readouterr().out
    assert hub_here.history("models", "lab/robust") == ["End of training", "initial commit"]
    files = hub_here.files("models", "lab/robust")
    results = {"results.json", "results.md", "results.csv", "results.png", "noise.png", "run.json", "cost.json"}
    assert results | {"interpolation.json", "interpolation.png"} <= set(files)
    assert {name.partition("/")[0] for name in files if "/" in name} == {"noises", ".eval_results"}
    for name in ("results.png", "noise.png", "model.safetensors", "noises/round-001.safetensors"):
        assert files[name] == (tmp_path / "run" / name).read_bytes(), name
    for name in ("nullspace_history.json", "results.json", "config.json"):
        here = (tmp_path / "run" / name).read_text().replace(str(tmp_path), "/path/to")
        assert json.loads(files[name]) == json.loads(here), name
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card = ModelCard.load("lab/robust")
    alpha = json.loads(files["interpolation.json"])["alpha"]
    assert f"| interpolated with the checkpoint | alpha = {alpha:g} (0 is the checkpoint" in str(card)
    assert "](interpolation.png)" in str(card)
    assert card.data.base_model == "someone/vit"
    assert {entry["checkpoint"] for entry in json.loads(files["results.json"])["results"]} >= {"before", "plain"}
    AutoModelForImageClassification.from_pretrained("lab/robust")
    assert len(NoiseBank.from_pretrained("lab/robust")) == 2
    assert NullspaceNoise.from_pretrained("lab/robust").provenance.revision == hub_here.at("models", "someone/vit").sha


def error_of(capsys, *words):
    """The one line of a call that fails."""
    with pytest.raises(SystemExit) as stopped:
        call_recipe("finetune", *words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    return error


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "someone/vit"),
        pytest.param("data/train-00000-of-00001.parquet", "someone/pictures", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_download_is_one_line_and_can_be_repeated(hub_here, published, tmp_path, capsys, file, name):
    words = [*published, *SHORT_RUN, f"--output_dir={tmp_path / 'out'}"]
    hub_here.cut = {file}
    assert name in error_of(capsys, *words)
    assert any(file in question for question in hub_here.asked), "the file has to be asked for, to be cut"
    hub_here.cut = set()
    call_recipe("finetune", *words)
    assert NullspaceNoise.from_pretrained(tmp_path / "out").provenance.base_model == "someone/vit"
    assert NullspaceNoise.from_pretrained(tmp_path / "out").provenance.revision is not None


@pytest.mark.parametrize("what", ["dataset_name", "model_name_or_path"])
def test_what_the_hub_does_not_have_is_one_line(hub_here, published, tmp_path, capsys, what):
    words = [*published, *SHORT_RUN, f"--output_dir={tmp_path / 'out'}", f"--{what}=someone/else"]
    assert "someone/else" in error_of(capsys, *words)


def test_without_a_token_nothing_begins(hub_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    for recipe, words in (("finetune", ["--push_to_hub=true"]), ("learn_noise", ["--push_to_hub=lab/noise"])):
        with pytest.raises(SystemExit):
            call_recipe(
                recipe, "--model_name_or_path=m", "--dataset_name=d", f"--output_dir={tmp_path / 'run'}", *words
            )
        assert re.fullmatch(r"error: no token for the Hub: run `hf auth login`, .*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert hub_here.asked == []


def test_learn_noise_pushes_one_and_a_bank(hub_here, published, tmp_path, capsys):
    words = [*published, "--batch_size=8", "--held_out_images=8", "--max_steps=3", "--use_cpu=true"]
    one = [*words, f"--output_dir={tmp_path / 'one'}", "--push_to_hub=lab/noise", "--private=true"]
    call_recipe("learn_noise", *one)
    assert hub_here.repository("models", "lab/noise").private
    card = ModelCard.load("lab/noise")
    assert card.data.base_model == "someone/vit"
    assert "in pixels of [0, 1]" in card.text
    bank = [*words, f"--output_dir={tmp_path / 'bank'}", "--count=2", "--push_to_hub=lab/noises"]
    hub_here.fail("POST /api/models/lab/noises/commit/main", status=400)
    with pytest.raises(SystemExit):
        call_recipe("learn_noise", *bank)
    assert "repeat the upload" in capsys.readouterr().err
    call_recipe("learn_noise", *bank)
    assert [noise.provenance.round for noise in NoiseBank.from_pretrained("lab/noises")] == [0, 1]
    assert NullspaceNoise.from_pretrained("lab/noise").provenance.influence_images == 8
