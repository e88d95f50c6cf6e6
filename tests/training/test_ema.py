"""The averaged weights: against the recursion written out, saved, evaluated, and never left in the model."""

import shutil

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForImageClassification, TrainerCallback, ViTConfig, ViTForImageClassification

from hf_nullspace.training.ema import EmaCallback
from tiny_models import IMAGE, SIZES, tiny_model
from tiny_training import Images, accuracy, assert_differs, assert_same, logged, parameters_of, trained


class Weights(TrainerCallback):
    """The weights after every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(parameters_of(model))

    def average_from(self, start):
        """The recursion written out, with a decay of 0.8."""
        assert len(self.steps) == 4
        for step in self.steps:
            start = {name: 0.8 * value + 0.2 * step[name] for name, value in start.items()}
        return start


def test_it_is_the_recursion(tmp_path):
    weights = Weights()
    trainer = trained(tmp_path, ema_decay=0.8, callbacks=[weights])
    average = weights.average_from(parameters_of(tiny_model().double()))
    assert_same(parameters_of(trainer.ema.model), average, rtol=1e-12, atol=1e-15)
    assert_differs(average, weights.steps[-1])
    assert_same(parameters_of(trainer.model), weights.steps[-1])
    trainer.remove_callback(weights)
    trainer.add_callback(second := Weights())
    trainer.train()  # starts a new average
    assert_same(parameters_of(trainer.ema.model), second.average_from(weights.steps[-1]), rtol=1e-12, atol=1e-15)


def test_it_starts_from_other_weights_and_a_resumed_run_does_not_need_them(tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "average")
    weights, start = Weights(), str(tmp_path / "average")
    known = {"ema_decay": 0.8, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "run", ema_from=start, callbacks=[weights], **known)
    average = weights.average_from(parameters_of(tiny_model(seed=5).double()))
    assert_same(parameters_of(whole.ema.model), average, rtol=1e-12, atol=1e-15)
    shutil.rmtree(start)
    resumed = trained(tmp_path / "run", resume=tmp_path / "run" / "checkpoint-2", ema_from=start, **known)
    assert_same(parameters_of(resumed.ema.model), parameters_of(whole.ema.model))
    assert_same(parameters_of(resumed.model), parameters_of(whole.model))


def test_it_starts_from_a_model_of_the_hub(hub_here):
    start = tiny_model(seed=3)
    start.push_to_hub("lab/start")
    average = EmaCallback(tiny_model(), 0.9, "lab/start")
    average.start(tiny_model())
    assert_same(parameters_of(average.model), parameters_of(start))


def test_weights_that_the_average_cannot_start_from(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tiny_model("deit").save_pretrained(tmp_path / "deit")
    ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, num_labels=3)).save_pretrained(tmp_path / "three")
    shutil.copytree(tmp_path / "three", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((tmp_path / "three" / "model.safetensors").read_bytes()[:999])
    for name, said in (
        ("three", r"classifier.bias is \(3,\) there and \(5,\) here; classifier.weight is \(3, 24\) there"),
        ("deit", "has no place"),
        ("cut", "incomplete|deserializ"),
        ("nothing", "nothing"),
    ):
        with pytest.raises(ValueError, match=f"ema_from=.*{name}.*{said}.*; name a folder, or an id on the Hub") as got:
            trained(tmp_path, tiny_model(), Images(), ema_decay=0.8, ema_from=str(tmp_path / name))
        assert "\n" not in str(got.value)


def test_it_does_not_change_training_and_counts_optimizer_steps(tmp_path):
    whole = trained(tmp_path / "1", ema_decay=0.8)
    assert_same(parameters_of(whole.model), parameters_of(trained(tmp_path / "without").model))
    parts = trained(tmp_path / "2", ema_decay=0.8, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_same(parameters_of(parts.ema.model), parameters_of(whole.ema.model), rtol=1e-6, atol=1e-9)


def test_it_is_saved_as_a_model(tmp_path):
    trainer = trained(tmp_path, tiny_model(), Images(), ema_decay=0.8, save_strategy="steps", save_steps=4)
    for folder in (tmp_path / "checkpoint-4", tmp_path / "final"):
        trainer.save_model(str(tmp_path / "final"))
        average = AutoModelForImageClassification.from_pretrained(folder, subfolder="ema")
        own = AutoModelForImageClassification.from_pretrained(folder)
        assert_same(parameters_of(average), parameters_of(trainer.ema.model))
        assert_same(parameters_of(own), parameters_of(trainer.model))
        images = Images().pixel_values[:4]
        assert not torch.equal(average(images).logits, own(images).logits)


def test_it_is_evaluated_beside_the_model(tmp_path):
    held_out = Images(count=30, seed=7)
    given = {"eval_dataset": held_out, "compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trained(tmp_path, tiny_model(), Images(), ema_decay=0.8, **given)
    assert len(logged(trainer, "eval_ema_accuracy")) == 2
    metrics = trainer.evaluate()
    own, average = trainer.model, trainer.ema.model
    for prefix, model in (("eval_", own), ("eval_ema_", average)):
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(model.eval()(held_out.pixel_values).logits, held_out.labels)
        assert metrics[f"{prefix}loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_loss"] != metrics["eval_ema_loss"]
    several = trainer.evaluate({"a": held_out, "b": Images(count=9, seed=8)})
    assert {"eval_a_loss", "eval_a_ema_loss", "eval_b_loss", "eval_b_ema_loss"} <= several.keys()
    assert several["eval_a_ema_loss"] == metrics["eval_ema_loss"]


def test_the_models_own_weights_come_back(tmp_path):
    trainer = trained(tmp_path, tiny_model(), Images(), ema_decay=0.8, eval_dataset=Images(count=9))
    own, average = parameters_of(trainer.model), parameters_of(trainer.ema.model)
    addresses = [parameter.data_ptr() for parameter in trainer.model.parameters()]
    trainer.evaluate()
    assert_same(parameters_of(trainer.model), own)

    seen = []

    def fail(prediction):
        seen.append(parameters_of(trainer.model))
        if len(seen) == 2:
            raise KeyError("metric")
        return {}

    trainer.compute_metrics = fail
    with pytest.raises(KeyError, match="metric"):
        trainer.evaluate()
    assert_same(seen[0], own)
    assert_same(seen[1], average)
    assert_same(parameters_of(trainer.model), own)
    assert [parameter.data_ptr() for parameter in trainer.model.parameters()] == addresses


def test_frozen_parameters_and_buffers(tmp_path):
    model = tiny_model().double()
    model.vit.embeddings.requires_grad_(False)
    trainer = trained(tmp_path, model, Images(dtype=torch.float64), ema_decay=0.8)
    assert torch.equal(trainer.ema.model.vit.embeddings.cls_token, tiny_model().double().vit.embeddings.cls_token)


def test_a_checkpoint_without_an_average(tmp_path):
    trained(tmp_path, tiny_model(), Images(), save_strategy="steps", save_steps=2)
    with pytest.raises(OSError, match="ema"):
        trained(tmp_path, tiny_model(), Images(), resume=tmp_path / "checkpoint-2", ema_decay=0.9)
