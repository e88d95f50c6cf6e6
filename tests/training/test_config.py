"""NullspaceConfig: the paper's table, settings that contradict each other, and the ways a config travels."""

import dataclasses
import pickle

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.boundary import BoundarySettings
from hf_nullspace.training.config import NullspaceConfig
from tiny_training import config

# Written from design/method.md, section 4 (the paper's appendix A.3), not from the code.
PAPER = {
    "rounds": 20,  # K
    "noise_limit": 3.0,  # A
    "noise_learning_rate": 0.1,
    "epsilon": 0.03,
    "noise_max_steps": 3000,  # T
    "steps_per_round": 40,  # S
    "learning_rate": 1e-5,
    "global_batch_size": 128,  # B
    "noise_batch_size": 128,
    "weight_decay": 0.01,
    "noise_weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "noise_stop_on": "minibatch",
    "noise_on_limit": "use",
    "noise_loss": "l2",
    "max_steps": 800,
    "label_smoothing_factor": 0.0,
    "objective": "nullspace",
    "ema_decay": None,
}


def make(tmp_path, **given):
    return NullspaceConfig(**{"output_dir": str(tmp_path), "use_cpu": True} | given)


def test_paper_preset_is_the_papers_table(tmp_path):
    args = make(tmp_path, preset="paper")
    assert {name: getattr(args, name) for name in PAPER} == PAPER
    assert args.optim in ("adamw_torch", "adamw_torch_fused")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size == 128
    assert args.max_steps * args.global_batch_size == 102_400


def differences(one, other):
    names = (item.name for item in dataclasses.fields(NullspaceConfig))
    return {n: (getattr(one, n), getattr(other, n)) for n in names if getattr(one, n) != getattr(other, n)}


def test_descent_preset_differs_where_epsilon_would_be_untrue(tmp_path):
    assert differences(make(tmp_path, preset="paper"), make(tmp_path, preset="descent")) == {
        "preset": ("paper", "descent"),
        "noise_weight_decay": (0.01, 0.0),
        "noise_stop_on": ("minibatch", "held_out"),
        "noise_on_limit": ("use", "rescale"),
    }


def test_default_preset_is_the_cheap_learner_and_trains_as_the_others_do(tmp_path):
    default = make(tmp_path)
    assert differences(default, make(tmp_path, preset="boundary")) == {}
    changed = differences(default, make(tmp_path, preset="descent"))
    assert all(name == "preset" or name.startswith("noise") for name in changed)
    settings = default.noise_settings()
    assert isinstance(settings, BoundarySettings)
    assert settings.epsilon == 0.03
    noise_steps = settings.steps * default.noise_batch_size * 2 + settings.pool_images
    assert noise_steps < 0.75 * default.steps_per_round * default.global_batch_size * 6, "cheaper than the fine-tuning"
    assert isinstance(default.descent_settings(), NoiseSettings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.1),
        ("learning_rate", 3e-4),
        ("weight_decay", 0.0),
        ("warmup_steps", 5),
        ("max_grad_norm", 1.0),
        ("lr_scheduler_type", "linear"),
        ("noise_weight_decay", 0.0),
        ("noise_stop_on", "held_out"),
    ],
)
def test_explicit_values_win(tmp_path, name, value):
    args = make(tmp_path, preset="paper", **{name: value})
    assert getattr(args, name) == value
    assert {key: getattr(args, key) for key in PAPER if key != name} == {k: v for k, v in PAPER.items() if k != name}


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"rounds": 3}, (3, 40, 120)),
        ({"steps_per_round": 5}, (20, 5, 100)),
        ({"rounds": 3, "steps_per_round": 5}, (3, 5, 15)),
        ({"max_steps": 120}, (3, 40, 120)),
        ({"max_steps": 15, "rounds": 3}, (3, 5, 15)),
        ({"max_steps": 15, "steps_per_round": 5}, (3, 5, 15)),
        ({"max_steps": -1}, (20, 40, 800)),
        ({"max_steps": 15, "steps_per_round": 5, "rounds": 3, "num_train_epochs": 2}, (3, 5, 15)),
    ],
)
def test_rounds_steps_and_max_steps_agree(tmp_path, given, length):
    args = make(tmp_path, **given)
    assert (args.rounds, args.steps_per_round, args.max_steps) == length


def test_batch_size_and_global_batch_size(tmp_path):
    args = make(tmp_path, global_batch_size=24, gradient_accumulation_steps=3)
    assert args.per_device_train_batch_size == 8
    args = make(tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    assert args.global_batch_size == 10


@pytest.mark.parametrize("below", ["", "/runs/1"])
def test_output_under_a_file_is_one_clear_error(tmp_path, below):
    (tmp_path / "notes.txt").write_text("not a folder")
    with pytest.raises(NotADirectoryError, match=r"output_dir=.*notes.txt.*: .*notes.txt is a file; choose a folder"):
        NullspaceConfig(output_dir=f"{tmp_path}/notes.txt{below}")
    assert (tmp_path / "notes.txt").read_text() == "not a folder"


def test_every_field_of_ours_has_help():
    inherited = {item.name: item.metadata.get("help") for item in dataclasses.fields(TrainingArguments)}
    ours = [item for item in dataclasses.fields(NullspaceConfig) if item.name in NullspaceConfig.__annotations__]
    assert len(ours) > 20
    for item in ours:
        text = item.metadata.get("help") or ""
        assert len(text) > 20, f"{item.name} has no help"
        assert text.endswith("."), item.name
        assert text != inherited.get(item.name)
    assert "--noise_max_steps" in HfArgumentParser(NullspaceConfig).format_help()


def test_command_line_round_trip(tmp_path):
    line = "--preset paper --rounds 3 --epsilon 0.1 --learning_rate 1e-4 --use_cpu --lr_scheduler_type linear"
    (args,) = HfArgumentParser(NullspaceConfig).parse_args_into_dataclasses(
        [*line.split(), "--output_dir", str(tmp_path)]
    )
    assert (args.rounds, args.steps_per_round, args.max_steps) == (3, 40, 120)
    assert (args.epsilon, args.learning_rate, args.noise_weight_decay) == (0.1, 1e-4, 0.01)
    assert args.lr_scheduler_type == "linear"
    (again,) = HfArgumentParser(NullspaceConfig).parse_dict(
        {name: value for name, value in args.to_dict().items() if value is not None}, allow_extra_keys=True
    )
    assert again.to_dict() == args.to_dict()


def test_replace(tmp_path):
    args = config(tmp_path)
    other = dataclasses.replace(args, epsilon=0.5, learning_rate=0.25)
    assert (other.epsilon, other.learning_rate) == (0.5, 0.25)
    changed = {"epsilon", "learning_rate"}
    assert {k: v for k, v in other.to_dict().items() if k not in changed} == {
        k: v for k, v in args.to_dict().items() if k not in changed
    }
    with pytest.raises(ValueError, match="max_steps=4 is not rounds=5"):
        dataclasses.replace(args, rounds=5)
    assert dataclasses.replace(args, rounds=5, max_steps=None, num_train_epochs=None).max_steps == 10


def test_it_shows_no_token(tmp_path):
    args = config(tmp_path, hub_token="hf_secret")
    assert args.hub_token == "hf_secret"
    shown = [f"{args!r}", f"{args}", args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())]
    assert not [text for text in shown if "hf_secret" in text]
    assert all("epsilon" in text for text in shown)


def test_it_travels_as_training_args_bin(tmp_path):
    args = config(tmp_path, ema_decay=0.9)
    torch.save(args, tmp_path / "training_args.bin")
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert isinstance(again, NullspaceConfig)
    assert again.to_dict() == args.to_dict() == pickle.loads(pickle.dumps(args)).to_dict()
    assert again.noise_settings() == args.noise_settings()
    assert '"noise_max_steps": 4' in args.to_json_string()
