"""Read a checkpoint of timm or EasyRobust: find its weights, take its wrappers off, and never run what is inside.

``.pth``, ``.pth.tar``, ``.bin`` are pickles and go through torch's weights-only reader, which knows tensors and plain
containers. Training checkpoints of timm also hold ``args``, an ``argparse.Namespace``. That one class is allowed:
reading one only fills a dictionary with values that the reader has let through, and nothing here looks into it.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = ("state_dict", "model")
AVERAGED = ("state_dict_ema", "model_ema")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DDP, torch.compile, a wrapper with one part
NORMALIZATION = ("0.mean", "0.std")  # nn.Sequential(normalisation, model); the model's keys begin with "1."
_COUNTER = re.compile(rf"({'|'.join(map(re.escape, PREFIXES))})*n_averaged")  # of AveragedModel; no weight


class CheckpointError(ValueError):
    """A checkpoint file that cannot be converted; the message says what came and what to do."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of one model under timm's names, and the normalisation that was wrapped around it."""

    tensors: dict[str, Tensor]
    name: str
    """Which weights of the file: an entry such as "state_dict_ema", or "the file's tensors"."""
    others: tuple[str, ...] = ()
    """Entries with weights that were left in the file."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """As the file has them, in its own units; one value per channel."""


def read_checkpoint(path: Path | str, averaged: bool = False) -> Checkpoint:
    """The weights in a file; ``averaged`` takes the exponential moving average (``state_dict_ema``, ``model_ema``).

    Raises:
        CheckpointError: if the file is none, holds more than weights, or not the ones that are asked for.
        OSError: if it cannot be opened.
    """
    path = Path(path)
    found, name, others = _choose(_load(path), averaged, path.name)
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path.name}: {name} holds {key!r}: {type(value).__name__}; expected names and tensors only. "
                "Save the state dict of the model alone"
            )
    tensors = {key: value for key, value in found.items() if not _COUNTER.fullmatch(key)}
    mean = std = None
    while tensors:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if all(key in tensors for key in NORMALIZATION):
            mean, std = (_values(tensors.pop(key)) for key in NORMALIZATION)
            prefix = "1."
            if beside := [key for key in tensors if not key.startswith(prefix)]:
                raise CheckpointError(
                    f"{path.name}: beside a normalisation (0.mean, 0.std) and a model (1.) there is {beside[0]}; "
                    "expected nn.Sequential(normalisation, model)"
                )
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return Checkpoint(tensors, name, others, mean, std)


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        beginning = file.read(9)
    if path.suffix == ".safetensors" or beginning[8:] == b"{":  # a pickle or zip has its opcodes there
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is no whole safetensors file ({error}); download it again") from error
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken or hostile pickle provokes
            # The reader's own error, without what torch.load wraps around it: the advice to switch the protection off.
            inner = error.__context__ or error
            reason = f"{type(inner).__name__} {' '.join(str(inner).split())[:200]}".strip()
            if needed := _needs_more(path, reason):
                raise CheckpointError(
                    f"{path.name} needs more than tensors: {needed}. Reading that could run code that is in the file, "
                    "so it was not read. Expected tensors only: ask whoever made it for its state dict alone, as "
                    ".safetensors"
                ) from error
            raise CheckpointError(
                f"{path.name} is no checkpoint that torch can read ({reason}); expected .safetensors, or a "
                "file written by torch.save (.pth, .pth.tar, .bin). It may have been downloaded in part"
            ) from error


def _needs_more(path: Path, reason: str) -> str:
    """The classes and functions that a pickle asks for and that are not allowed; empty if it is broken otherwise."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip of torch.save: an older format, or not a checkpoint at all
        names = []
    return ", ".join(sorted(names or re.findall(r"GLOBAL (\S+)", reason)[:1]))


def _choose(content: Any, averaged: bool, file: str) -> tuple[dict[Any, Any], str, tuple[str, ...]]:
    """(weights, their name, names of the other weights in the file)."""
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{file} holds {type(content).__name__}{'' if content else ' without content'}; expected a dictionary of "
            "tensors, or one with 'state_dict' or 'model'. Save model.state_dict()"
        )
    there = [name for name in (*WEIGHTS, *AVERAGED) if isinstance(content.get(name), dict) and content[name]]
    wanted = [name for name in there if (name in AVERAGED) == averaged]
    if wanted:
        return content[wanted[0]], wanted[0], tuple(name for name in there if name != wanted[0])
    if averaged or there:
        raise CheckpointError(
            f"{file} has {', '.join(there) or 'plain tensors'}, but no {' or '.join(AVERAGED if averaged else WEIGHTS)}"
            f". {'Leave --ema out' if averaged else 'Take the averaged weights: --ema'}"
        )
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{file} holds {', '.join(map(str, list(content)[:8]))}; expected tensors, or one of "
            f"{', '.join((*WEIGHTS, *AVERAGED))}"
        )
    return content, "the file's tensors", ()


def _values(tensor: Tensor) -> tuple[float, ...]:
    """One number per channel, 0.485 and not the 0.48500001430511475 that float32 makes of it."""
    return tuple(float(str(value)) for value in tensor.detach().float().flatten().numpy())
