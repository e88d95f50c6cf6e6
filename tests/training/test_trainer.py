"""NullspaceTrainer against a plain loop that shares none of its code, and what one batch and one round are."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, set_seed
from transformers.trainer_pt_utils import LabelSmoother

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.training.noise_stream import noise_stream
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import tiny_model
from tiny_training import (
    Images,
    Recorder,
    RoundRecorder,
    accuracy,
    assert_differs,
    assert_same,
    config,
    labelled,
    logged,
    parameters_of,
    plain_arguments,
    train_batches,
    trained,
)
from written_out import algorithm_1, fine_tuned, logits_of


def test_it_is_algorithm_1(tmp_path):
    """Two rounds of two steps: the same noises and the same parameters as a loop without Trainer and hook."""
    args = config(tmp_path, preset="paper", max_grad_norm=0.0, epsilon=1e-3, noise_max_steps=5)
    settings = NoiseSettings(epsilon=1e-3, max_steps=5, weight_decay=0.01)  # A = 3 and a rate of 0.1 by default
    data, ours, noises = Images(dtype=torch.float64), tiny_model().double(), []
    recorder = Recorder(ours)
    trainer = NullspaceTrainer(ours, args, train_dataset=data)
    trainer.train()

    def loss(vit, x, y, step):
        if step % 2 == 0:
            round_ = step // 2
            known = {"batch_size": 8, "held_out_images": 8, "seed": args.seed, "round": round_}
            stream = noise_stream(data, trainer.data_collator, **known)[1]
            noises.append(algorithm_1(vit, stream, derive_seed(args.seed, round_), settings)[0][-1])
        return cross_entropy(logits_of(vit, x), y) + cross_entropy(logits_of(vit, x, noises[-1]), y)

    theirs, losses = fine_tuned(labelled(train_batches(recorder), data), loss)
    torch.testing.assert_close(trainer.noise.tensor, noises[-1], rtol=1e-9, atol=1e-9)
    # atol: the biases of the keys have no gradient but rounding
    assert_same(parameters_of(ours), parameters_of(theirs), rtol=1e-9, atol=1e-9)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)  # the Trainer adds up in float32


def test_accumulation_is_one_larger_batch(tmp_path):
    whole = trained(tmp_path / "whole", per_device_train_batch_size=8)
    model = tiny_model().double()
    parts = trained(tmp_path / "parts", model, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert parts.args.global_batch_size == whole.args.global_batch_size == 8
    torch.testing.assert_close(parts.noise.tensor, whole.noise.tensor, rtol=1e-6, atol=1e-9)
    assert_same(parameters_of(parts.model), parameters_of(whole.model), rtol=1e-6, atol=1e-9)
    assert_differs(parameters_of(whole.model), parameters_of(tiny_model().double()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_noise_is_learned_at_every_s_th_step(tmp_path, accumulation):
    given = {"rounds": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    trainer = trained(tmp_path, callbacks=[steps := RoundRecorder()], **given)
    assert steps.rounds == [(0, 0), (2, 1), (4, 2)]
    assert [entry["step"] for entry in trainer.history] == [0, 2, 4]
    assert trainer.state.global_step == 6


def test_training_order_does_not_depend_on_noise_steps(tmp_path):
    seen = []
    for steps in (1, 7):
        model = tiny_model().double()
        recorder = Recorder(model)
        trainer = trained(tmp_path / str(steps), model, noise_max_steps=steps, epsilon=1e-9)
        assert [entry["noise_steps"] for entry in trainer.history] == [steps, steps]
        seen.append(train_batches(recorder))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert len({image.sum().item() for batch in seen[0] for image in batch}) == 32, "no image twice within the epoch"


def test_the_second_view_gets_the_noise(tmp_path):
    """The loss is that of the clean view plus that of the noisy one, and they differ."""
    trainer = trained(tmp_path)
    data = Images(dtype=torch.float64)
    inputs = {"pixel_values": data.pixel_values[:8], "labels": data.labels[:8]}
    trainer.model.train()
    both, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
    z = logits_of(trainer.model, inputs["pixel_values"])
    z_noisy = logits_of(trainer.model, inputs["pixel_values"], trainer.noise.tensor)
    clean, noisy = cross_entropy(z, inputs["labels"]), cross_entropy(z_noisy, inputs["labels"])
    assert both.item() == pytest.approx((clean + noisy).item(), rel=1e-12)
    assert abs(clean.item() - noisy.item()) > 1e-4
    torch.testing.assert_close(outputs.logits, z)


def test_label_smoothing_is_that_of_transformers(tmp_path):
    trainer = NullspaceTrainer(
        tiny_model().double(), config(tmp_path, label_smoothing_factor=0.3), train_dataset=Images()
    )
    inputs = {"pixel_values": Images(dtype=torch.float64).pixel_values[:8], "labels": Images().labels[:8]}
    inputs["labels"][3] = -100
    trainer.model.train()
    logits = logits_of(trainer.model, inputs["pixel_values"])
    expected = 2 * LabelSmoother(epsilon=0.3)({"logits": logits}, inputs["labels"])
    assert trainer.compute_loss(trainer.model, dict(inputs)).item() == pytest.approx(expected.item(), rel=1e-7)
    seven = torch.tensor(7)
    counted = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=seven)
    assert counted.item() == pytest.approx(expected.item(), rel=1e-7)
    assert abs(expected.item() - 2 * cross_entropy(logits, inputs["labels"]).item()) > 1e-2


def test_compute_loss_func_is_asked_for_each_view(tmp_path):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append((len(outputs.logits), int(num_items_in_batch)))
        return 3 * cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    tripled = trained(tmp_path / "tripled", compute_loss_func=loss, max_grad_norm=0.0)
    assert calls == [(8, 8)] * 8
    plain = trained(tmp_path / "plain")
    assert logged(tripled, "loss")[0] == pytest.approx(3 * logged(plain, "loss")[0], rel=1e-6)


def test_plain_objective_is_the_trainer_with_twice_the_loss(tmp_path):
    data = Images(dtype=torch.float64)
    ours = trained(tmp_path / "ours", objective="plain", data=data, callbacks=[steps := RoundRecorder()])
    assert ours.noise is None
    assert steps.rounds == []
    assert not (tmp_path / "ours" / "noises").exists()

    class Twice(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, False, num_items_in_batch)

    theirs = tiny_model().double()
    settings = {"lr_scheduler_type": "cosine", "learning_rate": 1e-2, "max_grad_norm": 0.0, "weight_decay": 0.01}
    Twice(theirs, plain_arguments(tmp_path / "theirs", save_strategy="no", **settings), train_dataset=data).train()
    assert_same(parameters_of(ours.model), parameters_of(theirs), rtol=1e-9, atol=1e-9)


def test_evaluation_and_prediction_are_the_trainers(tmp_path):
    trainer = trained(tmp_path / "ours", tiny_model(), Images())
    trainer.compute_metrics = accuracy
    plain = Trainer(tiny_model(), plain_arguments(tmp_path / "theirs"), compute_metrics=accuracy)
    plain.model.load_state_dict(trainer.model.state_dict())
    held_out = Images(count=21, seed=5)
    ours, theirs = trainer.evaluate(held_out), plain.evaluate(held_out)
    assert ours["eval_loss"] == theirs["eval_loss"]
    assert ours["eval_accuracy"] == theirs["eval_accuracy"]
    ours, theirs = trainer.predict(held_out), plain.predict(held_out)
    assert (ours.predictions == theirs.predictions).all()
    assert (ours.label_ids == theirs.label_ids).all()
    with trainer._hook.adding(trainer.noise.tensor):
        assert (trainer.predict(held_out).predictions != theirs.predictions).any(), "a noise would have been seen"


def test_evaluation_in_between_does_not_change_training(tmp_path):
    never = trained(tmp_path / "never", tiny_model(), Images(jitter=0.3))
    evaluated = {"eval_dataset": Images(count=9, seed=3), "compute_metrics": accuracy}
    evaluated |= {"eval_strategy": "steps", "eval_steps": 1}
    often = trained(tmp_path / "often", tiny_model(), Images(jitter=0.3), **evaluated)
    assert len(logged(often, "eval_accuracy")) == 4
    assert_same(parameters_of(often.model), parameters_of(never.model))
    assert torch.equal(often.noise.tensor, never.noise.tensor)


def test_a_data_set_that_draws_from_the_global_generator(tmp_path):
    """The noise is the same whatever was drawn before, and what is drawn after is as if no noise had been learned."""

    class Drawing(Images):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return row | {"pixel_values": row["pixel_values"] + 0.1 * torch.randn(3, 16, 16)}

    trainer = NullspaceTrainer(tiny_model(), config(tmp_path), train_dataset=Drawing())
    noises, after = [], []
    for steps in (2, 5):
        trainer.args.noise_max_steps = steps
        for seed in (11, 12):
            set_seed(seed)
            trainer._begin_round(trainer.model, 0)
            noises.append(trainer.noise.tensor)
            after.append(torch.rand(()).item())
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[2], noises[3])
    assert not torch.equal(noises[0], noises[2])
    assert after[0] == after[2]
    assert after[1] == after[3]
    assert after[0] != after[1]


def nan_gradient(outputs, labels, num_items_in_batch=None):
    """A loss that is finite and has no finite gradient."""
    return cross_entropy(outputs.logits, labels) + (0 * outputs.logits.sum()).sqrt()


class OneNaN(Images):
    """Images with a pixel that is NaN."""

    def __init__(self):
        super().__init__(dtype=torch.float64)
        self.pixel_values[:, 0, 0, 0] = math.nan


NAN_GRADIENT = {"rounds": 1, "steps_per_round": 1, "objective": "plain", "compute_loss_func": nan_gradient}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": OneNaN, "objective": "plain"}, "optimizer step 0: the loss is nan: pixel_values of the batch has"),
        ({"data": OneNaN}, "round 0, after 0 optimizer steps: logits without noise on held-out .*the images"),
        ({"learning_rate": 1e200, "objective": "plain"}, "optimizer step 1: the loss is nan: the model's logits are"),
        ({"learning_rate": 1e200}, "optimizer step 1: the loss is nan: the model's logits are NaN"),
        ({"learning_rate": 1e200, "rounds": 4, "steps_per_round": 1}, "round 1, after 1 optimizer steps: .*the clean"),
        ({"learning_rate": 1e200, "logging_nan_inf_filter": False}, "optimizer step 2: the loss is nan"),
        (NAN_GRADIENT, "optimizer step 1: the weight vit.embeddings.cls_token is NaN or infinite: start again with"),
        (NAN_GRADIENT | {"rounds": 2}, "optimizer step 1: the loss is nan: the weight vit.embeddings.cls_token is"),
        (NAN_GRADIENT | {"save_strategy": "steps", "save_steps": 1}, "optimizer step 1: the weight vit.embeddings"),
    ],
)
def test_nan_ends_a_run_with_the_step_and_the_name(tmp_path, given, message):
    given = {name: value() if name == "data" else value for name, value in given.items()}
    with pytest.raises(FloatingPointError, match=message):
        trained(tmp_path, **given)
    assert not list(tmp_path.rglob("model.safetensors"))
