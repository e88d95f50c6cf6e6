"""Where a noise came from: the model by name and by its weights, and what was measured."""

import hashlib
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_nullspace import __version__
from hf_nullspace.models.patch_embedding import config_of, unwrap
from hf_nullspace.noise.probe import is_sharded


@dataclass(frozen=True)
class NoiseProvenance:
    """Where a noise came from, and what was measured of it. ``None`` means: not known, not measured."""

    base_model: str | None = None
    """Name or path of the model that the noise was learned on."""
    revision: str | None = None
    """Commit of that model on the Hub."""
    model_sha256: str | None = None
    """Hash of the weights it was learned on (:func:`model_hash`)."""
    training_step: int | None = None
    """Optimizer steps of the fine-tuning that came before."""
    round: int | None = None
    """The round k of Algorithm 1."""
    seed: int | None = None
    epsilon: float | None = None
    influence: float | None = None
    """sigma on held-out images, in [0, 2]."""
    influence_images: int | None = None
    """How many images that is the mean over."""
    steps: int | None = None
    """Gradient steps t that were taken."""
    stopped: str | None = None
    """Why it ended: one of :data:`hf_nullspace.noise.history.ENDINGS`."""
    settings: dict[str, Any] = field(default_factory=dict)
    library: str | None = None

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """From a dictionary; names that are not known are left out, they may be a later version's.

        Raises:
            ValueError: if it is no dictionary, or a value has another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a provenance {values!r:.80}, expected a dictionary")
        known: dict[str, Any] = {}
        for name, kind in typing.get_type_hints(cls).items():
            expected = (dict,) if typing.get_origin(kind) is dict else typing.get_args(kind)
            if name in values:
                value = values[name]
                if not isinstance(value, (*expected, int) if float in expected else expected):
                    raise ValueError(f"its provenance has {name}={value!r:.80}")
                known[name] = value
        return cls(**known)


def completed(known: NoiseProvenance, **values: Any) -> NoiseProvenance:
    """``known`` of the model, with ``values`` of a noise, and this library's version."""
    return replace(known, library=f"hf_nullspace {__version__}", **values)


def model_hash(model: nn.Module, *, without: Sequence[str] = ()) -> str:
    """SHA-256 over names, dtypes and bytes of all parameters and buffers: equal weights, equal hash.

    ``without`` names modules with weights that do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        if any(name.startswith(f"{module}.") for module in without):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hub_commit(model: nn.Module, revision: str | None = None) -> str | None:
    """Commit of the Hub repository that ``model`` was loaded from, as the local cache knows it; None for a folder.

    transformers 5.23 does not keep it. ``revision`` is what was asked for; by default the main branch.
    """
    name = getattr(config_of(model), "_name_or_path", None)
    if not name or Path(name).exists():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # not the name of a repository
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def provenance_of(model: nn.Module, *, hashed: bool = True) -> NoiseProvenance:
    """Where ``model`` comes from: its name, its commit on the Hub, and the hash of its weights if ``hashed``."""
    config = config_of(model)
    return NoiseProvenance(
        base_model=getattr(config, "_name_or_path", None) or None,
        revision=getattr(config, "_commit_hash", None) or hub_commit(model),
        model_sha256=model_hash(model) if hashed else None,
    )


_hashes: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


def _hash_once(model: nn.Module) -> str:
    """:func:`model_hash`, computed again only when a tensor was replaced or changed in place."""
    model = unwrap(model)
    tensors = model.state_dict().values()
    state = [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors]
    if model not in _hashes or _hashes[model][0] != state:
        _hashes[model] = state, model_hash(model)
    return _hashes[model][1]


def warn_of_other_weights(provenance: NoiseProvenance, model: nn.Module) -> None:
    """Warn if the noise of ``provenance`` was learned on other weights than those of ``model``."""
    expected = provenance.model_sha256
    if expected is None or is_sharded(model):
        return
    found = _hash_once(model)
    if found == expected:
        return
    step = provenance.training_step
    when = "" if step is None else f" after {step} steps of a fine-tuning"
    name = getattr(config_of(model), "_name_or_path", None) or "this model"
    warnings.warn(
        f"the noise was learned on {provenance.base_model or 'a model'}{when} (weights {expected[:12]}), and {name} "
        f"has other weights ({found[:12]}): its influence there is unknown. Use the weights it was learned on, in the "
        "same dtype, or learn one for these: hf_nullspace.learn_noise",
        stacklevel=5,
    )
