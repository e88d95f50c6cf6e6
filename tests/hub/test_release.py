"""recipes/release.py on a run that recipes/finetune.py made: refused, measured again, pushed, pulled, kept."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_nullspace import NullspaceNoise
from hf_nullspace.cards.card import model_card
from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.hub.planned import header, planned_card
from hf_nullspace.hub.recheck import Recheck, ReleaseError, recheck, what_is_missing
from hf_nullspace.hub.release import keep_records
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from loopback_hub import READ_ONLY, TOKEN
from recipe_calls import call_recipe

ROOT = Path(__file__).parents[2]
SMALL = """
dataset_name: digits
horizontal_flip: false
crop_scale: 1.0
image_size: 16
hidden_size: 16
num_hidden_layers: 1
num_attention_heads: 2
intermediate_size: 16
base_epochs: 3
max_train_images: 400
rounds: 2
steps_per_round: 2
global_batch_size: 16
noise_batch_size: 16
noise_max_steps: 5
noise_pool_images: 32
held_out_images: 32
learning_rate: 1.0e-2
fgsm: [8/255]
corruptions: [fog, contrast]
severities: [3]
max_eval_images: 150
disable_tqdm: true
dataloader_pin_memory: false
use_cpu: true
report_to: none
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.yaml").write_text(SMALL)
    call_recipe("finetune", "--config", folder / "small.yaml", "--output_dir", folder / "mine")
    return folder / "mine"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))


@pytest.fixture
def release(tmp_path):
    """Call it, ``code`` is how it has to end."""

    def call(*words, code=0):
        words = [*words, "--cards", tmp_path / "cards", "--records", tmp_path / "records"]
        if not code:
            return call_recipe("release", *words)
        with pytest.raises(SystemExit) as stopped:
            call_recipe("release", *words)
        assert stopped.value.code == code
        return None

    return call


def test_a_dry_run_shows_what_would_be_pushed(run, release, tmp_path, capsys, hub_here, caplog):
    (tmp_path / "secret.json").write_text("{}")
    (run / "strength.png").symlink_to(tmp_path / "secret.json")
    for name in (".env", "id_rsa", "weights.bin", "control/secret.txt"):
        (run / name).write_text("1")
    release("--run", run, "--repo", "lab/mine", "--dry-run")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("hf_nullspace")] == [
        f"left in {run}: .env, id_rsa, strength.png, weights.bin; no run writes that, or it is a link out of the folder"
    ]
    out = capsys.readouterr().out
    assert not {".env", "id_rsa", "strength.png", "weights.bin"} & set(out.split())
    size = f"{(run / 'model.safetensors').stat().st_size:,}  model.safetensors"
    for words in ("as recorded  clean: ", "150 images right", "0 answers differ", size, "Nothing was pushed"):
        assert words in out
    for words in ("checkpoint", "training_args"):
        assert words not in out
    assert hub_here.asked == []
    assert (run / "README.md").is_file()
    kept = tmp_path / "cards" / "mine.md"
    assert ModelCard.load(kept).data.model_name == "mine"
    assert 'model="lab/mine"' in kept.read_text()


def test_a_release_arrives_as_it_was_sent(finished, run, release, tmp_path, capsys, hub_here):
    release("--run", run, "--repo", "lab/mine", "--private", "--license", "apache-2.0")
    assert "Pushed, pulled back and compared: " in capsys.readouterr().out
    there = hub_here.files("models", "lab/mine")
    assert hub_here.repository("models", "lab/mine").private
    assert hub_here.history("models", "lab/mine")[0] == "Release"
    assert there["model.safetensors"] == (run / "model.safetensors").read_bytes()
    wanted = """config.json preprocessor_config.json README.md results.json noises/round-001.safetensors run.json
        nullspace_noise.safetensors nullspace_history.json results.png"""
    assert set(wanted.split()) <= set(there)
    assert not [name for name in there if name.startswith(("checkpoint", "base", "control")) or name.endswith(".bin")]
    here = [name for name, content in there.items() if re.search(rf"{finished.parent}|{run.parent}".encode(), content)]
    assert here == [], "paths of this machine"
    pulled = AutoModelForImageClassification.from_pretrained("lab/mine").state_dict()
    ours = AutoModelForImageClassification.from_pretrained(run).state_dict()
    assert all((value == pulled[name]).all() for name, value in ours.items())
    noise = NullspaceNoise.from_pretrained("lab/mine")
    assert (noise.tensor == NullspaceNoise.from_pretrained(run).tensor).all()
    assert ModelCard(there["README.md"].decode()).data.license == "apache-2.0"
    (tmp_path / "mine" / "noises" / "round-001.safetensors").unlink()
    history = json.loads((run / "nullspace_history.json").read_text())
    (run / "nullspace_history.json").write_text(json.dumps(history[:1]))
    release("--run", run, "--repo", "lab/mine", "--recheck_images", "0")
    assert "noises/round-001.safetensors" not in hub_here.files("models", "lab/mine")


def test_what_arrives_changed_is_named(run, release, capsys, hub_here, monkeypatch):
    original = hub_here.repository
    sent = {}

    def repository(kind, name):
        found = original(kind, name)
        if found is not None and (file := found.at("main").files.get("config.json")) and not sent:
            sent["config"] = file
            found.at("main").files["config.json"] = type(file)(file.content[:-2] + b" }", file.large)
        return found

    monkeypatch.setattr(hub_here, "repository", repository)
    release("--run", run, "--repo", "lab/mine", "--recheck_images", "0", code=2)
    assert (
        "is not what was sent: it lacks an unchanged config.json (its SHA-256 is another). Repeat with python"
        in capsys.readouterr().err
    )


def test_an_incomplete_folder_is_refused_with_what_to_do(run, release, capsys):
    for name in ("preprocessor_config.json", "results.json", "noises/round-001.safetensors"):
        (run / name).unlink()
    release("--run", run, "--repo", "lab/mine", "--dry-run", code=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [
        "preprocessor_config.json", "results.json or robustness/results.json", "noises/round-001.safetensors"
    ]  # fmt: skip
    assert "image_processor.save_pretrained(RUN)" in lines[1]
    (run / "model.safetensors").unlink()
    assert any(line.startswith("model.safetensors: the weights") for line in what_is_missing(run))
    assert "is no folder" in what_is_missing(run / "nothing")[0]


def test_weights_that_were_not_measured_are_refused(run, release, capsys, hub_here):
    weights = load_file(run / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"].flip(0).contiguous()
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    release("--run", run, "--repo", "lab/mine", code=1)
    caught = capsys.readouterr()
    assert "NOT AS RECORDED  clean: " in caught.out
    assert "not those that were measured" in caught.err
    assert not [line for line in hub_here.asked if line.startswith("POST")]


def test_the_base_model_in_place_of_the_fine_tuned_one_is_noticed(run):
    answers = recheck(run)
    assert [answer.differing for answer in answers] == [0, 0]
    assert answers[0].condition == "clean"
    assert answers[1].condition.startswith("generated ")
    shutil.copy(run / "base" / "model.safetensors", run / "model.safetensors")
    assert not all(answer.passed for answer in recheck(run))


@pytest.mark.parametrize(("images", "allowed"), [(1, 1), (99, 1), (199, 1), (200, 2), (1000, 10)])
def test_one_answer_in_a_hundred_may_differ(images, allowed):
    for differing, same, passed in [(allowed, None, True), (allowed, True, True), (allowed + 1, True, False),
                                    (0, False, False)]:  # fmt: skip
        found = Recheck("clean", images, images, images - differing, differing, same)
        assert found.passed == passed
        assert f"{differing} answers differ, {allowed} may" in str(found)


def test_data_that_are_not_there_are_asked_for(run, release, capsys):
    results = json.loads((run / "results.json").read_text())
    results["context"]["settings"]["data"]["dataset_name"] = str(run / "pictures")
    (run / "results.json").write_text(json.dumps(results))
    release("--run", run, "--repo", "lab/mine", "--dry-run", code=2)
    assert "say where they are with --dataset_name" in capsys.readouterr().err
    release("--run", run, "--repo", "lab/mine", "--dry-run", "--dataset_name", "digits")


def test_an_evaluation_beside_the_run_is_measured_again(run):
    """Evenly spaced images, and the random numbers of their places in the whole."""
    (run / "results.json").unlink()
    plan = run.parent / "plan.yaml"
    plan.write_text("conditions: [clean, {corruption: gaussian_noise, severity: 5}, {attack: FGSM, eps: 8/255}]")
    text = "--dataset_name digits --limit 90 --use_cpu true --disable_tqdm true --checks false"
    words = text.split()
    words += ["--model_name_or_path", run, "--suite", plan, "--output_dir", run / "robustness"]
    call_recipe("evaluate_robustness", *words)
    answers = recheck(run, 40)
    assert [(answer.condition, answer.images, answer.differing) for answer in answers] == [
        ("clean", 40, 0),
        ("generated gaussian_noise 5", 40, 0),
    ]
    card = model_card(run)
    assert "| generated gaussian_noise 5 | 90 |" in str(card)
    assert {entry.metric_args["images"] for entry in card.data.eval_results} == {90}
    weights = load_file(run / "model.safetensors")
    weights["classifier.bias"][0] += 1e-6
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    (answer, *_) = recheck(run, 40)
    assert (answer.differing, answer.same_weights, answer.passed) == (0, False, False), "the recorded hash is another"


def test_a_part_of_a_part_keeps_the_seeds_of_the_whole():
    rows = ArrayRows(np.zeros((30, 8, 8, 3), dtype=np.uint8), np.zeros(30, dtype=int))
    part = ImageSet(rows, Preprocessing.from_processor(make_image_processor(8)), name="zeros").part(7)
    assert part.first(3).places == [0, 5, 10] == part.places[:3]


def test_the_metric_goes_to_a_space(release, capsys, hub_here):
    release("--metric", "lab/robustness", "--dry-run")
    assert hub_here.asked == []
    release("--metric", "lab/robustness")
    assert "Use it: evaluate.load('lab/robustness')" in capsys.readouterr().out
    assert {"app.py", "robustness.py", "scores.py"} <= set(hub_here.files("spaces", "lab/robustness"))
    release("--metric", "lab/robust-ness", code=2)
    assert "NAME has to be lower-case" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --run DIR --repo"),
        (["--repo", "lab/mine"], "--repo needs --run DIR"),
        (["--run", "x", "--render", "true"], "--render takes no --run"),
        (["--run", "x", "--repo", "mine"], "expected ORG/NAME"),
        (["--run", "x", "--repo", "a/b", "--metric", "a/b"], "give one of "),
    ],
)
def test_words_that_make_no_release(words, message, release, capsys):
    release(*words, code=2)
    assert message in capsys.readouterr().err


def test_without_a_token_nothing_is_begun(run, release, capsys, hub_here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    release("--run", run, "--repo", "lab/mine", code=2)
    caught = capsys.readouterr()
    assert "run `hf auth login`, or set HF_TOKEN" in caught.err
    assert caught.out == ""


def test_a_push_that_is_refused_can_be_repeated(run, release, tmp_path, capsys, hub_here, monkeypatch):
    words = ("--run", run, "--repo", "lab/mine", "--recheck_images", "0", "--note", "Two words.")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    release(*words, code=2)
    said = capsys.readouterr().err
    assert "may not write there (403)" in said
    again = shlex.split(said.partition("repeat the release with ")[2])
    assert again[:8] == ["python", "recipes/release.py", *map(str, words[:6])]
    assert "Two words." in again
    assert not (tmp_path / "records").exists(), "kept is what was released"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    call_recipe("release", *again[2:])
    assert b"Two words." in hub_here.files("models", "lab/mine")["README.md"]
    assert "Two words." in (tmp_path / "cards" / "mine.md").read_text()


def test_kept_records_give_the_same_numbers(run, release, tmp_path):
    release("--run", run, "--keep", "small")
    kept = (tmp_path / "cards" / "small.md").read_text()
    table = [line for line in str(model_card(run)).splitlines() if line.startswith("| clean")]
    assert table[0] in kept
    assert {path.suffix for path in (tmp_path / "records" / "small").iterdir()} == {".json"}
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "records").rglob("*.json"))


@pytest.mark.parametrize("name", ["..", ".", "../small", ".hidden", "a/b", ""])
def test_records_are_kept_in_a_folder_of_their_own(name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ReleaseError, match=f"^'{re.escape(name)}' is no name for a folder of records"):
        keep_records(tmp_path / "run", name, tmp_path / "records")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_planned_card_has_the_configuration_and_no_result(tmp_path):
    config = ROOT / "recipes" / "configs" / "vit-small-imagenet.yaml"
    card = planned_card(config)
    (block,) = [part for part in card.text.split("```") if part.startswith("yaml")]
    assert yaml.safe_load(block.removeprefix("yaml")) == yaml.safe_load(config.read_text())
    text = "# What it is.\n#\n#   command    do this\n#                --and that\n#   time       long\nx: 1\n# no"
    assert header(text) == ("What it is.", {"command": "do this --and that", "time": "long"})
    (tmp_path / "odd.yaml").write_text("# What.\n#   command    do\nmodel_name_or_path: a/b\n")
    with pytest.raises(ValueError, match="has no hardware, time, expected"):
        planned_card(tmp_path / "odd.yaml")
