"""recipes/reproduce.py on tiny models: its JSON against loops that share no code with it, and its resuming."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification

from figures.figure_4 import pairs_of
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.data.image_set import collate
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.artifact import NullspaceNoise, load_noise_bank
from hf_nullspace.training.noise_stream import noise_stream
from recipe_calls import RECIPES, call_recipe, saved_model
from tiny_models import tiny_model
from written_out import algorithm_1

call = partial(call_recipe, "reproduce")

TINY = """
dataset_name: digits
horizontal_flip: false
crop_scale: 1.0
dataloader_pin_memory: false
disable_tqdm: true
use_cpu: true
image_size: 16
patch_size: 4
hidden_size: 16
num_hidden_layers: 2
num_attention_heads: 2
intermediate_size: 32
base_epochs: 12
base_learning_rate: 5.0e-3
max_train_images: 640
first_eval_image: 5
max_eval_images: 48
per_device_eval_batch_size: 20
lambdas: [0, 3]
seeds: 2
sweep_steps: 4
rounds: 2
steps_per_round: 2
global_batch_size: 16
learning_rate: 1.0e-3
epsilon: 0.05
noise_limit: 2.0
noise_max_steps: 30
noise_batch_size: 16
held_out_images: 32
fgsm: [4/255]
corruptions: [contrast]
severities: [1, 3]
noise_count: 3
pairs: 2
grid: 2
closure_control: true
table4: ["192:16", "384:32"]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of 16 px images with classes that are not the digits': figures 2 and 4 take it as it is."""
    return saved_model(tiny_model("vit"), tmp_path_factory.mktemp("vit"))


def made(figure, tiny, folders, *words):
    """The folder of a figure, of which there is a picture."""
    folder = folders.mktemp(figure)
    call(figure, "--config", tiny, "--output_dir", folder, *words)
    check_picture(folder / f"{figure}.png")
    return folder


def check_picture(path):
    with Image.open(path) as picture:
        assert picture.width > 700
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert path.stat().st_size < 250_000


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def images(first=5, count=48, size=16, split="test"):
    """The digits that are measured on, normalised as the processor of the fixture says, and their labels."""
    rows = load_image_dataset("digits", split).select(range(first, first + count))
    pixels = [np.asarray(row["image"].convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) for row in rows]
    array = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (array - 0.5) / 0.5, torch.tensor(rows["label"])


@torch.no_grad()
def probabilities(model, pixel_values, noise=None):
    """With the noise in the position embedding of the patches instead of a hook."""
    position = model.vit.embeddings.position_embeddings
    before = position.detach().clone()
    if noise is not None:
        position[:, 1:] += noise
    found = model(pixel_values).logits.double().softmax(-1).numpy()
    position.copy_(before)
    return found


def influence(clean, noisy):
    return float(((noisy - clean) ** 2).sum(1).mean())


# ---- figure 2


@pytest.fixture(scope="module")
def figure_2(saved, tiny, tmp_path_factory):
    return made("figure2", tiny, tmp_path_factory, "--model_name_or_path", saved)


def test_figure_2_says_what_was_measured_and_how(figure_2):
    found = read(figure_2 / "figure2.json")
    points = found["points"]
    assert [(point["lambda"], point["seed"]) for point in points] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    for point in points:
        assert point["permuted"]["centred_norm"] == pytest.approx(point["learned"]["centred_norm"], rel=1e-5)
        assert point["steps"] == 4
    by_lambda = {row["lambda"]: row["learned"]["centred_norm"]["mean"] for row in found["curves"]}
    assert by_lambda[3] > 1.2 * by_lambda[0]
    assert found["command"].startswith("python recipes/reproduce.py figure2 --config")
    assert found["protocol"]["images"] == "digits, split test, 5 to 52"
    assert found["images"] == 48
    assert found["settings"]["method"]["noise_batch_size"] == 16
    assert "hf-nullspace" in found["versions"]


def test_figure_2_is_equation_6_in_a_loop_of_its_own(figure_2, saved):
    """One point is learned again without the package's learning, hook and measures."""
    model = ViTForImageClassification.from_pretrained(saved).eval()
    train = [{"pixel_values": image, "labels": 0} for image in images(0, 640, split="train")[0]]
    _, batches = noise_stream(train, collate, batch_size=16, held_out_images=32, seed=42, round=1)
    settings = NoiseSettings(
        max_steps=4, epsilon=None, norm_weight=3, norm="centred", noise_limit=0.1, learning_rate=0.1, weight_decay=0
    )
    iterates, _ = algorithm_1(model.double(), (batch.double() for batch in batches), derive_seed(42, 1), settings)
    noise, model = iterates[-1].float(), model.float()
    pixel_values = images()[0]
    clean, noisy = probabilities(model, pixel_values), probabilities(model, pixel_values, noise)
    point = read(figure_2 / "figure2.json")["points"][3]["learned"]
    assert point["norm"] == pytest.approx(float(noise.norm()), rel=1e-3)
    assert point["influence"] == pytest.approx(influence(clean, noisy), rel=1e-2)
    assert point["match"] == pytest.approx((clean.argmax(1) == noisy.argmax(1)).mean())
    projection = model.vit.embeddings.patch_embeddings.projection
    with torch.no_grad():
        tokens = torch.nn.functional.conv2d(pixel_values, projection.weight, projection.bias, stride=4).flatten(2)
    own = (tokens - tokens.mean(1, keepdim=True)).flatten(1).norm(dim=1).mean()
    assert read(figure_2 / "figure2.json")["embedding_norm"] == pytest.approx(float(own), rel=1e-4)


@pytest.mark.slow
def test_two_processes_make_the_figure_of_one(figure_2, saved, tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(RECIPES / "reproduce.py")]
    words = ["figure2", "--config", str(tiny), "--model_name_or_path", str(saved), "--output_dir", str(tmp_path)]
    subprocess.run([*command, *words], check=True, capture_output=True, timeout=300)
    ours, whole = read(tmp_path / "figure2.json"), read(figure_2 / "figure2.json")
    for point, other in zip(ours["points"], whole["points"], strict=True):
        for kind in ("learned", "permuted"):
            assert point[kind] == pytest.approx(other[kind], rel=1e-4)


def test_the_raw_permutation_keeps_the_raw_norm(saved, tiny, tmp_path):
    words = ["--model_name_or_path", saved, "--output_dir", tmp_path, "--raw_permutation", "true", "--seeds", 1]
    call("figure2", "--config", tiny, *words)
    for point in read(tmp_path / "figure2.json")["points"]:
        assert point["permuted"]["norm"] == pytest.approx(point["learned"]["norm"], rel=1e-5)
        assert point["permuted"]["centred_norm"] != pytest.approx(point["learned"]["centred_norm"], rel=1e-5)


# ---- figure 4


@pytest.fixture(scope="module")
def figure_4(saved, tiny, tmp_path_factory):
    return made("figure4", tiny, tmp_path_factory, "--model_name_or_path", saved)


def test_figure_4_is_the_influence_of_scaled_and_added_noises(figure_4, saved):
    found = read(figure_4 / "figure4.json")
    (bank,) = (figure_4 / "banks").iterdir()
    noises = [noise.tensor for noise in load_noise_bank(bank)]
    assert len(noises) == found["noises"] == 3
    model = ViTForImageClassification.from_pretrained(saved).eval()
    pixel_values, _ = images()
    clean = probabilities(model, pixel_values)
    expected = [[influence(clean, probabilities(model, pixel_values, a * v)) for a in (0, 0.5, 1)] for v in noises]
    np.testing.assert_allclose(found["scaling"]["influence"], expected, rtol=1e-3, atol=1e-9)
    assert found["influence"]["high"] > 1e-3
    surfaces = found["combinations"]["influence"]
    one, two = pairs_of(3, 2, seed=42)[0]
    assert pair_of(surfaces[0], expected) == (one, two)
    both = influence(clean, probabilities(model, pixel_values, 0.5 * noises[one] + 1.0 * noises[two]))
    assert surfaces[0][1][2] == pytest.approx(both, rel=1e-3)
    assert found["contour"] == found["influence"]["low"] == found["control"]["contour"]
    for ours, own in zip(found["control"]["scaling"]["influence"], found["scaling"]["influence"], strict=True):
        assert ours[0] == 0
        assert ours[1] != pytest.approx(own[1], rel=1e-3)  # another direction,
        assert ours[2] <= own[2]  # at the same influence or, if it had less, as it is
    assert found["control"]["influence"]["mean"] > 0.5 * found["influence"]["mean"]


def pair_of(surface, scaling):
    """Which two noises the edges of a surface belong to."""
    first, second = surface[2][0], surface[0][2]
    index = [min(range(3), key=lambda i: abs(scaling[i][2] - value)) for value in (first, second)]
    return tuple(index)


def test_a_bank_that_is_there_gives_the_same_figure(figure_4, saved, tiny, tmp_path, capsys):
    (bank,) = (figure_4 / "banks").iterdir()
    call("figure4", "--config", tiny, "--model_name_or_path", saved, "--output_dir", tmp_path, "--noises", bank)
    assert "3 noises of this model" in capsys.readouterr().out
    ours, learned = read(tmp_path / "figure4.json"), read(figure_4 / "figure4.json")
    assert ours["scaling"] == learned["scaling"]
    assert ours["combinations"] == learned["combinations"]
    other = saved_model(tiny_model("vit", seed=1), tmp_path / "other")
    words = ["--model_name_or_path", other, "--output_dir", tmp_path / "out", "--noises", bank, "--noise_count", 2]
    call("figure4", "--config", tiny, *words)
    assert "2 of 2 noises were learned on other weights" in capsys.readouterr().out


# ---- figure 3 and table 5


@pytest.fixture(scope="module")
def figure_3(tiny, tmp_path_factory):
    return made("figure3", tiny, tmp_path_factory)


def test_figure_3_starts_at_one_and_is_what_the_checkpoints_say(figure_3):
    found = read(figure_3 / "figure3.json")
    assert set(found["arms"]) == {"nullspace", "plain"}
    for rows in found["arms"].values():
        assert [row["step"] for row in rows] == [0, 2, 4]
        assert set(rows[0]["relative"].values()) == {1.0}
    assert found["runs"]["plain"][0][0] == found["runs"]["nullspace"][0][0]
    pixel_values, labels = images()
    for arm in ("nullspace", "plain"):
        last = found["runs"][arm][0][2]
        model = ViTForImageClassification.from_pretrained(figure_3 / "runs" / f"{arm}-42" / "checkpoint-4").eval()
        correct = probabilities(model, pixel_values).argmax(1) == labels.numpy()
        assert last["conditions"][0]["correct"] == correct.sum()
        assert last["groups"]["clean"] == pytest.approx(correct.mean())
        adversarial, corruption = (
            np.mean([entry["score"] for entry in last["conditions"] if entry["group"] == group])
            for group in ("adversarial", "corruption")
        )
        assert last["groups"]["average"] == pytest.approx((correct.mean() + adversarial + corruption) / 3)
        start = found["runs"][arm][0][0]["groups"]["clean"]
        assert found["arms"][arm][2]["relative"]["clean"] == pytest.approx(correct.mean() / start)
    assert start > 0.2
    folder = figure_3 / "runs" / "nullspace-42" / "noises"
    assert not (figure_3 / "runs" / "plain-42" / "noises").exists()
    own = [NullspaceNoise.load(path).centred_norm for path in sorted(folder.iterdir())]
    assert [entry["centred_norm"] for entry in found["rounds"][0]] == pytest.approx(own)


def test_figure_3_is_not_made_twice(figure_3, tiny):
    before = {path: path.stat().st_mtime_ns for path in figure_3.rglob("*") if path.suffix in (".safetensors", ".pt")}
    text = (figure_3 / "figure3.json").read_text()
    call("figure3", "--config", tiny, "--output_dir", figure_3)
    assert (figure_3 / "figure3.json").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_table_5_is_the_influence_on_the_model_that_the_noise_was_learned_on(figure_3, tiny, capsys):
    before = sorted(figure_3.rglob("*.safetensors"))
    call("table5", "--config", tiny, "--output_dir", figure_3)
    check_picture(figure_3 / "table5.png")
    assert sorted(figure_3.rglob("*.safetensors")) == before
    rows = read(figure_3 / "table5.json")["runs"][0]
    run = figure_3 / "runs" / "nullspace-42"
    history = read(run / "nullspace_history.json")
    pixel_values, _ = images()
    for row, entry, folder in zip(rows, history, (figure_3 / "base", run / "checkpoint-2"), strict=True):
        model = ViTForImageClassification.from_pretrained(folder).eval()
        noise = NullspaceNoise.load(run / "noises" / f"round-{row['round']:03d}.safetensors").tensor
        clean, noisy = probabilities(model, pixel_values), probabilities(model, pixel_values, noise)
        assert row["test"] == pytest.approx(influence(clean, noisy), rel=1e-3, abs=1e-8)
        assert row["match"] == pytest.approx((clean.argmax(1) == noisy.argmax(1)).mean())
        assert (row["minibatch"], row["held_out"]) == (entry["minibatch_influence"], entry["influence"])
    assert max(row["test"] for row in rows) > 1e-3
    assert "Quoted from the paper (ImageNet, epsilon 0.03), step: influence: 40: 0.028" in capsys.readouterr().out


# ---- table 4, and a folder of another run


def test_a_folder_belongs_to_one_model(figure_4, tiny, capsys):
    with pytest.raises(SystemExit):
        call("figure2", "--config", tiny, "--output_dir", figure_4)
    said = capsys.readouterr().err
    assert "holds a run with other settings" in said
    assert said.endswith("None now). Choose another --output_dir\n")
