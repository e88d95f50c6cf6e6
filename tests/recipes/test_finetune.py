"""recipes/finetune.py and learn_noise.py on real images: what they write loads, resumes and is true."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from forked import kill_when
from hf_nullspace import NullspaceNoise, interpolate
from hf_nullspace.models.preprocessing import make_image_processor
from recipe_calls import SHORT_RUN, call_recipe
from tiny_models import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = """
dataset_name: digits
horizontal_flip: false
crop_scale: 1.0
hidden_size: 16
num_hidden_layers: 1
num_attention_heads: 2
intermediate_size: 16
base_epochs: 1
rounds: 2
steps_per_round: 2
global_batch_size: 16
noise_batch_size: 16
noise_max_steps: 5
noise_pool_images: 32
held_out_images: 32
learning_rate: 1.0e-3
fgsm: [8/255]
corruptions: [gaussian_noise, contrast, pixelate]
severities: [3]
max_eval_images: 40
save_steps: 2
disable_tqdm: true
dataloader_pin_memory: false
use_cpu: true
"""

TOKEN = "hf_givenonthecommandline"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on the digits, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(SMALL)
    words = ["--config", folder / "small.yaml", "--output_dir", folder / "out", "--hub_token", TOKEN]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        call_recipe("finetune", *words)
    return folder, out.getvalue()


def test_results_are_those_of_the_saved_model(finished):
    """Counted again by a loop that shares nothing with the suite: clean accuracy of the folders on the disk."""
    from hf_nullspace.data.sources import load_image_dataset

    folder = finished[0] / "out"
    rows = load_image_dataset("digits", "test").select(range(40))
    records = json.loads((folder / "results.json").read_text())["results"]
    for name, place in (("before", folder / "base"), ("plain", folder / "control"), ("nullspace", folder)):
        model = AutoModelForImageClassification.from_pretrained(place).eval()
        processor = AutoImageProcessor.from_pretrained(place, backend="pil")
        with torch.no_grad():
            predicted = model(**processor([row["image"] for row in rows], return_tensors="pt")).logits.argmax(-1)
        correct = sum(int(a == row["label"]) for a, row in zip(predicted.tolist(), rows, strict=True))
        record = next(r for r in records if r["checkpoint"] == name and r["condition"] == "clean")
        assert (record["correct"], record["n"]) == (correct, 40)


def test_a_token_of_the_command_line_lands_in_no_file(finished):
    folder, said = finished
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "results.json", "training_args.bin", "trainer_state.json"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in said


def test_pictures_noises_and_history_are_there(finished):
    folder = finished[0] / "out"
    for picture in ("results.png", "noise.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200
    history = json.loads((folder / "nullspace_history.json").read_text())
    assert [entry["round"] for entry in history] == [0, 1]
    assert NullspaceNoise.from_pretrained(folder).provenance.round == 1
    bank = sorted(path.name for path in (folder / "noises").iterdir())
    assert bank == ["round-000.safetensors", "round-001.safetensors"]
    assert not list((folder / "control").glob("noise*"))


def test_started_again_it_goes_on_and_with_other_settings_it_refuses(finished, capsys):
    folder = finished[0]
    names = ("model.safetensors", "config.json", "control/config.json")
    before = [(folder / "out" / name).read_bytes() for name in names]
    words = ["--config", folder / "small.yaml", "--output_dir", folder / "out"]
    call_recipe("finetune", *words)
    assert "Going on from" in capsys.readouterr().out
    assert [(folder / "out" / name).read_bytes() for name in names] == before
    with pytest.raises(SystemExit):
        call_recipe("finetune", *words, "--epsilon", "0.5")
    error = capsys.readouterr().err
    assert "holds a run with other settings (epsilon: 0.03 there, 0.5 now)" in error
    assert (folder / "out" / "model.safetensors").read_bytes() == before[0]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model and a data set of one's own: 16 px images of 3 classes in folders, of which the model knows 5."""
    folder = tmp_path_factory.mktemp("own")
    model = tiny_model()
    model.config.id2label = dict(enumerate(["ant", "bee", "cat", "dog", "elk"]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained(folder / "model")
    make_image_processor(16).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "bee", "elk"):
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{index}.png")
    return folder


def words_of(own, output):
    return [f"--model_name_or_path={own / 'model'}", f"--dataset_name={own / 'images'}", f"--output_dir={output}"]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.mark.parametrize(("streaming", "count"), [("false", 12), ("true", 6)])
def test_own_model_and_own_data(own, tmp_path, capsys, streaming, count):
    some = [f"--streaming={streaming}", *(["--max_eval_images=6"] if count == 6 else [])]
    call_recipe("finetune", *words_of(own, tmp_path), *SHORT_RUN, *some)
    assert "The data has 3 of the model's 5 classes; the head is kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["3"] == "dog"
    assert {record["n"] for record in results_of(tmp_path)} == {count}


def test_part_of_the_way_back_on_images_held_out_of_the_training_split(own, tmp_path, capsys):
    """Own data without a validation split; the checkpoint of the last step has the fine-tuned weights."""
    words = ["--interpolate=true", "--control=true", "--save_strategy=steps", "--save_steps=2", "--learning_rate=1e-2"]
    grid = ["--interpolate_grid", "0.4", "1"]
    call_recipe("finetune", *words_of(own, tmp_path), *SHORT_RUN, *words, *grid)
    chosen = json.loads((tmp_path / "interpolation.json").read_text())
    note = f"{own / 'images'}, 3 of 36 images of split train, held out; the checkpoint may have been trained on them"
    assert (chosen["count"], chosen["images"]) == (3, note)
    assert [point["alpha"] for point in chosen["alphas"]] == [0, 0.4, 1]
    assert chosen["rule"].startswith("the best average among those that keep clean accuracy within 0.5 points")
    assert f"Interpolated (nullspace), {chosen['chosen']}" in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "control"):
        alpha = json.loads((folder / "interpolation.json").read_text())["alpha"]
        saved, wanted = (
            model.state_dict()
            for model in (
                AutoModelForImageClassification.from_pretrained(folder),
                interpolate(own / "model", folder / "checkpoint-2", alpha),
            )
        )
        assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    results = json.loads((tmp_path / "results.json").read_text())["context"]["alpha"]
    assert results == {"plain": alpha, "nullspace": chosen["alpha"]}
    report = (tmp_path / "results.md").read_text()
    assert "* nullspace: alpha = " in report
    assert "](interpolation.png)" in report
    with Image.open(tmp_path / "interpolation.png") as image:
        assert min(image.size) > 200


@pytest.mark.slow
def test_killed_while_alpha_is_chosen_on_the_digits(tmp_path):
    """Slow: three runs. One is killed after its last checkpoint, before it has chosen; the next goes on from there."""
    (tmp_path / "small.yaml").write_text(SMALL)
    words = ["--config", tmp_path / "small.yaml", "--interpolate", "true", "--learning_rate", "0.01"]
    call_recipe("finetune", *words, "--output_dir", tmp_path / "whole")
    whole, again = tmp_path / "whole", tmp_path / "again"
    last = again / "checkpoint-4" / "manifest.json"
    kill_when(last.exists, "finetune", *words, "--output_dir", again, log=tmp_path / "log")
    assert not (again / "interpolation.json").exists()
    assert (again / "control" / "interpolation.json").exists()
    call_recipe("finetune", *words, "--output_dir", again)
    names = ("model.safetensors", "nullspace_noise.safetensors", "interpolation.json", "control/model.safetensors")
    for name in names:
        wanted = (whole / name).read_bytes().replace(str(whole).encode(), str(again).encode())  # as long
        assert (again / name).read_bytes() == wanted, name
    chosen = json.loads((again / "interpolation.json").read_text())
    assert chosen["images"] == "digits, 143 of 1438 images of split train, held out of all training"


def test_a_new_head_is_new_and_reported(own, tmp_path, capsys):
    """Five classes of other names: a head of the same size must not keep the old classes' weights."""
    for split in ("train", "test"):
        for index, name in enumerate("vwxyz"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for copy in range(4):
                colour = (50 * index, 20 * copy, 100)
                Image.new("RGB", (16, 16), colour).save(tmp_path / "images" / split / name / f"{copy}.png")
    other = [f"--dataset_name={tmp_path / 'images'}", "--learning_rate=1e-12"]
    call_recipe("finetune", *words_of(own, tmp_path / "out"), *SHORT_RUN, *other)
    assert "New classifier head for 5 classes" in capsys.readouterr().out
    old = AutoModelForImageClassification.from_pretrained(own / "model").classifier.weight
    new = AutoModelForImageClassification.from_pretrained(tmp_path / "out").classifier.weight
    assert new.std() < 0.03 < 0.1 < old.std()
    checkpoints = {record["checkpoint"] for record in results_of(tmp_path / "out")}
    assert checkpoints == {"nullspace"}, "an untrained head has no 'before'"


def learn_noise(own, output, *words):
    """The noise, or None of a bank."""
    given = [*words_of(own, output), "--batch_size=8", "--held_out_images=8", "--use_cpu=true"]
    call_recipe("learn_noise", *given, *words)
    return NullspaceNoise.from_pretrained(output) if not list(output.glob("round-*")) else None


def test_learn_noise_one_bank_and_resumed(own, tmp_path, capsys):
    noise = learn_noise(own, tmp_path / "one", "--max_steps=6")
    assert noise.provenance.base_model == str(own / "model")
    assert noise.provenance.influence_images == 8
    learn_noise(own, tmp_path / "bank", "--max_steps=6", "--count=3")
    paths = sorted((tmp_path / "bank").glob("round-*"))
    assert len(paths) == 3
    assert torch.equal(NullspaceNoise.load(paths[0]).tensor, noise.tensor), "noise k depends on (seed, k) alone"
    third = paths[2].read_bytes()
    paths[2].unlink()
    history = json.loads((tmp_path / "bank" / "history.json").read_text())
    (tmp_path / "bank" / "history.json").write_text(json.dumps(history[:2]))
    learn_noise(own, tmp_path / "bank", "--max_steps=6", "--count=3")
    assert paths[2].read_bytes() == third
    whole = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[2].write_bytes(third[:-100])
    learn_noise(own, tmp_path / "bank", "--max_steps=6", "--count=3")
    assert [path.read_bytes() for path in paths] == whole, "a lost and a damaged one are learned again"
    assert len(json.loads((tmp_path / "bank" / "history.json").read_text())) == 3
    with Image.open(tmp_path / "bank" / "history.png") as image:
        assert min(image.size) > 200
    assert "influence" in capsys.readouterr().out


def test_learn_noise_at_the_boundary(own, tmp_path, capsys):
    words = ["--learner=boundary", "--pool_images=16", "--max_steps=3", "--epsilon=0.001"]
    noise = learn_noise(own, tmp_path / "one", *words)
    assert 0.00095 < noise.provenance.influence <= 0.001
    assert noise.provenance.settings["learner"] == "boundary"
    assert "stopped by calibrated after 3 steps" in capsys.readouterr().out


def test_learn_noise_exploratory(own, tmp_path):
    words = ["--max_steps=20", "--epsilon=none", "--noise_limit=0.1"]
    none, much = (learn_noise(own, tmp_path / lam, *words, f"--norm_weight={lam}").centred_norm for lam in ("0", "5"))
    assert much > 2 * none


@pytest.mark.slow
def test_the_demo_of_the_readme(tmp_path):
    """`make demo` as a newcomer runs it: at least 95% before, and every file that the README names."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate" / "cpu.yaml",
         RECIPES / "finetune.py", "--output_dir", tmp_path / "out", "--config", RECIPES / "configs" / "digits.yaml"],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    clean = next(r for r in records if r["checkpoint"] == "before" and r["condition"] == "clean")
    assert clean["n"] == 359
    assert clean["correct"] / clean["n"] >= 0.95
