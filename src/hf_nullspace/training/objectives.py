"""What a training batch becomes, and what the loss is. The trainer asks the objective; a new one needs no edit there.

An objective turns a batch into views (clean, noisy, adversarial, ...) that go through the model, and the logits of the
views into a loss. "a+b" is the union of the views of a and b and the sum of their losses.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_nullspace.models.patch_embedding import NoiseMode, PatchEmbeddingNoise
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.training.rounds import Made, Round


@dataclass(frozen=True, eq=False)
class View:
    """The batch as the model sees it: ``images`` as it takes them (B, C, H, W), with a noise for all of them (1, N, D),
    one for each (B, N, D), or none."""

    images: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """A training batch, and what an objective may ask about it."""

    images: Tensor
    """``pixel_values`` (B, C, H, W)."""
    labels: Tensor
    """(B,); -100 is ignored."""
    noises: Tensor | None
    """The round's noises (M, N, D), mostly one, if the objective made any."""
    model: nn.Module
    """To be asked for gradients with respect to the images; not the way of the training step itself."""
    cross_entropy: Callable[[Tensor], Tensor]
    """Logits (B, K) -> the loss of one view, normalised as the Trainer wants it."""
    mean: Callable[[Tensor], Tensor]
    """One number per image (B,) -> their mean, normalised in the same way."""
    seeds: Callable[[], list[int]]
    """One seed per image, from (seed, step, the image's place in the whole batch of all processes)."""
    preprocessing: Preprocessing | None = None
    """Between pixels in [0, 1] and the model's inputs, for an objective with ``needs_pixels``."""


class Objective(ABC):
    """Chooses the noise of a round, the views of a batch, and their loss."""

    needs_pixels = False
    """Whether it needs to know how images are normalised (the trainer then asks for the image processor)."""

    def round_noise(self, round: Round) -> Made | None:
        """The noises of a round that begins, and how they came about; ``None`` if there are none."""
        return None

    @abstractmethod
    def views(self, batch: Batch) -> dict[str, View]:
        """What the batch becomes, by name; at most one view has a noise. Two objectives share views of one name."""

    @abstractmethod
    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The scalar loss, from the logits (B, K) of the views."""


class Plain(Objective):
    """The control that the paper lacks: the same batches, steps and learning rate, two identical views, no noise.

    2 CE(z, y), with both views computed, so that a step costs what a step with noise costs.
    """

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images), "again": View(batch.images)}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["clean"]) + batch.cross_entropy(logits["again"])


class Sum(Objective):
    """Several objectives at once: the union of their views, computed once each, and the sum of their losses.

    "nullspace+madry" is CE(z, y) + CE(z', y) + CE(z_adv, y), the attack being on the model without the noise.

    Raises:
        ValueError: when a round begins, if two of them make a noise.
    """

    def __init__(self, parts: list[Objective]) -> None:
        self.parts = parts
        self.needs_pixels = any(part.needs_pixels for part in parts)

    def round_noise(self, round: Round) -> Made | None:
        made = [noise for part in self.parts if (noise := part.round_noise(round)) is not None]
        if len(made) > 1:
            raise ValueError(f"{len(made)} objectives of a sum make a noise; a batch has one noisy view: choose one")
        return made[0] if made else None

    def views(self, batch: Batch) -> dict[str, View]:
        found: dict[str, View] = {}
        for part in self.parts:
            found |= part.views(batch)
        return found

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return torch.stack([part.loss(logits, batch) for part in self.parts]).sum()


_OBJECTIVES: dict[str, Callable[[Any], Objective]] = {}


def register_objective(name: str, make: Callable[[Any], Objective]) -> None:
    """Make ``objective=name`` known; ``make(args)`` builds it from the run's :class:`NullspaceConfig`.

    Raises:
        ValueError: if the name is taken, or holds a "+", which joins objectives.
    """
    if name in _OBJECTIVES or "+" in name or not name:
        raise ValueError(f"objective {name!r}: expected a new name without '+'; taken are {', '.join(_OBJECTIVES)}")
    _OBJECTIVES[name] = make


def check_objective(name: str) -> list[str]:
    """The names that ``name`` joins with "+".

    Raises:
        ValueError: if one is not known, or stands there twice.
    """
    names = name.split("+")
    for part in names:
        if part not in _OBJECTIVES:
            near = difflib.get_close_matches(part, _OBJECTIVES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(map(repr, _OBJECTIVES))
            raise ValueError(f"objective={name!r}: expected one of {known}, or several joined by '+'{hint}")
    if len(set(names)) < len(names):
        raise ValueError(f"objective={name!r}: one stands there twice")
    return names


def make_objective(name: str, args: Any) -> Objective:
    """The objective of that name, or the sum of several joined by "+", with the settings of ``args``.

    Raises:
        ValueError: if there is none.
    """
    parts = [_OBJECTIVES[part](args) for part in check_objective(name)]
    return parts[0] if len(parts) == 1 else Sum(parts)


register_objective("plain", lambda args: Plain())


def forward_views(
    model: nn.Module,
    hook: PatchEmbeddingNoise,
    inputs: dict[str, Any],
    views: Mapping[str, View],
    input_name: str,
    *,
    together: bool = True,
) -> dict[str, Tensor]:
    """The logits (B, K) of every view, from one forward pass of all or one after the other; the noisy one is the last.

    One pass keeps a GPU busy; on a CPU it was not the faster way (``benchmarks/train_step.py``). Whatever else of
    ``inputs`` has one entry per image goes with every view; the labels are left out.

    Raises:
        ValueError: if more than one view has a noise.
    """
    names = sorted(views, key=lambda name: views[name].noise is not None)
    noises = [view.noise for view in views.values() if view.noise is not None]
    if len(noises) > 1:
        raise ValueError(f"{len(noises)} of the views {', '.join(views)} have a noise; one forward pass adds one")
    others = {name: value for name, value in inputs.items() if name not in ("labels", input_name)}
    if not together:
        logits = {}
        for name in names:
            noise, images = views[name].noise, views[name].images
            with nullcontext() if noise is None else hook.adding(noise.to(images.device)):
                logits[name] = model(**others, **{input_name: images}).logits
        return logits
    count, copies = len(inputs["labels"]), len(names)
    repeated = {
        name: torch.cat([value] * copies)
        if isinstance(value, Tensor) and value.dim() and len(value) == count
        else value
        for name, value in others.items()
    }
    repeated[input_name] = torch.cat([views[name].images for name in names])
    device = repeated[input_name].device
    with hook.adding(noises[0].to(device), NoiseMode.LAST_PART, copies) if noises else nullcontext():
        chunks = model(**repeated).logits.chunk(copies)
    return dict(zip(names, chunks, strict=True))


def view_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of one view in at least float32: the sum over its images / ``count``, or their mean if ``None``."""
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    reduction = "mean" if count is None else "sum"
    loss = cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    return loss if count is None else loss / count


def mean_over_images(values: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """The mean of one number per image (B,), without those labelled -100: the sum / ``count``, or / their number."""
    counted = labels != -100
    total = values.masked_fill(~counted, 0).sum()
    return total / (counted.sum() if count is None else count)


def check_labels(labels: Tensor, classes: int | None) -> None:
    """Raise a ValueError if a label is none of the model's classes; -100 (ignored by the loss) is allowed.

    On a GPU such a label is an assertion in a kernel that names nothing and ends the process.
    """
    wrong = (labels < 0) & (labels != -100)
    if classes is not None:
        wrong |= labels >= classes
    if labels.is_floating_point() or labels.dim() != 1 or wrong.any():
        shown = f"{labels.dtype} of shape {tuple(labels.shape)}" if not wrong.any() else str(labels[wrong].tolist()[:5])
        raise ValueError(
            f"labels {shown}: expected one whole number per image, in [0, {classes or 'number of classes'}) as the "
            "model's head has it; map the labels of the data to the model's, or give the model a new head (and pass "
            "compute_loss_func for soft labels)"
        )


def check_head(config: Any) -> None:
    """Raise a ValueError if the model's config says that its head is for something else than one label per image."""
    problem, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    if problem in ("multi_label_classification", "regression") or labels == 1:
        kind = "regression" if labels == 1 or problem == "regression" else "multi-label classification"
        raise ValueError(
            f"the model's head is for {kind}; nullspace fine-tuning compares class probabilities and trains with "
            "cross-entropy, which need one label per image out of at least two"
        )
