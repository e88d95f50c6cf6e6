"""The one evaluation loop: conditions over a set of images, counted exactly on any number of processes."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hf_nullspace.core.processes import rank_and_world_size
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.data.image_set import ImageSet, LabelledImages
from hf_nullspace.data.image_stream import Images, ImageStream
from hf_nullspace.models.frozen import frozen
from hf_nullspace.robustness.attacks.base import Attack
from hf_nullspace.robustness.corruptions import SMALL, check_cell, corrupt
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.scores import Interval, accuracy


@dataclass(frozen=True)
class Clean:
    """The images as they are."""

    cost = 1.0  # forward passes of one image

    def __str__(self) -> str:
        return "clean"

    def protocol(self) -> dict[str, Any]:
        """What a reader needs in order to repeat the number, besides the images and the seed."""
        return {}


@dataclass(frozen=True)
class Corrupted:
    """A generated corruption (never "ImageNet-C") of severity 1 to 5, at the image's own size."""

    corruption: str
    severity: int
    cost = 1.0

    def __post_init__(self) -> None:
        check_cell(self.corruption, self.severity)

    def __str__(self) -> str:
        return f"generated {self.corruption} {self.severity}"

    def protocol(self) -> dict[str, Any]:
        generated = f"at the image's own size; up to {SMALL} px CIFAR-10-C's table, else ImageNet-C's"
        return {"corruption": self.corruption, "severity": self.severity, "generated": generated}


@dataclass(frozen=True)
class Attacked:
    """Clean images, attacked in pixel space at the size of the model's input."""

    attack: Attack

    @property
    def cost(self) -> float:
        return 1 + self.attack.cost

    def __str__(self) -> str:
        return repr(self.attack)

    def protocol(self) -> dict[str, Any]:
        name, settings = type(self.attack).__name__, self.attack.settings()
        return {"space": "pixels in [0, 1]", "attack": name, "settings": settings}


Condition = Clean | Corrupted | Attacked
Batch = tuple[list[int], Tensor, Tensor]  # places in the set, pixels (B, C, H, W), labels (B,)
Answers = dict[str, NDArray[Any]]  # name -> one value per image


@dataclass(frozen=True)
class ConditionResult:
    """One condition over one set; ``correct`` holds one bool per image, in the order of the set.

    On a set with a ``subset`` of classes ``correct`` judges among those, ``correct_all`` among all classes.
    ``samples`` has the arrays "label", "prediction" and "confidence" where they were asked for.
    """

    condition: str
    correct: NDArray[np.bool_] = field(repr=False)
    seconds: float
    seed: int
    protocol: dict[str, Any] = field(default_factory=dict)
    correct_all: NDArray[np.bool_] | None = field(default=None, repr=False)
    samples: dict[str, NDArray[Any]] | None = field(default=None, repr=False)

    @property
    def n(self) -> int:
        return self.correct.size

    @property
    def score(self) -> Interval:
        """Accuracy with its Wilson interval."""
        return accuracy(self.correct)


def evaluate(
    model: PixelModel,
    images: Images,
    conditions: Sequence[Condition],
    *,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    per_sample: bool = False,
    progress: Progress | bool = True,
    on_result: Callable[[ConditionResult], None] | None = None,
    prepared: dict[Condition, list[Batch]] | None = None,
) -> list[ConditionResult]:
    """Judge ``model`` on every image of ``images`` under every condition; every process returns the same results.

    With ``torch.distributed`` initialised, rank r takes the images r, r + world, ...: every image once, none twice,
    whatever the batch size. Corruptions and random starts depend on (seed, image index) alone. Meanwhile the model is
    in eval mode, afterwards as before. Wrap the call in ``torch.autocast`` to evaluate in bf16. ``workers`` prepare
    images in processes of their own. ``progress`` is a bar of the caller's that spans more than this call, or whether
    to show one with the time left on the main process. ``on_result`` sees each result as soon as it is there. Calls
    with one dictionary ``prepared`` and the same images, batch size and seed corrupt them once, and keep them.
    """
    names = [str(condition) for condition in conditions]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"conditions given twice: {', '.join(repeated)}")
    rank, world = rank_and_world_size()
    bar = progress if isinstance(progress, Progress) else Progress(shown=progress and rank == 0)
    share = (images.expected if isinstance(images, ImageStream) else len(images)) / world
    keys = [object() for _ in conditions]  # of this call alone
    for key, condition in zip(keys, conditions, strict=True):
        bar.expect(key, share * condition.cost)
    results = []
    with nullcontext() if bar is progress else bar, frozen(model):
        for key, condition in zip(keys, conditions, strict=True):
            bar.begin(str(condition))
            start, judged = time.perf_counter(), []
            ready: Iterable[Batch] = batches(images, condition, batch_size, seed, workers)
            if prepared is not None:
                ready = prepared[condition] = prepared.get(condition) or [in_8_bits(batch) for batch in ready]
            for places, pixels, labels in ready:
                judged.append(judge(model, pixels, labels, places, condition, seed, images.subset))
                bar.advance(len(labels) * condition.cost)
            bar.expect(key, sum(len(part["correct"]) for part in judged) * condition.cost)
            arrays = gather(judged)
            correct, correct_all = arrays.pop("correct"), arrays.pop("correct_all", None)
            result = ConditionResult(
                condition=str(condition),
                correct=correct,
                seconds=time.perf_counter() - start,
                seed=seed,
                protocol=protocol(condition, images, len(correct)),
                correct_all=correct_all,
                samples=arrays if per_sample else None,
            )
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


def batches(images: Images, condition: Condition, batch_size: int, seed: int, workers: int) -> Iterator[Batch]:
    """This process's images, batch by batch: their places in the set, pixels (B, C, H, W), labels (B,)."""
    rank, world = rank_and_world_size()
    if isinstance(images, ImageStream):
        pairs = itertools.islice(enumerate(images.pairs()), rank, None, world)
        rows = ((place, prepare(images, image, condition, seed, place), label) for place, (image, label) in pairs)
        while batch := list(itertools.islice(rows, batch_size)):
            yield stack(batch)
        return
    if images.kept is not None and not isinstance(condition, Corrupted):
        pixels, labels = images.kept
        for first in range(rank, len(images), batch_size * world):
            indices = list(range(first, min(first + batch_size * world, len(images)), world))
            yield [images.places[index] for index in indices], pixels[indices], labels[indices]
        return
    mine: Any = range(rank, len(images), world)
    load = partial(batch_of, images, condition, seed)
    own = torch.Generator()  # a loader without one draws from the global generator
    yield from torch.utils.data.DataLoader(mine, batch_size, num_workers=workers, collate_fn=load, generator=own)


def in_8_bits(batch: Batch) -> Batch:
    """The batch in a quarter of the memory, where its pixels are 8-bit ones."""
    places, pixels, labels = batch
    small = (pixels * 255).round().to(torch.uint8)
    return (places, small, labels) if torch.equal(small / 255, pixels) else batch


def batch_of(images: ImageSet, condition: Condition, seed: int, indices: Sequence[int]) -> Batch:
    rows = [(images.places[i], images.raw_image(i), images.label(i)) for i in indices]
    return stack([(place, prepare(images, image, condition, seed, place), label) for place, image, label in rows])


def prepare(images: LabelledImages, image: Image.Image, condition: Condition, seed: int, place: int) -> Tensor:
    """Pixels (C, H, W) of an image under a condition's corruption; ``place`` is its place in the whole set."""
    if isinstance(condition, Corrupted):
        image = corrupt(image, condition.corruption, condition.severity, seed=seed, index=place)
    return images.pixels_from_image(image)


def stack(rows: Sequence[tuple[int, Tensor, int]]) -> Batch:
    places, pixels, labels = zip(*rows, strict=True)
    return list(places), torch.stack(pixels), torch.tensor(labels)


def judge(
    model: PixelModel,
    pixels: Tensor,
    labels: Tensor,
    places: Sequence[int],
    condition: Condition,
    seed: int,
    subset: Sequence[int] | None = None,
) -> Answers:
    """Which images the model gets right under the condition; an attack's result is clipped here, whatever it says."""
    device = model.device
    pixels, labels = pixels.to(device), labels.to(device)
    pixels = pixels if pixels.is_floating_point() else pixels / 255  # 8-bit pixels travel in a quarter of the bytes
    judged = pixels
    if isinstance(condition, Attacked):
        attack = condition.attack
        attacked, truth = (model, labels) if subset is None else among(model, labels, subset)
        adversarial = attack(attacked, pixels, truth, seeds=[derive_seed(seed, place) for place in places])
        judged = attack.project(adversarial, pixels)
    with torch.no_grad():
        logits = model(judged)
    if not torch.isfinite(logits).all():
        raise ValueError(f"the model's logits are not finite under {condition}; there is nothing to judge")
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels lie in [{low}, {high}], but the model has {logits.shape[-1]} classes; map them first")
    answers = {}
    if subset is not None:
        answers["correct_all"] = logits.argmax(-1) == labels
        outside = torch.ones(logits.shape[-1], dtype=torch.bool, device=device)
        outside[list(subset)] = False
        logits = logits.masked_fill(outside, -torch.inf)
    confidence, prediction = logits.softmax(-1).max(-1)
    answers |= {"correct": prediction == labels, "label": labels, "prediction": prediction, "confidence": confidence}
    return {name: values.cpu().numpy() for name, values in answers.items()}


def among(model: PixelModel, labels: Tensor, subset: Sequence[int]) -> tuple[PixelModel, Tensor]:
    """The model and the labels where only the classes of ``subset`` exist: an attack decides among those of the judge.

    Among all classes it would, for example, leave images alone that are wrong there and right among the subset.
    """
    columns = [model.columns[c] for c in subset] if model.columns is not None else list(subset)
    place = {c: i for i, c in enumerate(subset)}
    if wrong := sorted(set(labels.tolist()) - set(place)):
        raise ValueError(f"the labels {wrong[:5]} are not among the set's {len(place)} classes")
    found = torch.tensor([place[label] for label in labels.tolist()], device=labels.device)
    return PixelModel(model.model, model.mean, model.std, columns), found


def gather(parts: Sequence[Answers]) -> Answers:
    """All processes' arrays in the order of the set: rank r holds the images r, r + world, ..."""
    _, world = rank_and_world_size()
    mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    everyone: list[Answers] = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    if not everyone[0]:
        raise ValueError("the set has no images")
    arrays = {}
    for name, first in everyone[0].items():
        values = [other.get(name, first[:0]) for other in everyone]
        arrays[name] = np.empty(sum(map(len, values)), dtype=first.dtype)
        for rank, value in enumerate(values):
            arrays[name][rank::world] = value
    return arrays


def protocol(condition: Condition, images: Images, n: int) -> dict[str, Any]:
    """What a reader needs in order to repeat the number, besides the seed; ``n`` images were measured."""
    described = images.protocol()
    if isinstance(images, ImageStream) and n != images.expected:
        described.setdefault("note", f"partial: {n} of {images.expected} images")
    if images.subset is not None:
        described["answer among"] = f"the set's {len(images.subset)} classes (score_all_classes: among all)"
        if isinstance(condition, Attacked):
            described["attack among"] = f"the set's {len(images.subset)} classes"
    return described | condition.protocol()
