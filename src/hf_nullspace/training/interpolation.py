"""After a fine-tuning, part of the way back to the checkpoint: which alpha, by images that nobody trained on.

The weights are (1 - alpha) * checkpoint + alpha * fine-tuned (:func:`hf_nullspace.averaging.interpolate`). Each alpha
of a grid is measured on the selection images; the best average wins among those that keep clean accuracy within half a
point of the checkpoint's. Test images have no part in it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_nullspace.averaging import NotAveragedError, check_same, interpolate
from hf_nullspace.cards.card import INTERPOLATION_PLOT
from hf_nullspace.cards.run_folder import INTERPOLATION_NAME
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.files import one_clear_error, write_json
from hf_nullspace.core.processes import rank_and_world_size
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.core.text import escape
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.models.frozen import frozen
from hf_nullspace.noise.artifact import NullspaceNoise
from hf_nullspace.noise.calibration import calibrate
from hf_nullspace.noise.provenance import model_hash
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.suite import Attacked, Clean, Condition, Corrupted, batches, gather, in_8_bits, judge
from hf_nullspace.training.ema import FOLDER as EMA
from hf_nullspace.training.events import tell_epoch
from hf_nullspace.training.noise_stream import noise_stream, own_randomness
from hf_nullspace.training.rounds import as_noise

GRID = tuple(step / 10 for step in range(11))
KEPT_POINTS = 0.5
"""Clean accuracy may fall below the checkpoint's by so many points."""
RULE = (
    f"the best average among those that keep clean accuracy within {KEPT_POINTS:g} points of the checkpoint's; the "
    "average is over clean accuracy, the mean over attacks and the mean over corruptions"
)


@dataclass(frozen=True)
class Selection:
    """What alpha is chosen on.

    The conditions are those of the report, on other images: an average over what a user wants to improve.

    Raises:
        ValueError: if an alpha is outside of [0, 1] or none is above 0, or nothing but clean accuracy is measured.
    """

    base: PreTrainedModel
    """The checkpoint that the fine-tuning begins with; it is not changed."""
    images: ImageSet
    conditions: Sequence[Condition]
    alphas: Sequence[float] = GRID
    """0, the checkpoint itself, is always among them."""
    note: str = ""
    """Where the images come from."""

    def __post_init__(self) -> None:
        given = sorted({0.0, *map(float, self.alphas)})
        if not (given[0] >= 0 and 0 < given[-1] <= 1):
            raise ValueError(f"interpolate_grid={list(self.alphas)}: expected numbers in [0, 1], and one above 0")
        if not {Attacked, Corrupted} & set(map(type, self.conditions)):
            raise ValueError("interpolate weighs clean accuracy against robustness: give an attack or a corruption")
        object.__setattr__(self, "conditions", list(dict.fromkeys([Clean(), *self.conditions])))
        object.__setattr__(self, "alphas", given)


@dataclass(frozen=True)
class Point:
    """One alpha, and how many of ``count`` images it has right under each condition, clean first."""

    alpha: float
    count: int
    correct: Mapping[Condition, int]

    @property
    def clean(self) -> float:
        """Accuracy in [0, 1]."""
        return self._mean(Clean)[0]

    @property
    def robustness(self) -> float:
        """The mean over attacks and the mean over corruptions, averaged where there are both."""
        return _mean([*self._mean(Attacked), *self._mean(Corrupted)])

    @property
    def average(self) -> float:
        return _mean([*self._mean(Clean), *self._mean(Attacked), *self._mean(Corrupted)])

    def _mean(self, kind: type) -> list[float]:
        values = [correct / self.count for condition, correct in self.correct.items() if isinstance(condition, kind)]
        return [_mean(values)] if values else []

    def keeps(self, base: "Point") -> bool:
        """Whether clean accuracy is within :data:`KEPT_POINTS` of the checkpoint's, counted in whole images."""
        return 100 * (base.correct[Clean()] - self.correct[Clean()]) <= KEPT_POINTS * self.count


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Choice:
    """Every alpha that was measured, the checkpoint (0) first, and the one that was taken."""

    points: Sequence[Point]

    @property
    def best(self) -> Point:
        """By :data:`RULE`; of equal ones the nearest to the checkpoint, which is there in any case."""
        kept = [point for point in self.points if point.keeps(self.points[0])]
        return max(kept, key=lambda point: (point.average, -point.alpha))

    def sentence(self) -> str:
        """What was chosen, in words."""
        first, best = self.points[0], self.best
        text = (
            f"alpha = {best.alpha:g}: on {best.count} selection images the average is {100 * best.average:.2f}% "
            f"(the checkpoint's {100 * first.average:.2f}%), clean accuracy {100 * best.clean:.2f}% "
            f"({100 * first.clean:.2f}%)"
        )
        return text if best.alpha else f"{text}; no alpha above 0 is better, so the model is the checkpoint again"

    def as_json(self, note: str) -> dict[str, Any]:
        """Ready for a file: accuracies in %; ``note`` says where the images come from."""
        return {
            "alpha": self.best.alpha,
            "chosen": self.sentence(),
            "rule": RULE,
            "images": note,
            "count": self.best.count,
            "alphas": [
                {
                    "alpha": point.alpha,
                    "clean": 100 * point.clean,
                    "robustness": 100 * point.robustness,
                    "average": 100 * point.average,
                    "keeps_clean": point.keeps(self.points[0]),
                    "correct": {str(condition): count for condition, count in point.correct.items()},
                }
                for point in self.points
            ],
        }


def choose_alpha(
    tuned: PreTrainedModel,
    selection: Selection,
    *,
    batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    counted: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Choice:
    """Measure every alpha between ``selection.base`` and ``tuned``; every process gets the same.

    ``seed`` is that of the corruptions; ``counted`` wraps each model, to count its passes. The images of a condition
    are prepared once, for all alphas.

    Raises:
        NotAveragedError: if the two have no average.
    """
    images, (rank, world) = selection.images, rank_and_world_size()
    correct: dict[float, dict[Condition, int]] = {alpha: {} for alpha in selection.alphas}
    with Progress(shown=progress and rank == 0) as bar:
        for condition in selection.conditions:
            bar.expect(condition, len(images) / world * len(selection.alphas) * condition.cost)
        for condition in selection.conditions:
            prepared = [in_8_bits(batch) for batch in batches(images, condition, batch_size, seed, workers=0)]
            for alpha in selection.alphas:
                bar.begin(f"alpha {alpha:g}, {condition}")
                network: nn.Module = interpolate(selection.base, tuned, alpha)
                model = PixelModel(
                    counted(network.to(device).eval()), images.preprocessing.mean, images.preprocessing.std
                )
                judged = []
                with frozen(model):
                    for places, pixels, labels in prepared:
                        judged.append(judge(model, pixels, labels, places, condition, seed))
                        bar.advance(len(labels) * condition.cost)
                correct[alpha][condition] = int(gather(judged)["correct"].sum())
    return Choice([Point(alpha, len(images), correct[alpha]) for alpha in selection.alphas])


def plot(choice: Choice, path: Path) -> Path:
    """Clean accuracy against robustness, a point per alpha, the chosen one marked, and the line that clean keeps."""
    figure, ((axes,),) = canvas(5.4, 4.2)
    clean, robust = ([100 * getattr(p, name) for p in choice.points] for name in ("clean", "robustness"))
    axes.plot(clean, robust, "o-", color="C0", linewidth=1)
    for point, x, y in zip(choice.points, clean, robust, strict=True):
        axes.annotate(f"{point.alpha:g}", (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    best = choice.best
    axes.plot([100 * best.clean], [100 * best.robustness], "o", markersize=13, markerfacecolor="none", color="C3",
              label=f"chosen: alpha = {best.alpha:g}")  # fmt: skip
    least = 100 * choice.points[0].clean - KEPT_POINTS
    axes.axvline(least, color="black", linestyle="--", linewidth=1, label=f"checkpoint - {KEPT_POINTS:g} points")
    axes.set(xlabel="clean accuracy in %", ylabel="mean accuracy under attacks and corruptions in %")
    axes.margins(x=0.1)  # room for the last name
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_png(figure, path)


def remarks_on(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown for a report: what was chosen for each model (its interpolation.json), and the picture of the run's."""
    first = next(iter(chosen.values()))
    lines = [f"* {escape(name)}: {escape(each['chosen'])}" for name, each in chosen.items()]
    return (
        "\nThe weights are (1 - alpha) * checkpoint + alpha * fine-tuned. alpha is chosen on "
        f"{first['count']} selection images ({escape(first['images'])}): {first['rule']}.\n\n"
        + "\n".join(lines)
        + f"\n\n![Accuracy against robustness on the selection images, a point per alpha]({INTERPOLATION_PLOT})\n"
    )


def check(trainer: Any) -> None:
    """Before a training that is asked to go back afterwards: can it?

    Raises:
        ValueError, NotAveragedError: if there are no selection images, or no common weights; in one line.
    """
    if not trainer.args.interpolate:
        return
    selection = trainer.selection
    if selection is None:
        raise ValueError(
            "interpolate=True chooses alpha on selection images: set trainer.selection = Selection(base, images, "
            "conditions) of hf_nullspace.training.interpolation before train(), or leave interpolate out"
        )
    if not trainer._is_plain:
        raise NotAveragedError("interpolate needs a whole transformers model per process: no FSDP, DeepSpeed or PEFT")
    check_same(selection.base, trainer.model, "interpolate cannot go back to the weights of trainer.selection.base")


def go_back(trainer: Any, folder: Path) -> None:
    """After such a training: the model, and its average (EMA), get the weights that the selection images choose.

    What every alpha had is written into ``folder``. The noises of the last round are scaled to epsilon again: the model
    that they were learned on is gone.
    """
    if not trainer.args.interpolate:
        return
    selection, args, cost = trainer.selection, trainer.args, trainer.cost
    parts = [(trainer.model, folder)] + ([] if trainer.ema is None else [(trainer.ema.model, folder / EMA)])
    for model, place in parts:
        tuned = copy.deepcopy(selection.base)
        tuned.load_state_dict(model.state_dict())
        with cost.during("selection"):
            choice = choose_alpha(
                tuned,
                selection,
                batch_size=args.per_device_eval_batch_size,
                seed=args.seed,
                device=args.device,
                progress=not args.disable_tqdm,
                counted=cost.counted,
            )
        model.load_state_dict(interpolate(selection.base, tuned, choice.best.alpha).state_dict())
        if args.should_save:
            with one_clear_error(place):
                write_json(place / INTERPOLATION_NAME, choice.as_json(selection.note))
                plot(choice, place / INTERPOLATION_PLOT)
    if trainer.noises:
        trainer.record.noises = _scaled_again(trainer)


def _scaled_again(trainer: Any) -> tuple[NullspaceNoise, ...]:
    """The noises of the last round with the influence epsilon on the weights of now, on the round's held-out images."""
    args, noises, number = trainer.args, trainer.noises, trainer.record.round
    images = args.stream_settings() | {"round": number, "input_name": trainer.input_name}
    tell_epoch(trainer.train_dataset, trainer.state.epoch)  # a resumed run may have had no epoch left
    with own_randomness(derive_seed(images["seed"], number)), trainer.cost.during("noise"):
        held_out, _ = noise_stream(*trainer.training_rows(), **images)
        scaled = calibrate(
            trainer.cost.counted(trainer.model),
            [noise.tensor for noise in noises],
            args.epsilon,
            held_out,
            hook=trainer._hook,
            chunk_size=args.per_device_eval_batch_size,
        )
    now = {"model_sha256": model_hash(trainer.model), "training_step": trainer.state.global_step}
    return tuple(
        as_noise(each, replace(noise.provenance, **now), noise.grid) for each, noise in zip(scaled, noises, strict=True)
    )
