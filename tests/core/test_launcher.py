"""Real launchers that are killed: what they started ends by itself, and what a shell started does not."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from hf_nullspace.command_line import run

def main():
    if sys.argv[2:] == ["deaf"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[1]).with_suffix(".part").write_text(str(os.getpid()))
    Path(sys.argv[1]).with_suffix(".part").rename(sys.argv[1])
    time.sleep(60)

if sys.argv[2:] == ["late"]:
    Path(sys.argv[1]).write_text(str(os.getpid()))
    first = os.getppid()
    while os.getppid() == first:
        time.sleep(0.05)
run(main)
"""
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "1", "--master_port", "0")


def started(tmp_path, *command, how=""):
    """The process of ``command``, which starts the script; and the script's own process, once it runs."""
    script, told = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(SCRIPT)
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([*command, str(script), str(told), *how.split()], stderr=err)
    until = time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert process.poll() is None, (tmp_path / "err").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    return process, psutil.Process(int(told.read_text()))


def killed(process, how):
    process.send_signal(how)
    process.wait(timeout=30)


@pytest.mark.parametrize(
    ("launcher", "how", "sent", "seconds"),
    [
        (ACCELERATE, "", signal.SIGTERM, 5),
        pytest.param(ACCELERATE, "", signal.SIGKILL, 5, marks=pytest.mark.slow),
        pytest.param(ACCELERATE, "deaf", signal.SIGKILL, 10, marks=pytest.mark.slow),
        pytest.param(ACCELERATE, "late", signal.SIGKILL, 5, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "", signal.SIGKILL, 5, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "late", signal.SIGKILL, 5, marks=pytest.mark.slow),
    ],
)
def test_a_process_ends_with_its_launcher(tmp_path, launcher, how, sent, seconds):
    """One second to notice it and five for a process that takes no SIGTERM, and the rest for a slow machine."""
    process, child = started(tmp_path, sys.executable, "-m", *launcher, how=how)
    try:
        killed(process, sent)
        child.wait(timeout=seconds)
    finally:
        if child.is_running():
            child.kill()
    assert "the launcher that started this process has ended" in (tmp_path / "err").read_text()


def test_a_process_outlives_the_shell_that_started_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # a shell's own, for the recipes that it starts
    shell = 'nohup "$0" "$@" & wait'
    process, child = started(tmp_path, "sh", "-c", shell, sys.executable)
    try:
        killed(process, signal.SIGKILL)
        time.sleep(2)  # two looks of a watcher
        assert child.is_running()
        assert child.status() != psutil.STATUS_ZOMBIE
        assert child.ppid() != process.pid
    finally:
        child.kill()
    assert "launcher" not in (tmp_path / "err").read_text()
    assert os.getppid() != process.pid
