"""Attacks that were made on another model: a model that only hides its gradients is not safer under them.

Papernot et al. 2017; Athalye, Carlini, Wagner 2018 ("Obfuscated gradients give a false sense of security").
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.patch_embedding import config_of
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.attacks.base import Attack
from hf_nullspace.robustness.pixel_model import PixelModel, model_fingerprint


class SourceModel(PixelModel):
    """A model that takes pixels of any size: they are resized to its own, bilinear, with a gradient."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing):
        super().__init__(model, preprocessing.mean, preprocessing.std)
        self.size = preprocessing.size

    def outputs(self, pixels: Tensor, **kwargs: Any) -> Any:
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True).clamp(0, 1)
        return super().outputs(pixels, **kwargs)


@dataclass(frozen=True, repr=False)
class Transfer(Attack):
    """The images of ``attack`` on the model ``source`` (a folder or Hub id), to be judged by another model.

    Both models need the same classes in the same order.

    Raises:
        ModelNotLoadedError, ValueError: if ``source`` is no image classifier, or has no usable image processor.
    """

    attack: Attack
    source: str
    model: SourceModel = field(init=False, compare=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        preprocessing = Preprocessing.from_processor(load_image_processor(self.source))
        model = SourceModel(load_model(self.source).eval(), preprocessing)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "fingerprint", model_fingerprint(model))

    @property
    def seeded(self) -> bool:  # type: ignore[override]  # a class attribute elsewhere
        return self.attack.seeded

    @property
    def batch_dependent(self) -> bool:  # type: ignore[override]  # a class attribute elsewhere
        return self.attack.batch_dependent

    @property
    def cost(self) -> float:
        return self.attack.cost

    def require(self) -> None:
        self.attack.require()

    def settings(self) -> dict[str, Any]:
        """Those of the attack, after its name, and the source with the hash of its weights."""
        source = Path(self.source).name if Path(self.source).exists() else self.source
        return {"of": type(self.attack).__name__} | self.attack.settings() | {"source": f"{source} {self.fingerprint}"}

    def project(self, adversarial: Tensor, pixels: Tensor) -> Tensor:
        return self.attack.project(adversarial, pixels)

    def perturb(self, model: nn.Module, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        assert isinstance(model, PixelModel)
        if model.columns is not None or config_of(model.model).id2label != config_of(self.model.model).id2label:
            raise ValueError(
                f"the attack's source {self.source} has other classes than the model, or in another order; transfer "
                "needs the same, as in the data set that both were trained on"
            )
        return self.attack(self.model.to(pixels.device), pixels, labels, seeds=seeds)
