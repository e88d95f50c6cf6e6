"""Real launchers, one and two ranks: what is killed, or loses its launcher, ends, and started again goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from campaign import HANGS, Ended, differences, left_of

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
TWO = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launched(launcher, recipe, folder, log):
    """The launcher's process, in a session of its own."""
    words = [sys.executable, "-m", *launcher, str(RECIPES / "finetune.py"), *recipe.words, "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and hand that on
    with open(log, "w") as out, open(f"{log}.err", "w") as err:
        return subprocess.Popen(words, stdout=out, stderr=err, env=environment, start_new_session=True)


def ended(process, log, began):
    try:
        code = process.wait(timeout=HANGS)
    except subprocess.TimeoutExpired:
        code = None
        os.killpg(process.pid, signal.SIGKILL)
    out, err = Path(log).read_text(), Path(f"{log}.err").read_text()
    return Ended(code, out, err, time.perf_counter() - began, left_of(process.pid))


def wait_for(process, log, word):
    """Until the recipe has printed ``word``."""
    until = time.monotonic() + HANGS
    while word not in Path(log).read_text():
        assert process.poll() is None, Path(f"{log}.err").read_text()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def two_ranks(finetune, tmp_path_factory):
    """The undisturbed run of two processes."""
    folder, began = tmp_path_factory.mktemp("two"), time.perf_counter()
    process = launched(TWO, finetune, folder / "run", folder / "log")
    done = ended(process, folder / "log", began)
    assert done.code == 0, done.err[-2000:]
    return folder / "run"


def struck(campaign, launcher, recipe, tmp_path, kind, name, word, whom, how, undisturbed=None):
    """Strike one process of a launched run when it says ``word``; start it again by the same launcher."""
    folder, log, began = campaign.new_folder(), tmp_path / "log", time.perf_counter()
    process = launched(launcher, recipe, folder, log)
    wait_for(process, log, word)
    children = sorted((child for child in psutil.Process(process.pid).children(recursive=True)
                       if "finetune.py" in " ".join(child.cmdline())), key=lambda child: child.pid)  # fmt: skip
    target = process.pid if whom == "launcher" else children[whom].pid
    os.kill(target, how)
    first = ended(process, log, began)
    problem = None
    if first.code is None or first.orphans:
        problem = f"stuck: {first.orphans or 'the launcher'}"
    elif first.code == 0:
        problem = "silent: a run that was struck ended with 0"
    if problem is not None or undisturbed is None:
        return campaign.again(kind, name, recipe, folder, problem=problem, seconds=first.seconds)
    began = time.perf_counter()
    second = ended(launched(launcher, recipe, folder, log), log, began)
    if second.code != 0:
        problem = f"lost: started again by two processes: {second.err[-500:]}"
    elif different := differences(folder, recipe, undisturbed):
        problem = f"silent: {different}"
    campaign.keep(kind, name, recipe.name, problem or "equal", "", first.seconds + second.seconds, problem)
    return problem


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("word", ["Measuring before", "Fine-tuning (nullspace)"])
def test_a_launcher_that_is_killed(campaign, finetune, tmp_path, how, word):
    name = f"accelerate launch: {how.name} at '{word}'"
    assert struck(campaign, ACCELERATE, finetune, tmp_path, "launcher", name, word, "launcher", how) is None


@pytest.mark.parametrize(
    ("whom", "how", "word"),
    [
        (0, signal.SIGKILL, "Fine-tuning (nullspace)"),
        (1, signal.SIGKILL, "Fine-tuning (nullspace)"),
        (1, signal.SIGKILL, "Training a small ViT"),
        (1, signal.SIGTERM, "Fine-tuning (plain)"),
        ("launcher", signal.SIGTERM, "Fine-tuning (plain)"),
        ("launcher", signal.SIGKILL, "Measuring before"),
    ],
)
def test_one_of_two_ranks(campaign, finetune, two_ranks, tmp_path, whom, how, word):
    name = f"{'launcher' if whom == 'launcher' else f'rank {whom}'}: {how.name} at '{word}'"
    problem = struck(campaign, TWO, finetune, tmp_path, "one of two ranks", name, word, whom, how, two_ranks)
    assert problem is None
