"""A ViT or distilled DeiT of timm as ``ViTForImageClassification`` or ``DeiTForImageClassificationWithTeacher``.

The same function of the image, with its image processor. Sizes are read from the shapes; the number of heads is in no
shape. What transformers cannot express is refused by name, and no tensor of the file is left over in silence.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_nullspace.core.files import make_lasting, one_clear_error, write_json
from hf_nullspace.hub.checkpoint_files import Checkpoint, CheckpointError
from hf_nullspace.hub.timm_vit import Architecture
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.label_spaces import class_names, wnids

LAYER_NORM_EPS = 1e-6  # timm's for ViT and DeiT; transformers' default is 1e-12

# Means and standard deviations of pixels in [0, 1] that a person may name.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # DeiT, EasyRobust, torchvision
    "augreg": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # the ViTs of Google: augreg, in21k
}

_LAYER_PARTS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def to_transformers(tensors: Mapping[str, Tensor], kind: Architecture, labels: Sequence[str] | None = None) -> Any:
    """The transformers model with these weights, in float32 and evaluation mode; ``labels`` name the classes."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

    settings: dict[str, Any] = {
        "hidden_size": kind.width,
        "num_hidden_layers": kind.depth,
        "num_attention_heads": kind.heads,
        "intermediate_size": kind.mlp,
        "image_size": kind.image,
        "patch_size": kind.patch,
        "num_channels": kind.channels,
        "qkv_bias": kind.qkv_bias,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    if labels is None:
        settings["num_labels"] = kind.classes
    elif len(labels) != kind.classes:
        raise CheckpointError(
            f"{len(labels)} class names for a head of {kind.classes} classes; give as many as classes"
        )
    else:
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model_class: Any = DeiTForImageClassificationWithTeacher if kind.distilled else ViTForImageClassification
    config = (DeiTConfig if kind.distilled else ViTConfig)(**settings)
    with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
        model = model_class(config)
    weights = {key: value.to(torch.float32) for key, value in tensors.items()}
    model.load_state_dict(_renamed(weights, kind), strict=True, assign=True)
    return model.eval()


def normalization(
    checkpoint: Checkpoint, mean: Sequence[float] = (), std: Sequence[float] = (), name: str | None = None
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std) of pixels in [0, 1], and where they are from: the file, ``mean`` and ``std``, or a ``name``.

    The file's may be of pixels in [0, 255]: its standard deviations are then above 1.

    Raises:
        CheckpointError: if nobody says them, or the file says others.
    """
    if bool(mean) != bool(std) or (name and mean):
        raise CheckpointError("give --mean and --std, both, or else --normalization")
    if name is not None and name not in NORMALIZATIONS:
        raise CheckpointError(f"unknown normalization {name!r}; expected {' or '.join(NORMALIZATIONS)}")
    said: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    source = ""
    if name is not None:
        said, source = NORMALIZATIONS[name], f"normalization {name}"
    elif mean:
        said, source = _in_unit_range(mean, std, "--mean and --std")[:2], "--mean and --std"
    if checkpoint.mean is None or checkpoint.std is None:
        if said is None:
            raise CheckpointError(
                "the file does not say how images are normalised, and a guess would cost accuracy silently. Say it: "
                "--normalization imagenet (DeiT, EasyRobust), --normalization augreg (0.5), or --mean and --std"
            )
        return *said, source
    *found, unit = _in_unit_range(checkpoint.mean, checkpoint.std, "0.mean and 0.std of the file")
    if said is not None and not all(
        len(ours) == len(theirs) and all(abs(a - b) <= 1e-3 for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(found, said, strict=True)
    ):
        raise CheckpointError(
            f"the file normalises with mean {_numbers(found[0])} and std {_numbers(found[1])}, but {source} says "
            f"{_numbers(said[0])} and {_numbers(said[1])}. The file's belong to its weights: leave the option out"
        )
    return found[0], found[1], f"the file (0.mean, 0.std, for pixels in {unit})"


def timm_image_processor(size: int, mean: Sequence[float], std: Sequence[float], crop_pct: float) -> Any:
    """timm's preprocessing for evaluation: shorter edge to ``size / crop_pct``, bicubic, centre crop of ``size``.

    A ``ViTImageProcessor``, whose own default squashes instead. ``crop_pct`` is in (0, 1].
    """
    from transformers import ViTImageProcessorPil

    if not 0 < crop_pct <= 1:
        raise CheckpointError(f"crop_pct={crop_pct}: expected a share in (0, 1]")
    return ViTImageProcessorPil(
        size={"shortest_edge": math.floor(size / crop_pct)},
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        resample=Image.Resampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=len(mean) == 3,
    )


def read_labels(source: str | None) -> list[str] | None:
    """Class names in the order of the logits: "imagenet", or a file with a JSON list or id2label, or one per line."""
    if source is None:
        return None
    if source == "imagenet":
        return [class_names()[wnid] for wnid in wnids()]
    text = Path(source).read_text(encoding="utf-8")
    if not text.lstrip().startswith(("{", "[")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            names = content.get("id2label", content)
            content = [names[key] for key in map(str, range(len(names)))]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(
            f"{source}: {error!r}; expected a JSON list, or keys 0, 1, 2, ... without a gap"
        ) from error
    return [str(name) for name in content]


def check_together(model: Any, image_processor: Any) -> Preprocessing:
    """Raise ``ValueError`` unless what the processor makes goes into the model; what it does to an image, if so."""
    preprocessing = Preprocessing.from_processor(image_processor)
    preprocessing.check_fits(model.config)
    return preprocessing


def save_converted(model: Any, image_processor: Any, record: Mapping[str, Any], folder: Path | str) -> Path:
    """Model, image processor and ``conversion.json`` as a new folder, whole or not there at all.

    Raises:
        OSError: if ``folder`` is there and not empty, or cannot be written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        one_clear_error(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part") as name,
    ):
        whole = Path(name) / "whole"  # with the permissions of a folder that mkdir makes
        model.save_pretrained(whole)
        image_processor.save_pretrained(whole)
        write_json(whole / "conversion.json", dict(record))
        make_lasting(whole)
        whole.replace(folder)
    return folder


def sha256(path: Path | str) -> str:
    """The file's hash, so that a folder can name what it was made of."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _renamed(weights: Mapping[str, Tensor], kind: Architecture) -> dict[str, Tensor]:
    """timm's names to those of transformers from 5.12 on, q, k and v apart; every tensor has memory of its own."""
    base = "deit" if kind.distilled else "vit"
    names = {
        "cls_token": f"{base}.embeddings.cls_token",
        "dist_token": f"{base}.embeddings.distillation_token",
        "pos_embed": f"{base}.embeddings.position_embeddings",
        "patch_embed.proj": f"{base}.embeddings.patch_embeddings.projection",
        "norm": f"{base}.layernorm",
        "head": "cls_classifier" if kind.distilled else "classifier",
        "head_dist": "distillation_classifier",
    }
    names |= {
        f"blocks.{layer}.{part}": f"{base}.layers.{layer}.{ours}"
        for layer in range(kind.depth)
        for part, ours in _LAYER_PARTS.items()
    }
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, _, leaf = key.rpartition(".")
        if module.endswith(".attn.qkv"):
            layer = module.split(".")[1]
            for part, piece in zip("qkv", value.chunk(3), strict=True):  # rows: all of q, then all of k, all of v
                found[f"{base}.layers.{layer}.attention.{part}_proj.{leaf}"] = piece.clone()
        else:
            found[names[key] if key in names else f"{names[module]}.{leaf}"] = value.clone()
    return found


def _in_unit_range(
    mean: Sequence[float], std: Sequence[float], what: str
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std) of pixels in [0, 1], and the range of pixels they were for."""
    if len(mean) == len(std) and len(mean) in (1, 3) and all(math.isfinite(x) for x in (*mean, *std)) and min(std) > 0:
        for top in (1, 255):
            if max(std) <= top and (top == 1 or min(std) > 1) and min(mean) >= 0 and max(mean) <= top:
                return tuple(x / top for x in mean), tuple(x / top for x in std), f"[0, {top}]"
    raise CheckpointError(
        f"{what}: mean {_numbers(mean)}, std {_numbers(std)}; expected 1 or 3 values each, for pixels in [0, 1] (std "
        "up to 1) or in [0, 255] (std above 1)"
    )


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
