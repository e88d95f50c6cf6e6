"""AutoAttack (Croce & Hein 2020) through the optional library pyautoattack, the authors' code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_nullspace.robustness.attacks.gradient import BoundedAttack

NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True, repr=False)
class AutoAttack(BoundedAttack):
    """The standard ensemble: APGD-CE, targeted APGD-DLR, targeted FAB (``targets`` each), Square (``queries``).

    Each attack runs on the images that the ones before left right. The standard needs 9 targets, so at least 10
    classes; with fewer classes, ask for fewer targets and the name says so. Its random numbers depend on the batch
    (the seed is that of the batch's first image): the result of one image is not independent of the others.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    targets: int = 9
    queries: int = 5000
    iterations: int = 100

    seeded = True
    soft_labels = False
    batch_dependent = True

    def require(self) -> None:
        load_library()

    @property
    def cost(self) -> float:
        return 3.0 * self.iterations * (1 + 2 * self.targets) + self.queries

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        library = load_library()
        with torch.no_grad():
            classes = model(pixels[:1]).shape[1]
        if classes < max(4, self.targets + 1):
            fewer = f"use AutoAttack(targets={classes - 1})" if classes >= 4 else "the DLR loss needs 4 classes"
            needed = f"{self.targets} targets need {self.targets + 1} classes"
            raise ValueError(f"{needed}, the model has {classes}: {fewer}")
        devices = [pixels.device] if pixels.is_cuda else []
        with torch.random.fork_rng(devices=devices):  # it seeds the global generators
            ensemble = library(
                # float32 is all the library can do; and its points may be outside [0, 1] by rounding
                lambda points: model(points.clamp(0, 1)).float(),
                norm=NORMS[self.norm],
                eps=self.eps,
                version="standard",
                device=pixels.device,
                seed=seeds[0] % 2**31,
            )
            ensemble.apgd.n_iter = ensemble.apgd_targeted.n_iter = ensemble.fab.n_iter = self.iterations
            ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = self.targets
            ensemble.square.n_queries = self.queries
            ensemble.verbose = False
            adversarial, _ = ensemble.run_standard_evaluation(pixels.float(), labels, batch_size=len(pixels))
        return adversarial.to(pixels)


def load_library() -> Any:
    try:
        from pyautoattack import AutoAttack as library
    except ImportError as error:
        raise ImportError("AutoAttack needs pyautoattack: pip install 'hf-nullspace[attacks]'") from error
    return library
