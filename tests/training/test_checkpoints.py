"""Which checkpoints are whole, and that the weights of every family are all loaded."""

import json
import logging
import shutil

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.core.files import MANIFEST_NAME, NotWrittenError, write_manifest
from hf_nullspace.training.checkpoints import (
    NoCheckpointError,
    checkpoint_to_resume,
    last_complete_checkpoint,
    load_weights,
    missing_from,
    restore_noises,
)
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import FAMILIES, IMAGE, LABELS, SIZES, tiny_model
from tiny_training import Images, assert_differs, assert_same, config, parameters_of, trained

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "nullspace_noise.safetensors",
    MANIFEST_NAME,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained(folder, tiny_model(), Images(), save_strategy="steps", save_steps=1, save_total_limit=3)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_what_a_checkpoint_holds(run):
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    assert last_complete_checkpoint(run) == run / "checkpoint-4"
    assert set(FILES) <= {path.name for path in (run / "checkpoint-4").iterdir()}


@pytest.mark.parametrize("name", [*FILES, "noises/round-000.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["gone", "cut", "flipped"])
def test_a_damaged_file_makes_the_run_go_on_from_the_one_before(copy, caplog, name, change):
    """What power loss leaves: a file with too few bytes or with others. Without a manifest nobody knows."""
    path = copy / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    if change == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content) if change != "gone" else path.unlink()
    with caplog.at_level(logging.WARNING, "hf_nullspace"):
        assert last_complete_checkpoint(copy) == copy / "checkpoint-3"
    assert "skipped" in caplog.text
    assert "checkpoint-4, it is not whole: it lacks" in caplog.text
    if change != "gone":
        assert name in caplog.text
    if (name, change) == (MANIFEST_NAME, "gone"):  # a checkpoint that is named may come from elsewhere
        assert checkpoint_to_resume(copy / "checkpoint-4", copy, 1) == copy / "checkpoint-4"
        return
    words = r"cannot resume from .*checkpoint-4: it lacks .*resume_from_checkpoint=True"
    with pytest.raises(NoCheckpointError, match=words):
        checkpoint_to_resume(copy / "checkpoint-4", copy, 1)
    assert checkpoint_to_resume(copy / "checkpoint-3", copy, 1) == copy / "checkpoint-3"


def test_noises_that_a_run_lost_are_back_from_its_checkpoint(run, copy, caplog):
    """One deleted, one cut off; of a checkpoint without copies the loss is said."""
    (copy / "noises" / "round-000.safetensors").unlink()
    (copy / "noises" / "round-001.safetensors").write_bytes(b"")
    history = [{"round": 0}, {"round": 1}]
    restore_noises(copy / "checkpoint-4", copy, history)
    for name in ("round-000.safetensors", "round-001.safetensors"):
        assert (copy / "noises" / name).read_bytes() == (run / "noises" / name).read_bytes()
        assert f"{name} was" in caplog.text
    shutil.rmtree(copy / "noises")
    shutil.rmtree(copy / "checkpoint-4" / "noises")
    caplog.clear()
    restore_noises(copy / "checkpoint-4", copy, history)
    assert caplog.text.count("the noises of this run are incomplete") == 2


def test_a_checkpoint_too_many_goes_when_the_run_is_started_again(run, copy):
    """A kill between the newest checkpoint and the deletion of the oldest leaves four where three are asked for."""
    shutil.copytree(copy / "checkpoint-2", copy / "checkpoint-1")
    state = json.loads((copy / "checkpoint-1" / "trainer_state.json").read_text())
    (copy / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state | {"global_step": 1}))
    args = config(copy, save_strategy="steps", save_steps=1, save_total_limit=3)
    NullspaceTrainer(tiny_model(), args, train_dataset=Images()).train(resume_from_checkpoint=True)
    assert {path.name for path in copy.glob("checkpoint-*")} == {path.name for path in run.glob("checkpoint-*")}


def test_weights_are_readable_for_everyone_the_umask_allows(run):
    modes = {path.stat().st_mode for path in run.rglob("*") if path.is_file()}
    assert len(modes) == 1, "safetensors makes files of mode 0600"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"global_step": 3}'])
def test_a_damaged_state(copy, text):
    (copy / "checkpoint-4" / "trainer_state.json").write_text(text)
    assert last_complete_checkpoint(copy) == copy / "checkpoint-3"


@pytest.mark.parametrize(("history", "lacks"), [("{", True), ("[]", False), (None, False), ('[{"round": 0}]', True)])
def test_a_history_that_cannot_be_read_may_have_had_a_noise(copy, history, lacks):
    checkpoint = copy / "checkpoint-4"
    (checkpoint / "nullspace_noise.safetensors").unlink()
    path = checkpoint / "nullspace_history.json"
    path.unlink() if history is None else path.write_text(history)
    assert ("the noise" in missing_from(checkpoint, 1)) == lacks


def test_numbers_are_compared_as_numbers(copy):
    (copy / "checkpoint-4").rename(copy / "checkpoint-10")
    state = copy / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 10}))
    write_manifest(copy / "checkpoint-10")
    (copy / "checkpoint-best").mkdir()
    (copy / "checkpoint-11").write_text("a file")
    assert last_complete_checkpoint(copy) == copy / "checkpoint-10"


def test_of_another_number_of_processes(copy):
    with pytest.raises(NoCheckpointError, match=r"it lacks rng_state_0.pth, rng_state_1.pth"):
        checkpoint_to_resume(copy / "checkpoint-4", copy, 2)


def test_no_checkpoint_at_all(tmp_path):
    trainer = NullspaceTrainer(tiny_model(), config(tmp_path / "new"), train_dataset=Images())
    before = parameters_of(trainer.model)
    with pytest.raises(NoCheckpointError, match=r"no checkpoint that is whole in .*new; start without resuming"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(NoCheckpointError, match="there is no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(parameters_of(trainer.model), before)
    trainer.train(resume_from_checkpoint=False)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_is_loaded(family, tmp_path):
    """Saved under legacy names or not (transformers #48805)."""
    saved, other = tiny_model(family, seed=1), tiny_model(family, seed=2)
    saved.save_pretrained(tmp_path)
    assert_differs(parameters_of(other), parameters_of(saved))
    addresses = [parameter.data_ptr() for parameter in other.parameters()]
    load_weights(other, tmp_path)
    assert_same(other.state_dict(), saved.state_dict())
    assert [parameter.data_ptr() for parameter in other.parameters()] == addresses, "in place: an optimizer holds them"


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, "20KB"), (torch.float64, "5GB")])
def test_shards_are_loaded_and_weights_keep_their_dtype(tmp_path, dtype, shards):
    saved, other = tiny_model(seed=1).to(dtype), tiny_model(seed=2).to(dtype)
    saved.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    load_weights(other, tmp_path)
    assert_same(other.state_dict(), saved.state_dict())


def test_weights_of_another_model_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    deeper = ViTForImageClassification(ViTConfig(**SIZES | {"num_hidden_layers": 3}, **IMAGE, **LABELS))
    words = r"does not hold the weights of this ViTForImageClassification.*layers.2.* and 12 more$"
    with pytest.raises(NoCheckpointError, match=words) as caught:
        load_weights(deeper, tmp_path)
    assert str(caught.value).count(" is missing") == 4
    finer = ViTForImageClassification(ViTConfig(**SIZES, **IMAGE | {"patch_size": 8}, **LABELS))
    with pytest.raises(NoCheckpointError, match=r"position_embeddings is \(1, 17, 24\) there and \(1, 5, 24\) here"):
        load_weights(finer, tmp_path)


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    """A file lies where the folder of a checkpoint has to be."""
    (tmp_path / "checkpoint-2").write_text("a file")
    with pytest.raises(NotWrittenError, match=r"could not write .*checkpoint-2"):
        trained(tmp_path, tiny_model(), Images(), save_strategy="steps", save_steps=1)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert (tmp_path / "checkpoint-2").read_text() == "a file"
