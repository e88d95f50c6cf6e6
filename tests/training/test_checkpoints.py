"""Which checkpoints are whole, and that the weights of every family are all loaded."""

import json
import logging
import shutil

import pytest
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.training.checkpoints import (
    NoCheckpointError,
    NotWrittenError,
    check_complete,
    last_complete_checkpoint,
    load_weights,
    one_clear_error,
)
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import FAMILIES, LABELS, tiny_model
from tiny_training import Images, assert_differs, assert_same, config, parameters_of, trained

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "nullspace_noise.safetensors",
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


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_makes_the_run_go_on_from_the_one_before(copy, caplog, name):
    (copy / "checkpoint-4" / name).unlink()
    with caplog.at_level(logging.WARNING, "hf_nullspace"):
        assert last_complete_checkpoint(copy) == copy / "checkpoint-3"
    assert "skipped" in caplog.text
    assert "checkpoint-4, it is not whole: it lacks" in caplog.text
    with pytest.raises(
        NoCheckpointError, match=r"cannot resume from .*checkpoint-4: it lacks .*resume_from_checkpoint=True"
    ):
        check_complete(copy / "checkpoint-4")
    assert check_complete(copy / "checkpoint-3") == copy / "checkpoint-3"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"global_step": 3}'])
def test_a_damaged_state(copy, text):
    (copy / "checkpoint-4" / "trainer_state.json").write_text(text)
    assert last_complete_checkpoint(copy) == copy / "checkpoint-3"


def test_numbers_are_compared_as_numbers(copy):
    (copy / "checkpoint-4").rename(copy / "checkpoint-10")
    state = copy / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 10}))
    (copy / "checkpoint-best").mkdir()
    (copy / "checkpoint-11").write_text("a file")
    assert last_complete_checkpoint(copy) == copy / "checkpoint-10"


def test_of_another_number_of_processes(copy):
    with pytest.raises(NoCheckpointError, match=r"it lacks rng_state_0.pth, rng_state_1.pth"):
        check_complete(copy / "checkpoint-4", processes=2)


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


def test_sharded_weights_are_loaded(tmp_path):
    saved, other = tiny_model(seed=1), tiny_model(seed=2)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    load_weights(other, tmp_path)
    assert_same(other.state_dict(), saved.state_dict())


def test_weights_keep_their_dtype(tmp_path):
    tiny_model(seed=1).double().save_pretrained(tmp_path)
    other = tiny_model(seed=2).double()
    load_weights(other, tmp_path)
    assert_same(other.state_dict(), tiny_model(seed=1).double().state_dict())


def test_weights_of_another_model_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    deeper = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, **LABELS))
    with pytest.raises(
        NoCheckpointError, match=r"does not hold the weights of this ViTForImageClassification.*layers.2"
    ):
        load_weights(deeper, tmp_path)


def test_only_errors_of_the_disk_are_reworded(tmp_path):
    def fail(error):
        with one_clear_error(tmp_path / "checkpoint-3"):
            raise error

    with pytest.raises(RuntimeError, match=r"^CUDA out of memory.$"):
        fail(RuntimeError("CUDA out of memory."))
    with pytest.raises(ConnectionError, match=r"^the Hub$"):
        fail(ConnectionError("the Hub"))
    with pytest.raises(NotWrittenError, match=r"checkpoint-3 .*No space left.*go on from the last whole checkpoint"):
        fail(OSError(28, "No space left on device"))


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    """A file lies where the folder of a checkpoint has to be."""
    (tmp_path / "checkpoint-2").write_text("a file")
    with pytest.raises(NotWrittenError, match=r"could not write .*checkpoint-2"):
        trained(tmp_path, tiny_model(), Images(), save_strategy="steps", save_steps=1)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert (tmp_path / "checkpoint-2").read_text() == "a file"
