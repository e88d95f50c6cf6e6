"""Every form in which timm and EasyRobust save weights is read; nothing that could run code is."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_nullspace.hub.checkpoint_files import CheckpointError, read_checkpoint
from timm_style import MEAN, STD, easyrobust, timm_weights, training_checkpoint

WEIGHTS, OTHER = timm_weights(seed=0), timm_weights(seed=1)


def saved(content, path):
    torch.save(content, path)
    return path


def prefixed(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def assert_weights(checkpoint, weights=WEIGHTS):
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(torch.equal(checkpoint.tensors[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("content", "name", "wrapped"),
    [
        (WEIGHTS, "the file's tensors", False),
        (OrderedDict(WEIGHTS), "the file's tensors", False),
        (prefixed(WEIGHTS, "module."), "the file's tensors", False),
        (prefixed(WEIGHTS, "module._orig_mod."), "the file's tensors", False),
        ({"model": WEIGHTS}, "model", False),
        (training_checkpoint(WEIGHTS), "state_dict", False),
        (training_checkpoint(prefixed(WEIGHTS, "module."), averaged=OTHER), "state_dict", False),
        (easyrobust(WEIGHTS), "the file's tensors", True),
        (training_checkpoint(easyrobust(WEIGHTS)), "state_dict", True),
        (training_checkpoint(easyrobust(WEIGHTS, prefix="module."), averaged=OTHER), "state_dict", True),
        ({"state_dict": easyrobust(prefixed(WEIGHTS, "module."))}, "state_dict", True),
        ({"state_dict": prefixed(WEIGHTS, "module.") | {"n_averaged": torch.tensor(3)}}, "state_dict", False),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_wrapper_is_taken_off(content, name, wrapped, legacy, tmp_path):
    torch.save(content, tmp_path / "model_best.pth.tar", _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(tmp_path / "model_best.pth.tar")
    assert_weights(checkpoint)
    assert checkpoint.name == name
    assert (checkpoint.mean, checkpoint.std) == ((MEAN, STD) if wrapped else (None, None))


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin", "renamed.pth"])
@pytest.mark.parametrize("shape", [None, (3,), (3, 1, 1), (1, 3, 1, 1)])
def test_safetensors_and_bin_with_a_normalization_of_any_shape(name, shape, tmp_path):
    """A safetensors file is known by its content, too."""
    content = WEIGHTS
    if shape:
        content = easyrobust(WEIGHTS)
        content |= {key: content[key].reshape(shape) for key in ("0.mean", "0.std")}
    torch.save(content, tmp_path / name) if name == "weights.bin" else save_file(content, tmp_path / name)
    checkpoint = read_checkpoint(tmp_path / name)
    assert_weights(checkpoint)
    assert (checkpoint.mean, checkpoint.std) == ((MEAN, STD) if shape else (None, None))


# ---- which weights


@pytest.mark.parametrize("entry", ["state_dict_ema", "model_ema"])
def test_averaged_weights_are_taken_when_asked_for_and_only_then(entry, tmp_path):
    content = training_checkpoint(WEIGHTS) | {entry: easyrobust(OTHER)}
    path = saved(content, tmp_path / "a.pth.tar")
    raw, averaged = read_checkpoint(path), read_checkpoint(path, averaged=True)
    assert_weights(raw)
    assert_weights(averaged, OTHER)
    assert (raw.name, raw.others, raw.mean) == ("state_dict", (entry,), None)
    assert (averaged.name, averaged.others, averaged.mean) == (entry, ("state_dict",), MEAN)


@pytest.mark.parametrize(
    ("content", "averaged", "message"),
    [
        (WEIGHTS, True, "a.pth has plain tensors, but no state_dict_ema or model_ema"),
        (training_checkpoint(WEIGHTS), True, "has state_dict, but no state_dict_ema or model_ema. Leave --ema"),
        ({"state_dict": None, "state_dict_ema": WEIGHTS}, False,
         "has state_dict_ema, but no state_dict or model. Take the"),
        ([1, 2], False, "holds list; expected a dictionary of tensors"),
        ({}, False, "holds dict without content"),
        ({"epoch": 3, "net": WEIGHTS}, False, "holds epoch, net; expected tensors, or one of state_dict, model"),
        ({"state_dict": {"cls_token": 3}}, False, "holds 'cls_token': int; expected names and tensors only"),
        (easyrobust(WEIGHTS) | {"2.weight": torch.ones(1)}, False, "beside a normalisation .* there is 2.weight"),
    ],
)  # fmt: skip
def test_files_that_hold_something_else(content, averaged, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(saved(content, tmp_path / "a.pth"), averaged=averaged)


# ---- nothing is run


class Malicious:
    """Unpickled without protection, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Insidious(argparse.Namespace):
    """A class that calls itself a Namespace, and is none."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "inside args", "as the file"])
def test_a_malicious_pickle_is_refused_and_not_run(place, legacy, tmp_path):
    victim = tmp_path / "made-by-the-pickle"
    harm = Malicious(victim)
    content = {
        "beside": training_checkpoint(WEIGHTS, metric=harm),
        "inside args": training_checkpoint(WEIGHTS, args=argparse.Namespace(model=harm)),
        "as the file": harm,
    }[place]
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"a.pth.tar needs more than tensors: .*mkdir.* was not read") as refused:
        read_checkpoint(tmp_path / "a.pth.tar")
    assert "weights_only" not in str(refused.value), "no line that would run it"
    assert "torch.load" not in str(refused.value)
    assert not victim.exists()
    if place == "as the file":  # the file is as dangerous as the test says
        torch.load(tmp_path / "a.pth.tar", weights_only=False)
        assert victim.exists()


def test_a_namespace_cannot_be_used_to_call_anything(tmp_path):
    """Pickle's BUILD on a Namespace fills its dictionary; names such as ``__setstate__`` in it stay data."""
    victim = tmp_path / "made-by-the-pickle"
    namespace = argparse.Namespace()
    namespace.__dict__ |= {"__setstate__": "os.mkdir", "__class__": str(victim), "__call__": [1]}
    path = saved(training_checkpoint(WEIGHTS, args=namespace), tmp_path / "a.pth")
    assert_weights(read_checkpoint(path))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("more", "name"),
    [({"args": Insidious(a=1)}, "Insidious"), ({"metric": np.float64(3.0)}, "multiarray.scalar"),
     ({"model": torch.nn.Linear(2, 2)}, "Linear")],
)  # fmt: skip
def test_other_classes_are_refused_by_name(more, name, tmp_path):
    path = saved(training_checkpoint(WEIGHTS, **more), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"needs more than tensors: .*{name}") as refused:
        read_checkpoint(path)
    assert "argparse.Namespace" not in str(refused.value)
    assert "its state dict alone" in str(refused.value)


def test_the_exception_for_namespaces_ends_with_the_reading(tmp_path):
    path = saved(training_checkpoint(WEIGHTS), tmp_path / "a.pth")
    read_checkpoint(path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_broken_files_are_said_to_be_broken(tmp_path):
    whole = saved(WEIGHTS, tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("<html>404 Not Found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 20)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as other:
        other.writestr("readme", "no checkpoint")
    for name in ("half.pth", "text.pth", "empty.pth", "zip.pth"):
        with pytest.raises(CheckpointError, match=f"{name} is no checkpoint that torch can read"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"short.safetensors is no whole safetensors file"):
        read_checkpoint(tmp_path / "short.safetensors")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pth")
