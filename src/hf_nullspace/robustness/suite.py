"""The one evaluation loop: conditions over a set of images, counted exactly on any number of processes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hf_nullspace.robustness.attacks.base import Attack, frozen
from hf_nullspace.robustness.corruptions import SMALL, corrupt
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.scores import Interval, accuracy


class Images(Protocol):
    """What a set of labelled images offers; ``training.data.ImageClassificationDataset`` does."""

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
    """One condition over one set; ``correct`` holds one bool per image, in the order of the set."""

    condition: str
    correct: NDArray[np.bool_] = field(repr=False)
    seconds: float
    seed: int
    protocol: dict[str, Any] = field(default_factory=dict)

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
    progress: bool = True,
) -> list[ConditionResult]:
    """Judge ``model`` on every image of ``images`` under every condition; every process returns the same results.

    With ``torch.distributed`` initialised, rank r takes the images r, r + world, ...: every image once, none twice,
    whatever the batch size. Corruptions and random starts depend on (seed, image index) alone. Meanwhile the model is
    in eval mode, afterwards as before. Wrap the call in ``torch.autocast`` to evaluate in bf16. ``progress`` shows one
    bar with the time left on the main process.
    """
    if not len(images):
        raise ValueError("the set has no images")
    repeated = {str(condition) for condition in conditions if [str(c) for c in conditions].count(str(condition)) > 1}
    if repeated:
        raise ValueError(f"conditions given twice: {', '.join(sorted(repeated))}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    mine = range(rank, len(images), world)
    total = round(len(mine) * sum(condition.cost for condition in conditions))
    results = []
    with frozen(model), tqdm(total=total, unit="fwd", disable=not progress or rank > 0, leave=False) as bar:
        for condition in conditions:
            bar.set_description(str(condition))
            start = time.perf_counter()
            part = np.zeros(len(mine), dtype=bool)
            for places, pixels, labels in batches(images, mine, condition, batch_size, seed):
                part[places] = judge(model, pixels, labels, mine[places], condition, seed)
                bar.update(len(labels) * condition.cost)
            correct = gather(part, len(images), rank, world)
            seconds = time.perf_counter() - start
            results.append(ConditionResult(str(condition), correct, seconds, seed, protocol(condition, images)))
    return results


def batches(
    images: Images, mine: range, condition: Condition, batch_size: int, seed: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """This process's images, batch by batch: their places in ``mine``, pixels (B, C, H, W), labels (B,)."""
    for first in range(0, len(mine), batch_size):
        places = slice(first, min(first + batch_size, len(mine)))
        rows = []
        for index in mine[places]:
            image = images.raw_image(index)
            if isinstance(condition, Corrupted):
                image = corrupt(image, condition.corruption, condition.severity, seed=seed, index=index)
            rows.append(images.pixels_from_image(image))
        yield places, torch.stack(rows), torch.tensor([images.label(index) for index in mine[places]])


def judge(
    model: PixelModel, pixels: Tensor, labels: Tensor, indices: Sequence[int], condition: Condition, seed: int
) -> NDArray[np.bool_]:
    """Which images the model gets right under the condition; an attack's result is clipped here, whatever it says."""
    device = model.device
    pixels, labels = pixels.to(device), labels.to(device)
    judged = pixels
    if isinstance(condition, Attacked):
        attack = condition.attack
        adversarial = attack(model, pixels, labels, seeds=[image_seed(seed, index) for index in indices])
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
    return (logits.argmax(-1) == labels).cpu().numpy()


def image_seed(seed: int, index: int) -> int:
    """A seed for one image: independent of its batch and its process."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def gather(part: NDArray[np.bool_], n: int, rank: int, world: int) -> NDArray[np.bool_]:
    """All processes' results in the order of the set."""
    if world == 1:
        return part
    parts: list[NDArray[np.bool_]] = [part] * world
    dist.all_gather_object(parts, part)
    correct = np.zeros(n, dtype=bool)
    for other, values in enumerate(parts):
        correct[other::world] = values
    return correct


def protocol(condition: Condition, images: Images) -> dict[str, Any]:
    """What a reader needs in order to repeat the number, besides the set and the seed."""
    if isinstance(condition, Attacked):
        return {"space": "pixels in [0, 1]", "attack": repr(condition.attack)}
    if isinstance(condition, Corrupted):
        size = images.raw_image(0).size
        table = "CIFAR-10-C's" if max(size) <= SMALL else "ImageNet-C's"
        return {"generated": f"at the image's own size (first image: {size[0]}x{size[1]}), {table} severities"}
    return {}
