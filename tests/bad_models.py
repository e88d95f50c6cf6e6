"""Checkpoint folders with one thing wrong each, made from a tiny classifier; nothing is downloaded."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from hf_nullspace.models.preprocessing import make_image_processor
from tiny_models import tiny_model, tiny_resnet


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (Path(self.mark), "it ran")


def save_good(folder, model=None):
    """A folder that loads, with its image processor."""
    (model or tiny_model()).save_pretrained(folder)
    make_image_processor(16).save_pretrained(folder)
    return folder


def _config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _weights(folder, keep):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if keep(name)}, path, metadata={"format": "pt"})


def _truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.weight": Hostile(folder / "ran")}, folder / "pytorch_model.bin")


def _plain_bin(folder):
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _bert(folder):
    BertConfig(hidden_size=24, num_attention_heads=2).save_pretrained(folder)


CODE = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
DAMAGES = {
    "truncated": (_truncated, "SafetensorError"),
    "empty_weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "lost_tensor": (
        lambda folder: _weights(folder, lambda name: "position_embeddings" not in name),
        "1 of its weights are missing, such as vit.embeddings.position_embeddings",
    ),
    "no_head": (
        lambda folder: _weights(folder, lambda name: "classifier" not in name),
        "it has no weights for its head (classifier.bias)",
    ),
    "other_shape": (lambda folder: _config(folder, hidden_size=32), "its config.json asks for"),
    "other_labels": (
        lambda folder: _config(folder, id2label={"0": "a", "1": "b"}),
        "classifier.bias has the shape (5,), and its config.json asks for (2,)",
    ),
    "no_config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "broken_config": (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not a valid JSON file"),
    "list_config": (lambda folder: (folder / "config.json").write_text("[]"), "Unrecognized model"),
    "unknown_type": (
        lambda folder: _config(folder, model_type="vitamin"),
        "has model type `vitamin` but Transformers does not recognize this architecture",
    ),
    "own_code": (lambda folder: _config(folder, model_type="vitamin", auto_map=CODE), "no code of a checkpoint is run"),
    "text_model": (_bert, "it is no image classifier"),
    "pickled": (_pickled, "nothing in a pickle is run"),
    "plain_bin": (_plain_bin, None),
    "no_processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    "broken_processor": (
        lambda folder: (folder / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json' is not a valid JSON file",
    ),
    "other_size": (lambda folder: make_image_processor(32).save_pretrained(folder), None),
}
"""Name -> what is done, and words of the error: "plain_bin" loads, "other_size" loads and does not fit."""


def save_bad_models(root):
    """``root/NAME`` for every damage, and ``root/resnet``, which is no ViT; returns ``root``."""
    for name, (damage, _) in DAMAGES.items():
        folder = save_good(root / name)
        if name == "text_model":
            shutil.rmtree(folder)
            folder.mkdir()
        damage(folder)
    save_good(root / "resnet", tiny_resnet())
    return root
