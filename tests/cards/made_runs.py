"""Run folders as the recipes leave them, with results that a test chooses; the JSON is the report's own."""

import json

import numpy as np

from hf_nullspace.robustness.report import write_report
from hf_nullspace.robustness.suite import ConditionResult

CONDITIONS = {
    "clean": {},
    "FGSM(eps=2/255)": {"space": "pixels in [0, 1]", "attack": "FGSM", "settings": {"eps": 2 / 255}},
    "generated fog 3": {"corruption": "fog", "severity": 3, "generated": "at the image's own size"},
}
CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "num_hidden_layers": 2,
    "patch_size": 8,
    "id2label": {"0": "a", "1": "b"},
}
SETTINGS = {
    "recipe": {"control": True, "fgsm": ["2/255"], "overwrite": False},
    "model": {"model_name_or_path": "ORG/base", "model_revision": None, "image_size": 32},
    "data": {
        "dataset_name": "uoft-cs/cifar10",
        "dataset_config": None,
        "dataset_revision": "abc123",
        "train_split": "train",
        "eval_split": "test",
        "crop_scale": 0.6,
        "horizontal_flip": True,
    },
    "training": {
        "objective": "nullspace",
        "output_dir": "outputs/mine",
        "rounds": 2,
        "steps_per_round": 5,
        "max_steps": 10,
        "global_batch_size": 8,
        "noise_batch_size": 4,
        "epsilon": 0.03,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "ema_decay": None,
        "bf16": False,
        "seed": 42,
    },
}
HISTORY = [
    {"round": 0, "noise_steps": 7, "stopped": "epsilon", "influence": 0.02, "centred_norm": 5.0, "seconds": 1.5},
    {"round": 1, "noise_steps": 11, "stopped": "rescaled", "influence": 0.03, "centred_norm": 6.0, "seconds": 2.5},
]


def answers(seed, share=0.7, n=400):
    """Which of ``n`` images are right, drawn."""
    return np.random.default_rng(seed).random(n) < share


def results(**correct_by_checkpoint):
    """Checkpoint -> a result per condition; ``correct_by_checkpoint`` has an array per condition, or one for all."""
    made = {}
    for name, correct in correct_by_checkpoint.items():
        rows = correct if isinstance(correct, dict) else dict.fromkeys(CONDITIONS, correct)
        made[name] = [
            ConditionResult(title, row, seconds=2.0, seed=42, protocol=CONDITIONS.get(title, {}))
            for title, row in rows.items()
        ]
    return made


def finetuned(folder, measured, settings=SETTINGS):
    """What ``recipes/finetune.py`` leaves, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    context = {"images": f"{settings['data']['dataset_name']}, split test, first 400", "settings": settings}
    write_report(measured, folder, context=context)
    for name, content in (("config", CONFIG), ("run", settings), ("nullspace_history", HISTORY)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
