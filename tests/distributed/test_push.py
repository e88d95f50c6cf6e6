"""Two processes train, one pushes: every commit comes once, and both processes end."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loopback_hub import TOKEN

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_processes_push_once(hub_here, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(HERE / "run_push.py"), str(tmp_path / "run")]  # fmt: skip
    environment = os.environ | hub_here.environment(tmp_path / "theirs", TOKEN)
    environment |= {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as launch:
        try:
            said, errors = launch.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launch.pid, signal.SIGKILL)  # also the workers, if they hang
    assert launch.returncode == 0, errors[-4000:]
    assert sorted(line for line in said.splitlines() if line.startswith("rank")) == [
        "rank 0 of 2 pushed: True",
        "rank 1 of 2 pushed: False",
    ]
    steps = [f"Training in progress, step {step}" for step in (4, 3, 2, 1)]
    assert hub_here.history("models", "someone/robust") == ["End of training", *steps, "initial commit"]
    assert sum(asked == "POST /api/repos/create" for asked in hub_here.asked) == 6, "once, and once for each push"
    files = hub_here.files("models", "someone/robust")
    states = {f"last-checkpoint/rng_state_{rank}.pth" for rank in (0, 1)}
    assert states | {"model.safetensors", "noises/round-001.safetensors", "README.md"} <= set(files)
