"""A disk that is full, too small, or cannot be written; folders that are gone, or files; a clock that is wrong."""

import json
import os
import shutil
import subprocess
import time

import pytest
from campaign import OTHERS
from test_kills import spread

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("recipe", "count"), [("finetune", 20), *((name, 6) for name in OTHERS)], indirect=["recipe"])
def test_full_from_a_file_on(campaign, recipe, count):
    """RLIMIT_FSIZE: no file can take another byte. Started again there is room."""
    files = recipe.points["file"][4:]  # the first are those of the lock
    places = [
        (name.replace("before", "from"), {"point": ["file", number + 4], "action": "full"})
        for name, number in spread(files, count)
        if any(not operation.startswith("os.remove") for operation in files[number - 1 :])  # something is written
    ]

    def filled(name, fault):
        folder = campaign.new_folder()
        return campaign.again("full disk", name, recipe, folder, fault=fault, mend=lambda: None)

    assert campaign.problems("full disk", recipe, places, filled) == []


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many kB; skips where this process may not."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"this process may not mount a disk: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True, check=False)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


@pytest.mark.parametrize("size", [8, 60, 120, 200, 300, 400, 520])
def test_a_real_disk_that_is_too_small(campaign, finetune, small_disk, size):
    """In kB; a run takes about 900."""
    disk = small_disk(f"size={size}k")
    more_room = lambda: remount(disk, "size=20000k")  # noqa: E731
    assert campaign.again("full disk", f"a disk of {size} kB", finetune, disk / "run", mend=more_room) is None


@pytest.mark.parametrize("state", ["new", "killed", "finished"])
def test_a_disk_that_cannot_be_written(campaign, finetune, run_of, small_disk, state):
    disk = small_disk("size=20000k")
    if state != "new":
        shutil.copytree(run_of[state], disk / "run")
    remount(disk, "ro")
    writable = lambda: remount(disk, "rw")  # noqa: E731
    assert campaign.again("read-only disk", f"a {state} run", finetune, disk / "run", mend=writable) is None


FOLDERS = ("base", "control", "control/ema", "control/checkpoint-2", "noises", "checkpoint-2", "checkpoint-4",
           "ema", "checkpoint-6")  # fmt: skip


@pytest.mark.parametrize("instead", ["gone", "empty", "a file"])
@pytest.mark.parametrize("state", ["killed", "finished"])
def test_folders_that_are_gone(campaign, finetune, run_of, instead, state):
    kind = f"folder of a {state} run"

    def taken_away(what, name):
        folder, mend = campaign.new_folder(copy_of=run_of[state]), None
        shutil.rmtree(folder / name)
        if instead == "empty":
            (folder / name).mkdir()
        elif instead == "a file":
            (folder / name).write_text("not a folder\n")
            mend = (folder / name).unlink
        return campaign.again(kind, what, finetune, folder, mend=mend)

    cases = [(f"{name}: {instead}", name) for name in FOLDERS if (run_of[state] / name).is_dir()]
    assert campaign.problems(kind, finetune, cases, taken_away) == []


@pytest.mark.parametrize("recipe", OTHERS, indirect=True)
def test_a_file_where_the_folder_has_to_be(campaign, recipe):
    folder = campaign.new_folder()
    folder.write_text("not a folder\n")
    assert campaign.again("file instead of a folder", recipe.name, recipe, folder, mend=folder.unlink) is None


@pytest.mark.parametrize("state", ["killed", "finished"])
@pytest.mark.parametrize("clock", ["files of 1980", "files of 2100", "the newest files are the oldest"])
def test_times_of_files(campaign, finetune, run_of, state, clock):
    """What is newest is in the names and in the files, not in their times."""
    folder = campaign.new_folder(copy_of=run_of[state])
    paths = sorted(folder.rglob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place, path in enumerate(paths):
        seconds = {"files of 1980": 3.2e8, "files of 2100": 4.1e9}.get(clock, time.time() - 1e6 + 1000 * place)
        os.utime(path, (seconds, seconds))
    assert campaign.again("clock", f"{clock}, of a {state} run", finetune, folder) is None


@pytest.mark.parametrize("state", ["new", "killed", "finished"])
def test_a_clock_that_was_set_back(campaign, finetune, run_of, state):
    """Three years, when the recipe is started again."""
    folder = campaign.new_folder(copy_of=run_of[state])
    assert campaign.again("clock", f"set back, a {state} run", finetune, folder, fault={"action": "past"}) is None


def test_what_a_kill_left(campaign, finetune):
    """Temporary files and a lock of a process that is gone, and an unfinished base model."""
    folder = campaign.new_folder(copy_of=finetune.undisturbed)
    (folder / ".results.json.abcdefgh.part").write_text("{")
    (folder / "noises" / ".round-000.safetensors.abcdefgh.part").write_bytes(b"half")
    (folder / ".lock.json").write_text(json.dumps({"process": 1, "host": "gone", "started": "2020-01-01 00:00:00"}))
    (folder / "base").rename(folder / "base.part")
    (folder / "base.part" / "model.safetensors").write_bytes(b"half")
    assert campaign.again("leftovers", "of a run that was killed", finetune, folder) is None
