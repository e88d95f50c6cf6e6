"""Watches a training with a single attack step for catastrophic overfitting (Wong et al. 2020; Andriushchenko &
Flammarion 2020): the model withstands that step, and loses all of its accuracy under an attack of several steps.

At the start of a run, and after each round, a few training images, always the same, are attacked by the objective's own
step and by PGD-10 of the same radius. Their accuracies are logged. They are read from a stream of their own, as
held-out images of a noise are, and seeds of their own start the attacks: the training does not notice.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from hf_nullspace.core.processes import over_processes, rank_and_world_size
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.frozen import frozen
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.attacks.base import likeliest
from hf_nullspace.robustness.attacks.gradient import PGD
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.training.adversarial import Adversarial, RandomStartFGSM, pixels_of
from hf_nullspace.training.noise_stream import noise_stream, own_randomness
from hf_nullspace.training.objectives import Objective, Sum

logger = logging.getLogger(__name__)

IMAGES = 64
"""Watched images, over all processes. An image is 24 passes, so they are 4% of a round of 40 steps of 128 images."""
FALLEN = 0.2
"""By which share of the images PGD falls behind the single step before it is said. At a fall of its accuracy by as much
the code of Wong et al. 2020 stops. Where both attacks disagree on a tenth of 64 images, it is 5 standard errors."""
SINGLE_STEP, SEVERAL_STEPS = "fast/fgsm_accuracy", "fast/pgd_accuracy"


class OverfittingWatch(TrainerCallback):
    """Logs both accuracies, and warns when they are further apart than at the start of the run by :data:`FALLEN`.

    A model that nobody has trained against attacks may fall further under PGD than under one step; only what the
    training adds to that is overfitting.
    """

    def __init__(self, trainer: Any, attack: RandomStartFGSM, preprocessing: Preprocessing) -> None:
        self._trainer, self._preprocessing = trainer, preprocessing
        self._attacks = {SINGLE_STEP: attack, SEVERAL_STEPS: PGD(attack.eps)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rows: list[Any] | None = None
        if state.global_step == 0:
            self._look(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.steps_per_round == 0:
            loss_too = control.should_log  # a log of ours would count as the one of this step
            self._look(args, state)
            control.should_log = loss_too

    def _look(self, args: Any, state: Any) -> None:
        with own_randomness(args.seed), self._trainer.cost.during("watch"):
            found = self._accuracies(args)
        self._trainer.log(found)
        start = next(entry for entry in state.log_history if SINGLE_STEP in entry)
        if (problem := overfitting(found, start)) is not None and rank_and_world_size()[0] == 0:
            logger.warning(f"optimizer step {state.global_step}: {problem}")

    def _accuracies(self, args: Any) -> dict[str, float]:
        """The accuracy under each attack, over the images of all processes."""
        data, collate = self._trainer.training_rows()
        if self._rows is None:
            self._rows = _watched(data, args)
        rank, processes = rank_and_world_size()
        size, right = args.per_device_train_batch_size, torch.zeros(len(self._attacks) + 1, device=args.device)
        with frozen(self._trainer.model_wrapped):
            model = self._trainer.asked(self._trainer.model_wrapped)
            model = PixelModel(model, self._preprocessing.mean, self._preprocessing.std)
            for first in range(0, len(self._rows), size):
                inputs = collate(self._rows[first : first + size])
                labels = inputs["labels"].to(args.device)
                classes = likeliest(labels)
                pixels = pixels_of(inputs[self._trainer.input_name].to(args.device), self._preprocessing)
                places = range(rank + first * processes, rank + (first + len(labels)) * processes, processes)
                seeds = [derive_seed(args.seed, place) for place in places]
                right[0] += (classes != -100).sum()
                for index, attack in enumerate(self._attacks.values(), 1):
                    attacked = attack(model, pixels, labels, seeds=seeds)
                    with torch.no_grad():
                        right[index] += (model(attacked).argmax(1) == classes).sum()
        count, *right_counts = over_processes(right).tolist()
        return {name: number / max(count, 1) for name, number in zip(self._attacks, right_counts, strict=True)}


def add_watch(trainer: Any, objective: Objective, preprocessing: Preprocessing | None) -> None:
    """Let ``trainer`` be watched if ``objective`` trains with a single attack step; an earlier watch goes."""
    trainer.remove_callback(OverfittingWatch)
    parts = objective.parts if isinstance(objective, Sum) else [objective]
    attacks = [part.attack for part in parts if isinstance(part, Adversarial)]
    for attack in attacks:
        if isinstance(attack, RandomStartFGSM) and preprocessing is not None:
            trainer.add_callback(OverfittingWatch(trainer, attack, preprocessing))


def overfitting(now: Mapping[str, float], start: Mapping[str, float]) -> str | None:
    """What to say if PGD has fallen behind the single step by more than :data:`FALLEN`; None if it has not.

    Both hold :data:`SINGLE_STEP` and :data:`SEVERAL_STEPS`, accuracies in [0, 1]: now, and at the start of the run.
    """
    gap, first_gap = (found[SINGLE_STEP] - found[SEVERAL_STEPS] for found in (now, start))
    if gap - first_gap <= FALLEN:
        return None
    return (
        f"catastrophic overfitting: {now[SINGLE_STEP]:.0%} of the watched images are right under one attack step, "
        f"{now[SEVERAL_STEPS]:.0%} under PGD-10 of the same radius ({first_gap:.0%} apart at the start). The model "
        "learns to withstand the single step alone: lower attack_eps or learning_rate, or choose objective 'madry'"
    )


def _watched(data: Any, args: Any) -> list[Any]:
    """This process's rows of the watched images."""
    count = max(IMAGES, args.world_size)
    whole: dict[str, Any] = {"batch_size": count, "held_out_images": count, "num_workers": 0, "input_name": "rows"}
    whole |= {"seed": args.seed, "round": 0}
    batches: Any = noise_stream(data, lambda rows: {"rows": rows}, **args.stream_settings() | whole)[0]
    return [row for batch in batches for row in batch]
