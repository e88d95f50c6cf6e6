"""Processes of their own, forked from a server that has imported the package once: 0.1 s to start, and not 5."""

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from recipe_calls import RECIPES

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"hf_nullspace.{module}" for module in ("training.trainer", "training.loading", "robustness.report", "cards.card")]
)


def start(
    function: Callable[..., Any], *args: Any, log: Path, environment: Mapping[str, str] | None = None, **named: Any
) -> ForkServerProcess:
    """A process that calls ``function``, of a module of the tests; what it prints is appended to the file ``log``.

    Its ``exitcode`` is None while it runs, and -9 after SIGKILL. ``environment`` is set after the imports.
    """
    process = CONTEXT.Process(target=_enter, args=(function, args, named, str(log), dict(environment or {})))
    process.start()
    return process


def script(name: str, *words: object) -> None:
    """``python recipes/NAME.py WORDS``."""
    sys.argv = [str(RECIPES / f"{name}.py"), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def kill_when(ready: Callable[[], Any], name: str, *words: object, log: Path) -> None:
    """``python recipes/NAME.py WORDS`` gets SIGKILL as soon as ``ready()`` holds, within two minutes."""
    process = start(script, name, *words, log=log)
    end = time.monotonic() + 120
    while not ready() and process.exitcode is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def _enter(function: Callable[..., Any], args: Any, named: Any, log: str, environment: dict[str, str]) -> None:
    gc.freeze()  # see conftest.py
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1"} | environment)  # accelerate sets the threads of ranks without it
    with open(log, "a", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    function(*args, **named)
