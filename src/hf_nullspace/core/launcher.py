"""A process ends by itself when its launcher has died.

``accelerate launch`` and ``torchrun`` hand no signal on that they do not survive: what they started would go on, and
write beside the run that is started again.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import PurePath

import psutil

_LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
}
# What a launcher puts into the environment together, and nobody by hand.
_MARKS = (
    {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_USE_DYNAMIC"},
    {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"},
)
_POLL, _GRACE = 1.0, 5.0  # seconds


def end_with_launcher() -> None:
    """End this process when the launcher that started it has died; without a launcher, do nothing.

    It gets a SIGTERM within a second, after one line on standard error, and exits with code 143 if it still runs five
    seconds later. A process that a shell started (nohup, setsid, a terminal that is closed) is left alone.
    """
    parent = os.getppid()
    if not _is_launcher(parent):
        if not _is_orphan(parent):
            return
        parent = 0  # the launcher died while this process was still importing
    threading.Thread(target=_watch, args=(parent,), name="launcher", daemon=True).start()


def _is_launcher(pid: int) -> bool:
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    # python -m torch.distributed.run, or python /path/bin/torchrun: before the script's own arguments
    return any(PurePath(word).name in _LAUNCHERS for word in words[:4])


def _is_orphan(parent: int) -> bool:
    """Whether a launcher started this process, and ``parent`` is who adopts orphans, not a process in between."""
    try:
        environment = psutil.Process(parent).environ().keys()
    except psutil.Error:  # the first process of the machine, as a rule
        environment = set()
    return any(mark <= os.environ.keys() for mark in _MARKS) and not any(mark <= environment for mark in _MARKS)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    with suppress(OSError):  # standard error may have gone with the launcher
        os.write(2, b"error: the launcher that started this process has ended; this process ends, too\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(128 + signal.SIGTERM)
