"""A ViT or distilled DeiT of timm as ``ViTForImageClassification`` or ``DeiTForImageClassificationWithTeacher``.

The same function of the image, with its image processor. Sizes are read from the shapes; the number of heads is in no
shape. What transformers cannot express is refused by name, and no tensor of the file is left over in silence.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_nullspace.core.files import make_lasting, one_clear_error, write_json
from hf_nullspace.hub.checkpoint_files import Checkpoint, CheckpointError
from hf_nullspace.hub.timm_vit import Architecture
from hf_nullspace.robustness.label_spaces import class_names, wnids

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation
LAYER_NORM_EPS = 1e-6  # timm's for ViT and DeiT; transformers' default is 1e-12

# Means and standard deviations of pixels in [0, 1] that a person may name.
NORMALIZATIONS: dict[str, Normalization] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # DeiT, EasyRobust, torchvision
    "augreg": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # the ViTs of Google: augreg, in21k
}

# The modules of a layer: timm's names, and those of transformers from 5.12 on.
_LAYER = {
    "norm1": ["layernorm_before"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],  # rows: all of q, all of k, all of v
    "attn.proj": ["attention.o_proj"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}


def to_transformers(tensors: Mapping[str, Tensor], kind: Architecture, labels: Sequence[str] | None = None) -> Any:
    """The transformers model with these weights, in float32 and evaluation mode; ``labels`` name the classes.

    Raises:
        CheckpointError: for tensors that are missing, too many, of a wrong shape or no finite numbers.
    """
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

    names = [f"LABEL_{index}" for index in range(kind.classes)] if labels is None else labels
    if len(names) != kind.classes:
        raise CheckpointError(f"{len(names)} class names for a head of {kind.classes} classes; give as many as classes")
    config_class: Any = DeiTConfig if kind.distilled else ViTConfig
    model_class: Any = DeiTForImageClassificationWithTeacher if kind.distilled else ViTForImageClassification
    config = config_class(
        hidden_size=kind.width,
        num_hidden_layers=kind.depth,
        num_attention_heads=kind.heads,
        intermediate_size=kind.mlp,
        image_size=kind.image,
        patch_size=kind.patch,
        num_channels=kind.channels,
        qkv_bias=kind.qkv_bias,
        hidden_act="gelu",
        layer_norm_eps=LAYER_NORM_EPS,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
        model = model_class(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    places = {key: ours for key, ours in _names(kind).items() if ours[0] in shapes}
    _check(tensors, {key: (len(ours) * shapes[ours[0]][0], *shapes[ours[0]][1:]) for key, ours in places.items()})
    weights: dict[str, Tensor] = {}
    for key, ours in places.items():
        for name, piece in zip(ours, tensors[key].to(torch.float32).chunk(len(ours)), strict=True):
            weights[name] = piece.clone()  # memory of its own
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _names(kind: Architecture) -> dict[str, list[str]]:
    """timm's name of every tensor -> transformers' names of it, or of its equal parts."""
    base = "deit" if kind.distilled else "vit"
    embeddings = f"{base}.embeddings"
    found = {
        "cls_token": [f"{embeddings}.cls_token"],
        "pos_embed": [f"{embeddings}.position_embeddings"],
        "dist_token": [f"{embeddings}.distillation_token"],
    }
    modules = {
        "patch_embed.proj": [f"{embeddings}.patch_embeddings.projection"],
        "norm": [f"{base}.layernorm"],
        "head": ["cls_classifier" if kind.distilled else "classifier"],
        "head_dist": ["distillation_classifier"],
    }
    for layer in range(kind.depth):
        for part, ours in _LAYER.items():
            modules[f"blocks.{layer}.{part}"] = [f"{base}.layers.{layer}.{name}" for name in ours]
    for module, ours in modules.items():
        for leaf in ("weight", "bias"):
            found[f"{module}.{leaf}"] = [f"{name}.{leaf}" for name in ours]
    return found


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{key} is missing, expected {shape}" for key, shape in expected.items() if key not in tensors]
    for key, value in tensors.items():
        if key not in expected:
            problems.append(f"{key} {tuple(value.shape)} is not known")
        elif tuple(value.shape) != expected[key]:
            problems.append(f"{key} has the shape {tuple(value.shape)}, expected {expected[key]}")
        elif not value.is_floating_point():
            problems.append(f"{key} holds {value.dtype}, expected floating-point numbers")
        elif not value.isfinite().all():
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"not converted: {'; '.join(problems[:6])}{more}")


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
    given, source = None, ""
    if name is not None:
        given, source = NORMALIZATIONS[name], f"normalization {name}"
    elif mean:
        given, source = _in_unit_range(mean, std, "--mean and --std")[0], "--mean and --std"
    if checkpoint.mean is not None and checkpoint.std is not None:
        found, unit = _in_unit_range(checkpoint.mean, checkpoint.std, "0.mean and 0.std of the file")
        if given and (np.shape(found) != np.shape(given) or not np.allclose(found, given, rtol=0, atol=1e-3)):
            raise CheckpointError(
                f"the file normalises with mean {_numbers(found[0])} and std {_numbers(found[1])}, but {source} says "
                f"{_numbers(given[0])} and {_numbers(given[1])}. The file's belong to its weights: leave the option out"
            )
        return *found, f"the file (0.mean, 0.std, for pixels in {unit})"
    if given is None:
        raise CheckpointError(
            "the file does not say how images are normalised, and a guess would cost accuracy silently. Say it: "
            "--normalization imagenet (DeiT, EasyRobust), --normalization augreg (0.5), or --mean and --std"
        )
    return *given, source


def _in_unit_range(mean: Sequence[float], std: Sequence[float], what: str) -> tuple[Normalization, str]:
    """(mean, std) of pixels in [0, 1], and the range of pixels they were for."""
    if len(mean) == len(std) and len(mean) in (1, 3) and np.isfinite([*mean, *std]).all():
        top = 255 if min(std) > 1 else 1
        if 0 < min(std) <= max(std) <= top and 0 <= min(mean) <= max(mean) <= top:
            return (tuple(x / top for x in mean), tuple(x / top for x in std)), f"[0, {top}]"
    raise CheckpointError(
        f"{what}: mean {_numbers(mean)}, std {_numbers(std)}; expected 1 or 3 values each, for pixels in [0, 1] (std "
        "up to 1) or in [0, 255] (std above 1)"
    )


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def timm_image_processor(size: int, mean: Sequence[float], std: Sequence[float], crop_pct: float) -> Any:
    """timm's preprocessing for evaluation: shorter edge to ``size / crop_pct``, bicubic, centre crop of ``size``.

    A ``ViTImageProcessor``; without these settings it would squash the image. ``crop_pct`` is in (0, 1].
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
