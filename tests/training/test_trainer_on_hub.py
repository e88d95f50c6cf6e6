"""NullspaceTrainer and the Hub: what is pushed is whole, and a push that fails costs no training."""

import json
import logging
import re
import shutil
import threading
import time

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_nullspace import NoiseBank, NullspaceNoise, NullspaceTrainer
from hf_nullspace.core.uploads import UploadError
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.training.publishing import push_run
from loopback_hub import TOKEN
from tiny_models import tiny_model
from tiny_training import Images, assert_same, config, parameters_of

REPO = "someone/robust"
COMMIT = f"POST /api/models/{REPO}/commit/main"
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
NOISE = {"nullspace_noise.safetensors", "nullspace_noise.json", "nullspace_history.json", "cost.json"}
ROUNDS = {"noises/round-000.safetensors", "noises/round-001.safetensors"}
RESUMABLE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def make_trainer(folder, **given):
    known = {"push_to_hub": True, "hub_model_id": REPO} | given
    data, processor = Images(), make_image_processor(16)
    return NullspaceTrainer(tiny_model(), config(folder, **known), train_dataset=data, processing_class=processor)


def strangers_in(folder):
    """What lies in a folder and no run writes, with a link out of it under the name of a file that a run writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "secret").write_text("{}")
    for name in (".env", "id_rsa", "notes.json", "keys/model.safetensors", "model.safetensors.bak"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("password=1")
    for name in ("cost-of-all.json", "processor_config.json"):
        (folder / name).symlink_to(folder.parent / "secret")


STRANGERS = ".env, cost-of-all.json, id_rsa, keys/model.safetensors, model.safetensors.bak and 2 more"


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}


def files(hub, revision="main"):
    return hub.files("models", REPO, revision)


def commits(hub):
    """The files of every commit of a training, by its title, the first one first."""
    commit, found = hub.at("models", REPO), []
    while commit.parent is not None:
        found.append((commit.title, commit))
        commit = commit.parent
    return found[::-1]


def test_at_the_end_everything_is_one_commit(hub_here, tmp_path, caplog):
    trainer = make_trainer(tmp_path / "run", hub_strategy="end", hub_private_repo=True, hub_token=TOKEN, **EVERY_STEP)
    assert hub_here.repository("models", REPO).private
    trainer.train()
    assert files(hub_here) == {}
    (tmp_path / "run" / "control").mkdir()
    (tmp_path / "run" / "control" / "config.json").write_text("{}")
    strangers_in(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert hub_here.history("models", REPO) == ["Model save", "initial commit"]
    assert set(files(hub_here)) == MODEL | NOISE | ROUNDS
    assert caplog.text.count("no run writes that") == 1
    assert f"left in {tmp_path / 'run'}: {STRANGERS}; no run writes that" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert trainer.args.hub_token == TOKEN
    model = AutoModelForImageClassification.from_pretrained(REPO)
    assert_same(parameters_of(model), parameters_of(trainer.model))
    assert AutoImageProcessor.from_pretrained(REPO).size == {"height": 16, "width": 16}
    assert torch.equal(NullspaceNoise.from_pretrained(REPO).tensor, trainer.noise.tensor)
    assert [noise.provenance.round for noise in NoiseBank.from_pretrained(REPO)] == [0, 1]
    card = ModelCard.load(REPO)
    assert card.data.library_name == "transformers"
    assert f'"{REPO}"' in card.text
    assert "This model is a fine-tuned version of" not in card.text, "the Trainer's own card"


def test_results_that_lie_there_are_pushed_with_it_and_older_noises_go(hub_here, tmp_path):
    trainer = make_trainer(tmp_path / "run", push_to_hub=False)
    trainer.train()
    assert hub_here.asked == []
    (tmp_path / "run" / "results.md").write_text(f"measured in {tmp_path / 'run'}")
    for name in ("results.csv", "results.png"):
        (tmp_path / "run" / name).write_bytes(b"1")
    noises = tmp_path / "run" / "noises"
    shutil.copy(noises / "round-000.safetensors", noises / "round-007.safetensors")
    trainer.push_to_hub(revision="first")
    assert {"results.md", "results.csv", "results.png", "noises/round-007.safetensors"} <= set(files(hub_here, "first"))
    assert files(hub_here, "first")["results.md"] == b"measured in /path/to/run"
    (noises / "round-007.safetensors").unlink()
    pushed = trainer.push_to_hub("second", revision="first", license="mit")
    assert set(files(hub_here, pushed.oid)) >= ROUNDS
    assert "noises/round-007.safetensors" not in files(hub_here, pushed.oid)
    assert ModelCard(files(hub_here, "first")["README.md"].decode()).data.license == "mit"
    assert files(hub_here, "main") == {}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_every_checkpoint_is_whole(hub_here, tmp_path, strategy):
    """Model, noise and history of one commit are of the same step, and the pushed checkpoint can be gone on from."""
    trainer = make_trainer(tmp_path / "run", hub_strategy=strategy, save_total_limit=1, **EVERY_STEP)
    strangers_in(tmp_path / "run" / "checkpoint-2")
    strangers_in(tmp_path / "run")
    trainer.train()
    made = commits(hub_here)
    assert [title for title, _ in made] == [f"Training in progress, step {step}" for step in (1, 2, 3, 4)]
    weights = set()
    for step, (_, commit) in enumerate(made, start=1):
        rounds = 1 + (step - 1) // 2
        root = {name for name in commit.files if "/" not in name and name != ".gitattributes"}
        assert root == MODEL | NOISE
        assert {name for name in commit.files if name.startswith("noises/")} == set(sorted(ROUNDS)[:rounds])
        history = json.loads(commit.files["nullspace_history.json"].content)
        assert [entry["round"] for entry in history] == list(range(rounds))
        assert commit.files["nullspace_noise.safetensors"] == commit.files[f"noises/round-00{rounds - 1}.safetensors"]
        weights.add(commit.files["model.safetensors"].sha256)
        place = {"checkpoint": "last-checkpoint", "all_checkpoints": f"checkpoint-{step}"}.get(strategy)
        if place is not None:
            inside = {name.partition("/")[2] for name in commit.files if name.startswith(f"{place}/")}
            assert inside == (MODEL - {"README.md"}) | NOISE | RESUMABLE
            assert json.loads(commit.files[f"{place}/trainer_state.json"].content)["global_step"] == step
            assert commit.files[f"{place}/model.safetensors"] == commit.files["model.safetensors"]
    assert len(weights) == 4
    assert [path.name for path in (tmp_path / "run").glob("_push*")] == []
    assert not any("training_args.bin" in name for _, commit in made for name in commit.files)


def test_training_goes_on_from_what_was_pushed(hub_here, tmp_path):
    whole = make_trainer(tmp_path / "run", hub_strategy="all_checkpoints", **EVERY_STEP)
    whole.train()
    pulled = snapshot_download(REPO, cache_dir=tmp_path / "fresh", allow_patterns=["checkpoint-3/*"])
    again = make_trainer(tmp_path / "again", push_to_hub=False)
    again.train(resume_from_checkpoint=f"{pulled}/checkpoint-3")
    assert_same(parameters_of(whole.model), parameters_of(again.model))


@pytest.mark.parametrize("always", [True, False])
def test_training_does_not_wait_for_a_slow_push(hub_here, tmp_path, always):
    """Those that come meanwhile are pushed after it, in their order; or left out, which is the Trainer's default.

    By then their checkpoints are deleted.
    """
    saving = EVERY_STEP | {"hub_always_push": always, "save_total_limit": 1}
    trainer = make_trainer(tmp_path / "run", hub_strategy="every_save", **saving)
    held, seen = hub_here.hold(COMMIT), []

    def let_go():
        assert held.came.wait(60)
        while trainer.state.global_step < 4:
            time.sleep(0.01)
        seen.append(len(commits(hub_here)))
        held.go.set()

    thread = threading.Thread(target=let_go)
    thread.start()
    trainer.train()
    thread.join()
    assert seen == [0]
    pushed = [title[-1] for title, _ in commits(hub_here)]
    assert pushed == ["1", "2", "3", "4"] if always else pushed in (["1"], ["1", "4"])  # 4 is saved about then
    assert all(set(commit.files) >= MODEL | NOISE for _, commit in commits(hub_here))
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_a_failed_push_of_a_checkpoint_costs_nothing(hub_here, tmp_path, caplog):
    refused = hub_here.fail(COMMIT, status=400, times=2)
    trainer = make_trainer(tmp_path / "run", hub_strategy="every_save", **EVERY_STEP)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert refused.times == 0
    assert trainer.state.global_step == 4
    assert caplog.text.count("Training goes on") == 2
    assert [title[-1] for title, _ in commits(hub_here)] == ["3", "4"]
    assert set(files(hub_here)) == MODEL | NOISE | ROUNDS
    assert [path.name for path in (tmp_path / "run").glob("_push*")] == []


def test_a_failed_push_at_the_end_tells_how_to_repeat_it(hub_here, tmp_path):
    trainer = make_trainer(tmp_path / "run", hub_strategy="end")
    trainer.train()
    hub_here.fail(COMMIT, status=400)
    with pytest.raises(UploadError) as caught:
        trainer.save_model()
    assert "\n" not in str(caught.value)
    assert files(hub_here) == {}
    AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    command = re.search(r'is whole; repeat the upload with: python -c "(.*)"$', str(caught.value))[1]
    exec(command)
    assert set(files(hub_here)) == MODEL | NOISE | ROUNDS


def test_what_would_make_every_push_fail_is_an_error_before_training(hub_here, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE=1"):
        make_trainer(tmp_path / "run")
    trainer = make_trainer(tmp_path / "local", push_to_hub=False)
    trainer.train()
    trainer.save_model()
    AutoModelForImageClassification.from_pretrained(tmp_path / "local")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UploadError, match="hf auth login"):
        make_trainer(tmp_path / "run")
    with pytest.raises(UploadError, match=r"may not write there \(403\)"):
        make_trainer(tmp_path / "run", hub_token=TOKEN, hub_model_id="stranger/robust")


def test_in_the_background_and_under_the_folders_name(hub_here, tmp_path):
    (tmp_path / "my-run" / "_push-left").mkdir(parents=True)  # by a process that was killed
    trainer = make_trainer(tmp_path / "my-run", hub_model_id=None)
    assert not (tmp_path / "my-run" / "_push-left").exists()
    trainer.train()
    future = trainer.push_to_hub(blocking=False)
    for path in (tmp_path / "my-run").glob("*.safetensors"):
        path.write_bytes(b"changed meanwhile")
    assert future.result().oid == hub_here.at("models", "someone/my-run").sha
    assert len(hub_here.files("models", "someone/my-run")["model.safetensors"]) > 1000
    assert "someone/my-run" in hub_here.files("models", "someone/my-run")["README.md"].decode()
    assert [path.name for path in (tmp_path / "my-run").glob("_push*")] == []


def test_a_finished_folder_is_pushed_without_a_trainer(hub_here, tmp_path):
    trainer = make_trainer(tmp_path / "run", push_to_hub=False)
    trainer.train()
    trainer.save_model()
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / "run" / "checkpoint-9" / "x").write_text("")
    strangers_in(tmp_path / "run")
    push_run(tmp_path / "run", "robust")
    assert set(files(hub_here)) == MODEL | NOISE | ROUNDS
    assert f'"{REPO}"' in files(hub_here)["README.md"].decode()
