"""A training run in a process of its own, which can be told where to die. Used by test_resume.py.

The model has dropout and the data set draws an augmentation from (seed, epoch, index), so that a resumed run ends with
the same weights only if random states, epochs and the place in the data are all restored.
"""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from hf_nullspace.data.image_set import ImageSet, collate
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.training.interpolation import Selection
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import tiny_model
from tiny_training import CONDITIONS, Images, augmented, config, pictures

STEPS = 9


class DyingTrainer(NullspaceTrainer):
    """Kills its process: at a forward pass, in a round's noise learning, or within the writing of a checkpoint.

    While alpha is chosen :class:`DyingImages` does it.
    """

    def __init__(self, *args, die, **named):
        super().__init__(*args, **named)
        self.die, self.learning, self.forwards, self.first_saved = die or ("", 0, ""), None, 0, 0
        self.model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, *_):
        self.forwards += 1
        what, when, *more = self.die
        if what == "forward" and self.forwards == when:
            kill_this_process()
        if what == "noise" and self.learning == when and self.forwards == self.began + more[0]:
            kill_this_process()

    def _begin_round(self, model, number):
        self.learning, self.began = number, self.forwards
        try:
            super()._begin_round(model, number)
        finally:
            self.learning = None

    def _stage(self, name, folder):
        what, when, *more = self.die
        if self.state.global_step != when or more != [name]:
            return
        if what == "save":
            kill_this_process()
        if what == "truncate":
            (Path(folder) / "trainer_state.json").write_text('{"global_step": ')
            kill_this_process()

    def save_model(self, output_dir=None, _internal_call=False):
        what, when, *more = self.die
        if what == "full" and _internal_call and self.state.global_step == when:
            resource.setrlimit(resource.RLIMIT_FSIZE, (more[0], resource.RLIM_INFINITY))
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            self.first_saved = self.first_saved or self.forwards
            self._stage("weights", output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self._stage("optimizer", output_dir)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self._stage("rng", output_dir)


class DyingImages(ImageSet):
    """Selection images; with ``left`` so many are read before the process is killed."""

    left = None

    def raw_image(self, index):
        if self.left == 0:
            kill_this_process()
        self.left = self.left and self.left - 1
        return super().raw_image(index)


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder, resume=False, die=None, **given):
    """Train in ``folder``; leave ``final/`` there, or ``error.txt``."""
    folder = Path(folder)
    try:
        _train(folder, resume, die, given)
    except BaseException as error:
        lines = [type(error).__name__, type(error.__cause__).__name__, str(error)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.stderr.write("\n".join(lines) + "\n")
        (folder / "error.txt").write_text("\n".join(lines))
        raise SystemExit(3) from None


def _train(folder, resume, die, given):
    names = given.pop("augmentation", None)
    if names:
        multiprocessing.set_start_method("fork", force=True)  # workers find torchvision as torchvision_here made it
    own = {"data_collator": collate, "processing_class": make_image_processor(16)} if names else {}
    settings = {"rounds": 3, "steps_per_round": 3, "save_strategy": "steps", "save_steps": 2} | given
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model.config.hidden_dropout_prob = 0.1
    args = config(folder, noise_max_steps=6, epsilon=0.01, **settings)
    images = pictures(24, kind=DyingImages)
    images.left = die[1] if die and die[0] == "choice" else None
    data = augmented(names) if names else Images(jitter=0.5)
    trainer = DyingTrainer(model, args, die=die, train_dataset=data, **own)
    trainer.selection = Selection(tiny_model(), images, CONDITIONS, alphas=(0.4, 0.8))
    begin = time.perf_counter()
    if die and die[0] == "clock":
        threading.Timer(die[1], kill_this_process).start()
    trainer.train(resume_from_checkpoint=resume)
    (folder / "seconds.txt").write_text(str(time.perf_counter() - begin))
    (folder / "forwards.txt").write_text(f"{trainer.first_saved} {trainer.forwards}")
    trainer.save_model(str(folder / "final"))
