"""A disk that is full, too small, or cannot be written; folders that are gone, or files; a clock that is wrong."""

import json
import os
import shutil
import subprocess
import time

import pytest
from test_kills import spread


def failed(campaign, kind, name, recipe, folder, ended, mend=None):
    """Judge a start that the disk ended, then start again with room."""
    problem = None
    if ended.code != 2 or len(ended.errors) != 1 or "Traceback" in ended.err:
        problem = f"lost: exit code {ended.code} on a full disk: {ended.err[-600:]}"
    elif str(folder) not in ended.errors[0] and "/dev/shm" not in ended.errors[0]:
        problem = f"lost: the line does not name {folder}: {ended.errors[0]}"
    if mend is not None:
        mend()
    said = ended.errors[0] if ended.errors else ""
    return campaign.again(kind, name, recipe, folder, problem=problem, seconds=ended.seconds, said=said)


@pytest.mark.slow
def test_full_from_a_file_on(campaign, finetune):
    """RLIMIT_FSIZE: no file can take another byte."""
    wrong = []
    for name, number in spread(finetune.points["file"][4:], 20):  # the first are those of the lock
        if not campaign.wanted("full disk", name.replace("before", "from"), finetune):
            continue
        folder = campaign.new_folder()
        ended = campaign.server.run(finetune, folder, point=["file", number + 4], action="full")
        if ended.code == 0:  # nothing was written after this point
            continue
        wrong.append(failed(campaign, "full disk", name.replace("before", "from"), finetune, folder, ended))
    assert [problem for problem in wrong if problem] == []


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many kB; skips where this process may not."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size, more="rw"):
        options = f"size={size}k,{more}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"this process may not mount a disk: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 60, 120, 200, 300, 400, 520])
def test_a_real_disk_that_is_too_small(campaign, finetune, small_disk, size):
    """In kB; a run takes about 900."""
    disk = small_disk(size)
    folder = disk / "run"
    ended = campaign.server.run(finetune, folder)
    problem = failed(
        campaign, "full disk", f"a disk of {size} kB", finetune, folder, ended,
        mend=lambda: subprocess.run(["mount", "-o", "remount,size=20000k", disk], check=True),
    )  # fmt: skip
    assert problem is None


@pytest.mark.slow
@pytest.mark.parametrize("state", ["new", "killed", "finished"])
def test_a_disk_that_cannot_be_written(campaign, finetune, killed, small_disk, state):
    disk = small_disk(20000)
    folder = disk / "run"
    if state != "new":
        shutil.copytree(killed if state == "killed" else finetune.undisturbed, folder)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ended = campaign.server.run(finetune, folder)
    problem = failed(
        campaign, "read-only disk", f"a {state} run", finetune, folder, ended,
        mend=lambda: subprocess.run(["mount", "-o", "remount,rw", disk], check=True),
    )  # fmt: skip
    assert problem is None


FOLDERS = ("base", "control", "control/ema", "control/checkpoint-2", "noises", "checkpoint-2", "checkpoint-4")


@pytest.mark.slow
@pytest.mark.parametrize("instead", ["gone", "empty", "a file"])
@pytest.mark.parametrize("state", ["killed", "finished"])
def test_folders_that_are_gone(campaign, finetune, killed, instead, state):
    run = killed if state == "killed" else finetune.undisturbed
    wrong = []
    for name in [name for name in (*FOLDERS, "ema", "checkpoint-6") if (run / name).is_dir()]:
        if not campaign.wanted(f"folder of a {state} run", f"{name}: {instead}", finetune):
            continue
        folder = campaign.new_folder(copy_of=run)
        shutil.rmtree(folder / name)
        if instead == "empty":
            (folder / name).mkdir()
        elif instead == "a file":
            (folder / name).write_text("not a folder\n")

        def mend(place=folder / name):
            place.unlink()

        kind = f"folder of a {state} run"
        mending = mend if instead == "a file" else None
        wrong.append(campaign.again(kind, f"{name}: {instead}", finetune, folder, mend=mending))
    assert [problem for problem in wrong if problem] == []


@pytest.mark.slow
@pytest.mark.parametrize("state", ["killed", "finished"])
@pytest.mark.parametrize("clock", ["files of 1980", "files of 2100", "the newest files are the oldest"])
def test_times_of_files(campaign, finetune, killed, state, clock):
    """What is newest is in the names and in the files, not in their times."""
    folder = campaign.new_folder(copy_of=killed if state == "killed" else finetune.undisturbed)
    paths = sorted(folder.rglob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place, path in enumerate(paths):
        seconds = {"files of 1980": 3.2e8, "files of 2100": 4.1e9}.get(clock, time.time() - 1e6 + 1000 * place)
        os.utime(path, (seconds, seconds))
    assert campaign.again("clock", f"{clock}, of a {state} run", finetune, folder) is None


@pytest.mark.slow
@pytest.mark.parametrize("state", ["new", "killed", "finished"])
def test_a_clock_that_was_set_back(campaign, finetune, killed, state):
    """Three years, when the recipe is started again."""
    folder = campaign.new_folder(copy_of={"new": None, "killed": killed, "finished": finetune.undisturbed}[state])
    assert campaign.again("clock", f"set back, a {state} run", finetune, folder, fault={"action": "past"}) is None


@pytest.mark.slow
def test_what_a_kill_left(campaign, finetune):
    """Temporary files and a lock of a process that is gone, and an unfinished base model."""
    folder = campaign.new_folder(copy_of=finetune.undisturbed)
    (folder / ".results.json.abcdefgh.part").write_text("{")
    (folder / "noises" / ".round-000.safetensors.abcdefgh.part").write_bytes(b"half")
    (folder / ".lock.json").write_text(json.dumps({"process": 1, "host": "gone", "started": "2020-01-01 00:00:00"}))
    (folder / "base").rename(folder / "base.part")
    (folder / "base.part" / "model.safetensors").write_bytes(b"half")
    assert campaign.again("leftovers", "of a run that was killed", finetune, folder) is None
