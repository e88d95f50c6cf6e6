"""Killed with SIGKILL and resumed: the same weights and noises, bit for bit, as a run that was never killed.

The runs are real processes of their own (run_for_resume.py), forked from a server that has imported everything once.
"""

import itertools
import json
import random
import shutil
import signal

import pytest
import torch
from run_for_resume import STEPS, run
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import torchvision_here
from forked import start
from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.training.checkpoints import last_complete_checkpoint
from hf_nullspace.training.record import STATE_NAME
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import tiny_model
from tiny_training import Images, assert_differs, assert_same, config, trained


def processes(folder, timeout=300, **options):
    """The exit code of ``run`` in a process of its own."""
    folder.mkdir(exist_ok=True, parents=True)
    process = start(run, str(folder), log=folder / "log.txt", **options)
    process.join(timeout)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def undisturbed(folder, **given):
    """The folder of a run that was never killed."""
    assert processes(folder, **given) == 0, (folder / "log.txt").read_text()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"))


def history(folder):
    entries = json.loads((folder / "nullspace_history.json").read_text())
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def assert_same_end(folder, whole):
    assert_same(load_file(folder / "final" / "model.safetensors"), load_file(whole / "final" / "model.safetensors"))
    ours, theirs = load_noise_bank(folder / "noises"), load_noise_bank(whole / "noises")
    assert len(ours) == len(theirs) == 3
    assert_same({n.provenance.round: n.tensor for n in ours}, {n.provenance.round: n.tensor for n in theirs})
    assert [n.provenance for n in ours] == [n.provenance for n in theirs]
    assert history(folder / "final") == history(whole / "final") == history(folder)
    states = [json.loads((f / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for f in (folder, whole)]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1]


def killed_and_resumed(folder, die, **given):
    assert processes(folder, die=die, **given) == -signal.SIGKILL
    assert not (folder / "final").exists()
    state = {path.name for path in folder.glob("checkpoint-*")}
    assert processes(folder, resume=True, **given) == 0, (folder / "log.txt").read_text()
    return state


def test_the_run_is_worth_resuming(whole):
    """Every checkpoint and noise differs from the one before, and the rounds do not begin at checkpoints."""
    weights = [load_file(whole / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4, 6, 8)]
    noises = [{"noise": noise.tensor} for noise in load_noise_bank(whole / "noises")]
    for one, other in (*itertools.pairwise(weights), *itertools.pairwise(noises)):
        assert_differs(one, other)
    assert [entry["step"] for entry in history(whole)] == [0, 3, 6]


def test_killed_at_a_random_moment(whole, tmp_path):
    first_saved, total = map(int, (whole / "forwards.txt").read_text().split())
    moment = random.SystemRandom().randint(first_saved + 1, total)
    print(f"killed at forward pass {moment} of {total}")
    found = killed_and_resumed(tmp_path / "run", ("forward", moment))
    assert found, "a checkpoint had been written before"
    assert_same_end(tmp_path / "run", whole)


LACKS = "lacks a readable trainer_state.json"


@pytest.mark.parametrize(
    ("die", "half", "missing"),
    [
        (("noise", 2, 5), set(), ""),
        (("save", 8, "weights"), {"checkpoint-8"}, f"{LACKS}, the optimizer, the scheduler, rng_state.pth"),
        (("save", 8, "optimizer"), {"checkpoint-8"}, f"{LACKS}, rng_state.pth"),
        (("truncate", 8, "rng"), {"checkpoint-8"}, LACKS),
    ],
)
def test_killed_while_a_noise_is_learned_or_a_checkpoint_is_written(whole, tmp_path, die, half, missing):
    """Checkpoint 6 begins round 2. Checkpoint 8 is half there; the run goes on from 6, in the second epoch."""
    folder = tmp_path / "run"
    found = killed_and_resumed(folder, die, save_total_limit=1)
    assert found == {"checkpoint-6"} | half
    text = (folder / "log.txt").read_text()
    assert ("skipped" in text) == bool(half)
    assert missing in text
    assert_same_end(folder, whole)


def test_resumed_within_a_round_it_uses_the_noise_of_the_checkpoint(whole, tmp_path):
    """From checkpoint 4, after step 3 began round 1: nothing is learned again until round 2."""
    folder = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
    assert processes(folder, resume=str(folder / "checkpoint-4")) == 0, (folder / "log.txt").read_text()
    assert "round-001.safetensors was lost; it is back from" in (folder / "log.txt").read_text()
    kept, now = (json.loads((f / "nullspace_history.json").read_text()) for f in (whole / "checkpoint-4", folder))
    assert [entry["seconds"] for entry in kept] == [entry["seconds"] for entry in now[:2]], "of the first time"
    assert_same_end(folder, whole)


def test_with_ema(whole, tmp_path):
    given = {"ema_decay": 0.7, "save_total_limit": 1}
    whole_ema, folder = undisturbed(tmp_path / "whole", **given), tmp_path / "run"
    killed_and_resumed(folder, ("save", 8, "optimizer"), **given)
    assert_same_end(folder, whole_ema)
    ours, theirs = (load_file(path / "final" / "ema" / "model.safetensors") for path in (folder, whole_ema))
    assert_same(ours, theirs)
    assert_differs(ours, load_file(folder / "final" / "model.safetensors"))
    assert_same_end(whole_ema, whole)  # averaging changes nothing else


@pytest.mark.skipif(not torchvision_here.HERE, reason="torchvision is not installed")
@pytest.mark.slow
def test_with_augmentation_also_on_workers(tmp_path):
    """AugMix, mixup and CutMix, with an attack on mixed images; killed and resumed on two workers, and on none."""
    given = {"augmentation": "augmix+mixup+cutmix", "objective": "nullspace+fast"}
    whole, folder = undisturbed(tmp_path / "whole", **given), tmp_path / "run"
    killed_and_resumed(folder, ("save", 8, "optimizer"), dataloader_num_workers=2, **given)
    assert_same_end(folder, whole)


def test_killed_while_alpha_is_chosen(whole, tmp_path):
    """At the last of 24 images of the last of four conditions: the same choice, and the same noise beside it."""
    given = {"interpolate": True, "save_total_limit": 1}
    undisturbed_one, folder = undisturbed(tmp_path / "whole", **given), tmp_path / "run"
    assert killed_and_resumed(folder, ("choice", 4 * 24 - 1), **given) == {f"checkpoint-{STEPS}"}
    assert_same_end(folder, undisturbed_one)
    for name in ("interpolation.json", "final/nullspace_noise.safetensors", "final/nullspace_noise.json"):
        assert (folder / name).read_bytes() == (undisturbed_one / name).read_bytes()
    # Nothing else is changed: the checkpoint has the fine-tuned weights, those of a run that does not go back.
    last, plain = (load_file(f / f"checkpoint-{STEPS}" / "model.safetensors") for f in (folder, whole))
    assert_same(last, plain)


def test_with_a_universal_noise(whole, tmp_path):
    """It is ascended at every step: the checkpoint has what step 6 left."""
    given = {"objective": "nullspace+universal", "save_total_limit": 1}
    undisturbed_run, folder = undisturbed(tmp_path / "whole", **given), tmp_path / "run"
    killed_and_resumed(folder, ("save", 8, "optimizer"), **given)
    assert_same_end(folder, undisturbed_run)
    ours, theirs = (load_file(path / "final" / STATE_NAME) for path in (folder, undisturbed_run))
    assert_same(ours, theirs)
    assert ours["universal.00"].norm() > 0


@pytest.mark.slow
def test_killed_again_and_again(whole, tmp_path):
    """By a clock, wherever that is: also between the files of a checkpoint, or while an old one is deleted."""
    folder, seconds = tmp_path / "run", float((whole / "seconds.txt").read_text())
    codes = []
    for _ in range(5):
        resume = last_complete_checkpoint(folder) is not None
        after = random.SystemRandom().uniform(0.1, 0.8) * seconds
        codes.append(processes(folder, resume=resume, die=("clock", after), save_total_limit=1))
        if codes[-1] == 0:
            break
        assert codes[-1] == -signal.SIGKILL, (folder / "log.txt").read_text()
    assert -signal.SIGKILL in codes, "no run took as long as it did before"
    if codes[-1] != 0:
        assert processes(folder, resume=last_complete_checkpoint(folder) is not None, save_total_limit=1) == 0
    assert_same_end(folder, whole)


@pytest.mark.parametrize("file", ["the noise", "the weights", "the optimizer"])
def test_a_full_disk_is_one_clear_error(whole, tmp_path, file):
    """RLIMIT_FSIZE while checkpoint 4 is written: the noise, the weights or the optimizer no longer fit."""
    folder, example = tmp_path / "run", whole / "checkpoint-4"
    sizes = {
        "the noise": 300,
        "the weights": (example / "model.safetensors").stat().st_size // 2,
        "the optimizer": (example / "model.safetensors").stat().st_size * 3 // 2,
    }
    assert sizes["the optimizer"] < (example / "optimizer.pt").stat().st_size
    assert processes(folder, die=("full", 4, sizes[file]), save_total_limit=1) == 3
    name, _, message = (folder / "error.txt").read_text().split("\n", 2)
    assert name == "NotWrittenError"
    assert f"could not write {folder / 'checkpoint-4'} (" in message
    assert "free space" in message
    assert "\n" not in message
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    AutoModelForImageClassification.from_pretrained(folder / "checkpoint-2")
    assert processes(folder, resume=True) == 0, (folder / "log.txt").read_text()
    assert_same_end(folder, whole)


def test_a_finished_run_is_not_trained_further(tmp_path):
    """transformers 5.23 trains one more step when it resumes from the last checkpoint in the middle of an epoch."""
    given = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    first = trained(tmp_path, tiny_model(), Images(), **given)
    noises = sorted(path.name for path in (tmp_path / "noises").iterdir())
    assert len(noises) == 2
    again = NullspaceTrainer(tiny_model(), config(tmp_path, **given), train_dataset=Images())
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_same(again.model.state_dict(), first.model.state_dict())
    assert sorted(path.name for path in (tmp_path / "noises").iterdir()) == noises
    assert [entry["round"] for entry in again.history] == [0, 1]
    assert torch.equal(again.noise.tensor, first.noise.tensor)
