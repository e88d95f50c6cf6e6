"""A recipe in a process of its own, with a fault armed.

A *point* is where a fault strikes: ``["forward", n]``, the n-th forward pass of the model; ``["file", n]``, just before
the n-th time that a file below the output folder is written, renamed or deleted; ``["clock", seconds]``.
"""

import functools
import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import matplotlib.pyplot
import sklearn.datasets  # noqa: F401 (the digits)
import torch
from huggingface_hub import constants
from transformers.models.vit.modeling_vit import ViTEmbeddings

from hf_nullspace.command_line import run
from hf_nullspace.data import sources

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("finetune", "learn_noise", "evaluate_robustness", "compare")
PHASES = {
    "train_base_model": "base model",
    "evaluate": "measuring",
    "run_checks": "measuring",
    "round_noise": "noise",
    "learn_noise": "noise",
    "training_step": "training",
}
"""Functions, and what a forward pass below them is for; the innermost one counts, but the base model's comes first."""


class Faults:
    """Counts forward passes and file operations, and strikes when the point is reached."""

    def __init__(self, folder, point=None, action=None):
        self.folder, self.point, self.action = str(folder), tuple(point or ()), action
        self.forwards, self.files, self.off = [], [], False

    def arm(self):
        torch.nn.modules.module.register_module_forward_pre_hook(self._forward)
        sys.addaudithook(self._audit)
        if self.action == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if self.action == "past":
            seconds = time.time
            time.time = lambda: seconds() - 1e8
        if self.point[:1] == ("clock",):
            timer = threading.Timer(self.point[1], self._strike)
            timer.daemon = True
            timer.start()

    def _forward(self, module, inputs):
        if isinstance(module, ViTEmbeddings):
            self.forwards.append(phase(sys._getframe(1)))
            if self.point == ("forward", len(self.forwards)):
                self._strike()

    def _audit(self, event, arguments):
        if self.off or event not in ("open", "os.rename", "os.remove", "os.rmdir"):
            return
        path = str(arguments[0])
        if not path.startswith(self.folder) or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.files.append(f"{event} {os.path.relpath(path, self.folder)}")
        if self.point == ("file", len(self.files)):
            self._strike()

    def _strike(self):
        self.off = True
        if self.action == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), getattr(signal, self.action))


def phase(frame):
    """What a forward pass in ``frame`` is for."""
    found = []
    while frame is not None:
        found.append(PHASES.get(frame.f_code.co_name))
        frame = frame.f_back
    return "base model" if "base model" in found else next(filter(None, found), "other")


def start(recipe, words, log, folder, point=None, action=None, points=None):
    """Run ``recipes/<recipe>.py`` with the arguments ``words`` and exit as it does.

    Args:
        log: gets what it prints, and ``<log>.err`` its errors.
        folder: the output folder.
        action: what happens at ``point``: the name of a signal, or "full" (no file can take another byte). "past" needs
            no point: the clock is three years behind.
        points: a JSON file for the phase of every forward pass and for the file operations.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
    for name, descriptor in ((os.devnull, 0), (log, 1), (f"{log}.err", 2)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
        if action == "full" and descriptor:  # what is printed goes to a pipe, which has no size
            with open(name, "wb") as file:
                pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file).stdin
            os.dup2(pipe.fileno(), descriptor)
            pipe.close()
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_CACHE = Path(log).parent / "datasets"
    sys.argv = [recipe, *words]
    faults = Faults(folder, point, action)
    faults.arm()
    try:
        run(runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"])
    finally:
        faults.off = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if points:
            Path(points).write_text(json.dumps({"forward": faults.forwards, "file": faults.files}))


def prepare():
    """What each process would do again: imports, the digits, a search of what was imported for garbage."""
    torch.set_num_threads(1)
    sources.digits = functools.cache(sources.digits)
    sources.digits()
    for name in NAMES:
        runpy.run_path(str(RECIPES / f"{name}.py"))
    matplotlib.pyplot.figure().add_subplot().figure.canvas.draw()
    matplotlib.pyplot.close("all")
    gc.collect()
    gc.freeze()
