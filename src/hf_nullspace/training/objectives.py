"""Objectives: the views of a batch and their loss. Adding one does not change the trainer.

An objective turns a batch into views (clean, noisy, adversarial, ...) that go through the model, and the logits of the
views into a loss. "a+b" is the union of the views of a and b and the sum of their losses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import ImageClassifierOutput

from hf_nullspace.core.seeds import generator_of
from hf_nullspace.core.settings import nearest
from hf_nullspace.models.patch_embedding import config_of
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.influence import permuted
from hf_nullspace.training.rounds import Round, RoundNoises

DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {"uniform": torch.rand, "normal": torch.randn}
"""Distributions of the random control; the scale does not matter."""
MIXES = ("one", "choice", "convex")
"""How a noise of the round is chosen for an image (:class:`NoisyView`)."""
_ROUNDED = 0.01  # how far from 1 the sum of class probabilities may be that came in bfloat16
_PERMUTATION = 1  # a separate random stream for permutations


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
    """(B,), -100 is ignored; or class probabilities (B, K), of mixup and CutMix."""
    noises: Tensor | None
    """The round's noises (M, N, D), usually one, if the objective made any."""
    model: nn.Module
    """For gradients with respect to the images (attacks); not for the forward pass of the training step."""
    cross_entropy: Callable[[Tensor], Tensor]
    """Logits (B, K) -> the loss of one view, normalised as the Trainer wants it."""
    mean: Callable[[Tensor], Tensor]
    """One number per image (B,) -> their mean, normalised in the same way."""
    seeds: Callable[[], list[int]]
    """One seed per image, from (seed, step, the image's place in the whole batch of all processes)."""
    embeddings: Callable[[], Tensor]
    """The clean patch embeddings u (B, N, D), without a gradient."""
    gradient: Tensor | None = None
    """Of the loss of the views before, with respect to the patch embeddings of their view "clean" (B, N, D), one per
    image and up to a positive factor; only for an objective that is the ``then`` of another."""
    preprocessing: Preprocessing | None = None
    """Between pixels in [0, 1] and the model's inputs, for an objective with ``needs_pixels``."""


class Objective(ABC):
    """Chooses the noise of a round, the views of a batch, and their loss."""

    needs_pixels = False
    """Whether it needs to know how images are normalised (the trainer then asks for the image processor)."""

    needs_whole_model = False
    """Whether it asks for :attr:`Batch.embeddings`, which needs all weights of the model in every process."""

    round_noise: Callable[[Round], RoundNoises | None] | None = None
    """Gives the noises of a round that begins, with their history; ``None`` without noises. May be a method."""

    then: "Objective | None" = None
    """Views and a loss that follow after the backward pass of these, which have a view "clean", and know its gradient
    (:attr:`Batch.gradient`). A step's loss is the sum of both."""

    @abstractmethod
    def views(self, batch: Batch) -> dict[str, View]:
        """What the batch becomes, by name. Objectives of a sum share a view by its name, which has to mean the same
        images and noise."""

    @abstractmethod
    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The scalar loss, from the logits (B, K) of the views."""

    # What an objective carries from one optimizer step to the next beside the weights, usually nothing.

    def state(self) -> dict[str, Tensor]:
        """It, by name, as checkpoints have it."""
        return {}

    def begin(self, state: Mapping[str, Tensor] | None) -> None:  # noqa: B027  (most have none)
        """A run begins: from nothing (``None``), or goes on from what :meth:`state` gave.

        Raises:
            ValueError: if ``state`` lacks something.
        """

    def end_step(self) -> None:  # noqa: B027
        """An optimizer step has been taken, after the backward passes of its micro-batches; on every process."""


class Plain(Objective):
    """A control that the paper does not have: the same batches, steps and learning rate, two identical views, no noise.

    2 CE(z, y), with both views computed, so that a step costs what a step with noise costs.
    """

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images), "again": View(batch.images)}

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["clean"]) + batch.cross_entropy(logits["again"])


class NoisyView(Objective):
    """CE(z, y) + CE(z', y) (Algorithm 1, line 19): every batch twice, as it is and with the round's noise.

    ``make`` is a function from a :class:`Round` to its noises; ``mix`` says which of them an image gets.

    A round may have several noises. "one" takes the first for all images; "choice" gives each image one of them at
    random; "convex" gives each image a convex combination of them with random weights (uniform on the simplex), which
    by the closure of the nullspace (A.5) stays within epsilon. What an image gets depends on (seed, step, place).
    """

    def __init__(self, make: Callable[[Round], RoundNoises], mix: str = "one") -> None:
        self.round_noise, self.mix = make, mix

    def views(self, batch: Batch) -> dict[str, View]:
        return {"clean": View(batch.images), "noisy": View(batch.images, self._noise(batch))}

    def _noise(self, batch: Batch) -> Tensor | None:
        noises = batch.noises
        if noises is None or len(noises) == 1 or self.mix == "one":
            return None if noises is None else noises[:1]
        seeds = batch.seeds()
        if self.mix == "choice":
            return noises[torch.tensor([seed % len(noises) for seed in seeds])]
        drawn = np.stack([np.random.default_rng(seed).exponential(size=len(noises)) for seed in seeds])
        weights = torch.from_numpy(drawn / drawn.sum(1, keepdims=True)).to(noises)
        return torch.einsum("bm,mnd->bnd", weights, noises)

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return batch.cross_entropy(logits["clean"]) + batch.cross_entropy(logits["noisy"])


def random_noise(round: Round, distribution: str = "uniform") -> RoundNoises:
    """The control of table 3: one random vector (1, N, D) for all images, with the influence of a learned one.

    It is scaled to the influence epsilon on the held-out images of the round. With ``bank_size`` M they are M.
    """
    generator = torch.Generator().manual_seed(round.seed)
    shape = (1, round.shape.patches, round.shape.features)
    directions = [DISTRIBUTIONS[distribution](shape, generator=generator) for _ in range(round.bank_size)]
    if distribution == "uniform":
        directions = [2 * direction - 1 for direction in directions]
    return round.scale_to_epsilon(directions, f"random, {distribution}")


def permuted_noise(round: Round) -> RoundNoises:
    """The learned noises with their elements permuted (figure 2), scaled to epsilon on the held-out images."""
    noises, history = round.learn(without_previous=True)  # noises of the round before are permuted already
    generator = generator_of(round.seed, _PERMUTATION)
    made = round.scale_to_epsilon(
        [permuted(noise.tensor, generator) for noise in noises], "learned, then permuted", history
    )
    return made._replace(noises=(*made.noises, *round.rescale_previous(round.bank_size - len(made.noises))))


class Sum(Objective):
    """Several objectives at once: the union of their views, each computed once, and the sum of their losses.

    "nullspace+madry" is CE(z, y) + CE(z', y) + CE(z_adv, y), the attack being on the model without the noise.

    Raises:
        ValueError: if two of them make a noise.
    """

    def __init__(self, parts: list[Objective]) -> None:
        self.parts = parts
        self.needs_pixels = any(part.needs_pixels for part in parts)
        self.needs_whole_model = any(part.needs_whole_model for part in parts)
        makers = [part.round_noise for part in parts if part.round_noise is not None]
        if len(makers) > 1:
            raise ValueError(f"{len(makers)} objectives of a sum make a noise; a batch has one noisy view: choose one")
        self.round_noise = makers[0] if makers else None
        following = [part.then for part in parts if part.then is not None]
        self.then = Sum(following) if following else None

    def views(self, batch: Batch) -> dict[str, View]:
        found: dict[str, View] = {}
        for part in self.parts:
            found |= part.views(batch)
        return found

    def loss(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return torch.stack([part.loss(logits, batch) for part in self.parts]).sum()

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for part in self.parts for name, tensor in part.state().items()}

    def begin(self, state: Mapping[str, Tensor] | None) -> None:
        for part in self.parts:
            part.begin(state)

    def end_step(self) -> None:
        for part in self.parts:
            part.end_step()


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
        ValueError: if one is not known, or is repeated.
    """
    names = name.split("+")
    for part in names:
        if part not in _OBJECTIVES:
            raise ValueError(
                f"objective={name!r}: expected an objective, or several joined by '+'{nearest(part, _OBJECTIVES)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"objective={name!r}: one is repeated")
    return names


def make_objective(name: str, args: Any) -> Objective:
    """The objective of that name, or the sum of several joined by "+", with the settings of ``args``.

    Raises:
        ValueError: if the name is unknown.
    """
    parts = [_OBJECTIVES[part](args) for part in check_objective(name)]
    return parts[0] if len(parts) == 1 else Sum(parts)


register_objective("plain", lambda args: Plain())
register_objective("nullspace", lambda args: NoisyView(Round.learn, args.noise_mix))
register_objective(
    "random", lambda args: NoisyView(lambda round: random_noise(round, args.noise_distribution), args.noise_mix)
)
register_objective("permuted", lambda args: NoisyView(permuted_noise, args.noise_mix))


def view_loss(
    logits: Tensor,
    labels: Tensor,
    count: Tensor | int | None,
    label_smoothing: float = 0.0,
    loss_func: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of one view in at least float32: the sum over its images / ``count``, or their mean if ``None``.

    Labels are classes (B,) or their probabilities (B, K): -sum_k y_k log p_k. ``count`` is that of :func:`images_of`.
    ``loss_func`` is a user's ``compute_loss_func``, used instead of cross-entropy, and told the same labels and count.
    """
    count = images_of(count, labels)
    if loss_func is not None:
        return loss_func(ImageClassifierOutput(logits=logits), labels, num_items_in_batch=count)
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
    reduction = "mean" if count is None else "sum"
    loss = cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    return loss if count is None else loss / count


def mean_over_images(values: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """The mean of one number per image (B,), without those labelled -100: the sum / ``count``, or / their number."""
    counted = labels != -100 if labels.dim() == 1 else labels.new_ones(len(labels), dtype=torch.bool)
    total = values.masked_fill(~counted, 0).sum()
    return total / (counted.sum() if count is None else images_of(count, labels))


def images_of(count: Tensor | int | None, labels: Tensor) -> Any:
    """The images in the Trainer's ``num_items_in_batch``: it counts an image K times whose label is K probabilities."""
    return count / labels.shape[1] if count is not None and labels.is_floating_point() and labels.dim() == 2 else count


def known_preprocessing(objective: Objective, image_processor: Any, name: str) -> Preprocessing | None:
    """How images are normalised, for an objective with ``needs_pixels``. Raises a ValueError if it is not known."""
    if not objective.needs_pixels:
        return None
    if image_processor is None:
        raise ValueError(
            f"objective={name!r} attacks images in pixels: pass processing_class=image_processor, which knows "
            "their mean and std"
        )
    return Preprocessing.from_processor(image_processor)


def check_labels(inputs: Mapping[str, Any], model: nn.Module, *, soft: bool = False) -> None:
    """Raise a ValueError if there are no labels or one is none of the model's classes; -100 is ignored by the loss.

    Class probabilities (B, K) of the model's K classes are labels, too. On a GPU a wrong label is an assertion in a
    kernel that names nothing and ends the process. ``soft``: the user has a loss function, which may want others.
    """
    if "labels" not in inputs:
        raise ValueError(f"training rows have {sorted(inputs)} but no 'labels'; name the label column")
    labels, classes = inputs["labels"], getattr(config_of(model), "num_labels", None)
    if labels.is_floating_point() and labels.dim() == 2 and labels.shape[1] == (classes or labels.shape[1]):
        soft = soft or bool((labels >= 0).all() and ((labels.sum(1) - 1).abs() < _ROUNDED).all())
    if soft:
        return
    wrong = (labels < 0) & (labels != -100)
    if classes is not None:
        wrong |= labels >= classes
    if labels.is_floating_point() or labels.dim() != 1 or wrong.any():
        shown = f"{labels.dtype} of shape {tuple(labels.shape)}" if not wrong.any() else str(labels[wrong].tolist()[:5])
        raise ValueError(
            f"labels {shown}: expected one whole number per image, in [0, {classes or 'number of classes'}) as the "
            "model's head has it, or a probability for each class; map the labels of the data to the model's, or give "
            "the model a new head (and pass compute_loss_func for other labels)"
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
