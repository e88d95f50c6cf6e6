"""The one evaluation loop: conditions over a set of images, counted exactly on any number of processes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hf_nullspace.core.processes import rank_and_world_size
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.frozen import frozen
from hf_nullspace.robustness.attacks.base import Attack
from hf_nullspace.robustness.corruptions import SMALL, check_cell, corrupt
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.scores import Interval, accuracy


class Images(Protocol):
    """What a set of labelled images offers; ``training.data.ImageClassificationDataset`` and ``sets.ImageSet`` do.

    Optional: ``subset``, the classes among which the answer is looked for (ImageNet-A and -R); ``protocol()``, what was
    done to the images; ``batch(indices)``, 8-bit pixels and labels that are ready (``sets.InMemory``). A stream offers
    ``__iter__`` over (image, label) and ``expected`` instead of a length.
    """

    def __len__(self) -> int: ...

    def raw_image(self, index: int) -> Image.Image:
        """PIL image in RGB at its original size."""

    def label(self, index: int) -> int: ...

    def pixels_from_image(self, image: Image.Image) -> Tensor:
        """Pixels of shape (C, H, W), float32 in [0, 1], at the size of the model's input."""


@dataclass(frozen=True)
class Clean:
    """The images as they are."""

    cost = 1.0

    def __str__(self) -> str:
        return "clean"


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


@dataclass(frozen=True)
class Attacked:
    """Clean images, attacked in pixel space at the size of the model's input."""

    attack: Attack

    @property
    def cost(self) -> float:
        return 1 + self.attack.cost

    def __str__(self) -> str:
        return repr(self.attack)


Condition = Clean | Corrupted | Attacked


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
) -> list[ConditionResult]:
    """Judge ``model`` on every image of ``images`` under every condition; every process returns the same results.

    With ``torch.distributed`` initialised, rank r takes the images r, r + world, ...: every image once, none twice,
    whatever the batch size. Corruptions and random starts depend on (seed, image index) alone. Meanwhile the model is
    in eval mode, afterwards as before. Wrap the call in ``torch.autocast`` to evaluate in bf16. ``workers`` prepare
    images in processes of their own. ``progress`` is a bar of the caller's that spans more than this call, or whether
    to show one with the time left on the main process. ``on_result`` sees each result as soon as it is there.
    """
    if not is_stream(images) and not len(images):
        raise ValueError("the set has no images")
    names = [str(condition) for condition in conditions]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"conditions given twice: {', '.join(repeated)}")
    rank, world = rank_and_world_size()
    bar = progress if isinstance(progress, Progress) else Progress(shown=progress and rank == 0)
    keys = {name: (object(), name) for name in names}  # of this call alone
    for name, condition in zip(names, conditions, strict=True):
        bar.expect(keys[name], work(images, condition))
    results = []
    with nullcontext() if bar is progress else bar, frozen(model):
        for condition in conditions:
            bar.begin(str(condition))
            start, done = time.perf_counter(), 0
            parts: list[dict[str, NDArray[Any]]] = []
            for indices, pixels, labels in batches(images, condition, batch_size, seed, rank, world, workers):
                judged = judge(model, pixels, labels, indices, condition, seed, getattr(images, "subset", None))
                parts.append(judged if per_sample else {k: v for k, v in judged.items() if k.startswith("correct")})
                bar.advance(len(labels) * condition.cost)
                done += len(labels)
            bar.expect(keys[str(condition)], done * condition.cost)
            arrays = gather(parts, world)
            correct = arrays.pop("correct")
            result = ConditionResult(
                condition=str(condition),
                correct=correct,
                seconds=time.perf_counter() - start,
                seed=seed,
                protocol=protocol(condition, images, len(correct)),
                correct_all=arrays.pop("correct_all", None),
                samples=arrays or None,
            )
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


def work(images: Images, condition: Condition) -> float:
    """Forward passes that this process owes a condition, roughly; of a stream by its published size."""
    size = images.expected if is_stream(images) else len(images)  # type: ignore[attr-defined]
    return float(size / rank_and_world_size()[1] * condition.cost)


def is_stream(images: Any) -> bool:
    return hasattr(images, "expected")


class Prepared(torch.utils.data.Dataset[tuple[int, Tensor, int]]):
    """This process's images under a condition's corruption: (index, pixels (C, H, W), label)."""

    def __init__(self, images: Images, condition: Condition, seed: int, mine: Sequence[int]):
        self.images, self.condition, self.seed, self.mine = images, condition, seed, mine

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, place: int) -> tuple[int, Tensor, int]:
        index = self.mine[place]
        return self.prepare(seed_index(self.images, index), self.images.raw_image(index), self.images.label(index))

    def prepare(self, index: int, image: Image.Image, label: int) -> tuple[int, Tensor, int]:
        c = self.condition
        if isinstance(c, Corrupted):
            image = corrupt(image, c.corruption, c.severity, seed=self.seed, index=index)
        return index, self.images.pixels_from_image(image), label


Batch = tuple[list[int], Tensor, Tensor]


def stack(rows: Sequence[tuple[int, Tensor, int]]) -> Batch:
    indices, pixels, labels = zip(*rows, strict=True)
    return list(indices), torch.stack(pixels), torch.tensor(labels)


def batches(
    images: Images, condition: Condition, batch_size: int, seed: int, rank: int, world: int, workers: int
) -> Iterator[Batch]:
    """This process's images, batch by batch: indices in the set, pixels (B, C, H, W), labels (B,)."""
    if hasattr(images, "batch") and not isinstance(condition, Corrupted):
        for first in range(rank, len(images), batch_size * world):
            indices = list(range(first, min(first + batch_size * world, len(images)), world))
            yield [seed_index(images, index) for index in indices], *images.batch(indices)
        return
    if not is_stream(images):
        prepared = Prepared(images, condition, seed, range(rank, len(images), world))
        own = torch.Generator()  # a loader without one draws from the global generator
        yield from torch.utils.data.DataLoader(
            prepared, batch_size, num_workers=workers, collate_fn=stack, generator=own
        )
        return
    prepared = Prepared(images, condition, seed, ())
    rows: list[tuple[int, Tensor, int]] = []
    for index, (image, label) in enumerate(images):  # type: ignore[arg-type, var-annotated]
        if index % world == rank:
            rows.append(prepared.prepare(index, image, label))
        if len(rows) == batch_size:
            yield stack(rows)
            rows = []
    if rows:
        yield stack(rows)


def judge(
    model: PixelModel,
    pixels: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    condition: Condition,
    seed: int,
    subset: Sequence[int] | None = None,
) -> dict[str, NDArray[Any]]:
    """Which images the model gets right under the condition; an attack's result is clipped here, whatever it says."""
    device = model.device
    pixels, labels = pixels.to(device), labels.to(device)
    pixels = pixels if pixels.is_floating_point() else pixels / 255  # 8-bit pixels travel in a quarter of the bytes
    judged = pixels
    if isinstance(condition, Attacked):
        attack = condition.attack
        attacked, truth = (model, labels) if subset is None else among(model, labels, subset)
        adversarial = attack(attacked, pixels, truth, seeds=[derive_seed(seed, index) for index in indices])
        judged = attack.project(adversarial, pixels)
    with torch.no_grad():
        logits = model(judged)
    if not torch.isfinite(logits).all():
        raise ValueError(f"the model's logits are not finite under {condition}; there is nothing to judge")
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        raise ValueError(
            f"labels lie in [{int(labels.min())}, {int(labels.max())}], but the model has {logits.shape[-1]} classes; "
            "map the set's labels to the model's first"
        )
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


def seed_index(images: Images, index: int) -> int:
    """What an image's random numbers depend on: its place in the whole set, also where only a part is measured."""
    places = getattr(images, "places", None)
    return index if places is None else int(places[index])


def gather(parts: Sequence[dict[str, NDArray[Any]]], world: int) -> dict[str, NDArray[Any]]:
    """All processes' arrays in the order of the set: rank r holds the images r, r + world, ..."""
    mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    everyone: list[dict[str, NDArray[Any]]] = [mine] * world
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
    described = dict(images.protocol()) if hasattr(images, "protocol") else {}
    if is_stream(images) and n != images.expected:  # type: ignore[attr-defined]
        described.setdefault("note", f"partial: {n} of {images.expected} images")  # type: ignore[attr-defined]
    if (subset := getattr(images, "subset", None)) is not None:
        described["answer among"] = f"the set's {len(subset)} classes (score_all_classes: among all)"
    if isinstance(condition, Attacked):
        attack = condition.attack
        if subset is not None:
            described["attack among"] = f"the set's {len(subset)} classes"
        described |= {"space": "pixels in [0, 1]", "attack": type(attack).__name__, "settings": attack.settings()}
    if isinstance(condition, Corrupted):
        described |= {"corruption": condition.corruption, "severity": condition.severity}
        described |= {"generated": f"at the image's own size; up to {SMALL} px CIFAR-10-C's table, else ImageNet-C's"}
    return described
