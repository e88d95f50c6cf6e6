"""Nullspace-noise fine-tuning for vision transformers.

The public names are loaded on first use, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_nullspace.averaging import greedy_soup, interpolate, soup
    from hf_nullspace.hub.metric import metric_folder
    from hf_nullspace.linear.patch import PatchNullspace
    from hf_nullspace.models.patch_embedding import patch_embedding_noise
    from hf_nullspace.noise.algorithm1 import learn_noise
    from hf_nullspace.noise.artifact import NullspaceNoise
    from hf_nullspace.noise.bank import NoiseBank
    from hf_nullspace.training.config import NullspaceConfig
    from hf_nullspace.training.trainer import NullspaceTrainer

__version__ = "0.1.0"
__all__ = [
    "NoiseBank",
    "NullspaceConfig",
    "NullspaceNoise",
    "NullspaceTrainer",
    "PatchNullspace",
    "__version__",
    "greedy_soup",
    "interpolate",
    "learn_noise",
    "metric_folder",
    "patch_embedding_noise",
    "soup",
]

_MODULES = {
    "NoiseBank": "hf_nullspace.noise.bank",
    "NullspaceConfig": "hf_nullspace.training.config",
    "NullspaceNoise": "hf_nullspace.noise.artifact",
    "NullspaceTrainer": "hf_nullspace.training.trainer",
    "PatchNullspace": "hf_nullspace.linear.patch",
    "greedy_soup": "hf_nullspace.averaging",
    "interpolate": "hf_nullspace.averaging",
    "learn_noise": "hf_nullspace.noise.algorithm1",
    "metric_folder": "hf_nullspace.hub.metric",
    "patch_embedding_noise": "hf_nullspace.models.patch_embedding",
    "soup": "hf_nullspace.averaging",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'hf_nullspace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
