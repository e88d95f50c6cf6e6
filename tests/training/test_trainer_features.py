"""What a Trainer can do, NullspaceTrainer can: precision, compilation, streams, searches, adapters; and bad input."""

import json
import logging
from unittest import mock

import datasets
import pytest
import torch
from transformers import AutoModelForImageClassification, TrainingArguments, set_seed

from hf_nullspace.noise.artifact import NullspaceNoise, load_noise_bank, model_hash
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import FAMILIES, tiny_model
from tiny_training import (
    Images,
    Recorder,
    RoundRecorder,
    assert_differs,
    assert_same,
    config,
    logged,
    parameters_of,
    train_batches,
    trained,
)


def test_bf16(tmp_path):
    exact = trained(tmp_path / "float32", tiny_model(), Images())
    rough = trained(tmp_path / "bf16", tiny_model(), Images(), bf16=True)
    assert logged(rough, "loss") != logged(exact, "loss")
    assert logged(rough, "loss") == pytest.approx(logged(exact, "loss"), rel=0.1)
    assert rough.noise.tensor.dtype == torch.float32
    assert {parameter.dtype for parameter in rough.model.parameters()} == {torch.float32}
    assert_differs(parameters_of(rough.model), parameters_of(tiny_model()))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_torch_compile(tmp_path, backend):
    """Also with the noise: a compiled model ignores hooks that come too late."""
    given = {"rounds": 1, "preset": "paper", "noise_max_steps": 2, "epsilon": 1e-6}
    held_out = Images(count=8, seed=3, dtype=torch.float64)
    plain = trained(tmp_path / "plain", eval_dataset=held_out, **given)
    torch._dynamo.reset()
    given |= {"torch_compile": True, "torch_compile_backend": backend}
    compiled = trained(tmp_path / "compiled", eval_dataset=held_out, **given)
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3, "clean, noisy, and both in one"
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)
    torch.testing.assert_close(compiled.noise.tensor, plain.noise.tensor, rtol=1e-6, atol=1e-9)
    assert_same(parameters_of(compiled.model), parameters_of(plain.model), rtol=1e-6, atol=1e-9)
    assert compiled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    torch._dynamo.reset()


def test_activation_checkpointing(tmp_path):
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    name = f"{kind}_checkpointing"
    plain = trained(tmp_path / "plain")
    checked = trained(tmp_path / "checked", **{name: True})  # transformers 5.18 has the older name
    assert getattr(checked.model, f"is_{name}")
    assert_same(parameters_of(checked.model), parameters_of(plain.model), rtol=1e-9, atol=1e-12)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[index] for index in range(len(self.images)))


def hub_stream(images):
    rows = [images[index] for index in range(len(images))]
    data = hub_dataset(rows, labels=[int(row["labels"]) for row in rows])
    return data.to_iterable_dataset(num_shards=2).with_format("torch")


@pytest.mark.parametrize(("make", "workers"), [(Stream, 0), (hub_stream, 0), (hub_stream, 2)])
def test_streaming(tmp_path, make, workers):
    model = tiny_model()
    recorder = Recorder(model)
    trainer = trained(tmp_path, model, make(Images(count=40)), dataloader_num_workers=workers, rounds=3)
    assert trainer.state.global_step == 6, "more than one pass over five batches"
    assert [entry["step"] for entry in trainer.history] == [0, 2, 4]
    assert all(entry["influence"] <= 0.03 for entry in trainer.history)
    batches = train_batches(recorder)
    assert len(batches) == 6
    if not workers:  # each of two workers ends its pass with half a batch
        batches = batches[:5]
    assert len(torch.cat(batches).flatten(1).unique(dim=0)) == 40, "each image once"
    assert_differs(parameters_of(model), parameters_of(tiny_model()))


def hub_dataset(images, **columns):
    rows = {"pixel_values": [row["pixel_values"].tolist() for row in images], "name": ["a.png"] * len(images)}
    return datasets.Dataset.from_dict(rows | columns).with_format("torch")


def test_hub_data_set_with_other_columns(tmp_path):
    """The Trainer drops columns that the model does not take, and knows "label"; so does the noise."""
    images = [Images()[index] for index in range(24)]
    data = hub_dataset(images, label=[int(row["labels"]) for row in images])
    ours = trained(tmp_path / "hub", tiny_model(), data, rounds=1)
    theirs = trained(tmp_path / "torch", tiny_model(), images, rounds=1)
    assert_same(parameters_of(ours.model), parameters_of(theirs.model))


def test_data_loader_workers_change_nothing(tmp_path):
    alone = trained(tmp_path / "0", tiny_model(), Images(jitter=0.3))
    helped = trained(tmp_path / "2", tiny_model(), Images(jitter=0.3), dataloader_num_workers=2)
    assert torch.equal(helped.noise.tensor, alone.noise.tensor)
    assert_same(parameters_of(helped.model), parameters_of(alone.model))


BEST = {
    "learning_rate": 0.3,  # so large that the first steps lead away
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # "best" is the largest loss: with these steps never the last
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.mark.parametrize(("metric", "part"), [("eval_loss", ""), ("eval_ema_loss", "ema")])
def test_load_best_model_at_end(tmp_path, metric, part):
    """By the metric of the averaged weights the model that is returned is the average of the best checkpoint."""
    given = BEST | {"metric_for_best_model": metric, "ema_decay": 0.5 if part else None}
    trainer = trained(tmp_path, tiny_model(), Images(), eval_dataset=Images(count=30, seed=7), **given)
    seen = logged(trainer, metric)
    best = seen.index(max(seen)) + 1
    assert best < 4, "the test means something only if the best is not the last"
    folder = tmp_path / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(folder)
    saved = AutoModelForImageClassification.from_pretrained(folder, subfolder=part)
    assert_same(parameters_of(trainer.model), parameters_of(saved))
    assert trainer.evaluate()["eval_loss"] == max(seen)
    kept = NullspaceNoise.from_pretrained(folder).tensor
    assert torch.equal(trainer.noise.tensor, kept), "the noise it is saved with"


class OutOfMemoryOnce:
    """The model's first layer runs out of memory once, at a forward pass of some kind."""

    def __init__(self, trainer, when):
        self.trainer, self.when, self.raised, self.forwards = trainer, when, 0, 0
        trainer.model.vit.layers[0].register_forward_hook(self.check)

    def check(self, module, args, output):
        learning = not self.trainer.model.training
        if self.raised or self.trainer.state.global_step < 2:
            return
        if learning == (self.when == "noise"):
            self.forwards += 1
            if self.forwards == (4 if learning else 1):
                self.raised += 1
                raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("when", ["noise", "step"])
def test_auto_find_batch_size_starts_the_round_again(tmp_path, when):
    """Out of memory in round 1, in the noise or in a step: all is done again with less, from round 0."""
    model, rounds = tiny_model(), RoundRecorder()
    args = config(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=10)
    trainer = NullspaceTrainer(model, args, train_dataset=Images(), callbacks=[rounds])
    memory = OutOfMemoryOnce(trainer, when)
    trainer.train()
    assert memory.raised == 1
    assert trainer._train_batch_size == 9
    assert trainer.state.global_step == 4
    assert rounds.rounds == [(0, 0), *([(2, 1)] if when == "step" else []), (0, 0), (2, 1)]
    assert [(entry["round"], entry["step"]) for entry in trainer.history] == [(0, 0), (1, 2)]
    bank = load_noise_bank(tmp_path / "noises")
    assert torch.equal(bank[1].tensor, trainer.noise.tensor)
    small = trained(tmp_path / "small", tiny_model(), Images(), per_device_train_batch_size=9)
    assert_same(parameters_of(model), parameters_of(small.model))  # as if it had been run with 9 at once
    assert torch.equal(small.noise.tensor, trainer.noise.tensor)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert trainer._hook.noise is None


def test_model_init(tmp_path):
    init = mock.Mock(side_effect=tiny_model)
    trainer = NullspaceTrainer(model_init=lambda: init(), args=config(tmp_path / "init"), train_dataset=Images())
    trainer.train()
    theirs = NullspaceTrainer(tiny_model(), config(tmp_path / "model"), train_dataset=Images())
    torch.manual_seed(0)  # as tiny_model leaves it, and the order of the data is drawn from it
    theirs.train()
    assert init.call_count == 2, "the Trainer calls it again when training begins"
    assert_same(parameters_of(trainer.model), parameters_of(theirs.model))
    assert trainer.model.get_input_embeddings()._forward_hooks


def test_hyperparameter_search(tmp_path):
    trainer = NullspaceTrainer(
        model_init=lambda: tiny_model(),
        args=config(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, ema_decay=0.5),
        train_dataset=Images(),
        eval_dataset=Images(count=10, seed=3),
    )
    logging.getLogger("optuna").setLevel(logging.ERROR)

    def space(trial):
        rounds = 1 + trial.number
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2),
            "epsilon": trial.suggest_float("epsilon", 0.02, 0.2),
            "rounds": trial.suggest_int("rounds", rounds, rounds),
            "consistency": trial.suggest_float("consistency", rounds, rounds),
        }

    weights = []  # of each step's objective
    make = trainer.training_step

    def training_step(*given, **named):
        weights.append(trainer._objective.consistency)
        return make(*given, **named)

    trainer.training_step = training_step

    best = trainer.hyperparameter_search(space, n_trials=2, direction="minimize", backend="optuna")
    assert best.run_id in ("0", "1")
    for trial in (0, 1):
        folder = tmp_path / f"run-{trial}"
        noises = load_noise_bank(folder / "noises")
        assert [noise.provenance.round for noise in noises] == list(range(trial + 1))
        history = json.loads((folder / "nullspace_history.json").read_text())
        assert [entry["step"] for entry in history] == [0, 2][: trial + 1]
        assert NullspaceNoise.from_pretrained(folder / f"checkpoint-{2 * trial + 2}").provenance.round == trial
    assert weights == [1.0] * 2 + [2.0] * 4
    epsilons = [load_noise_bank(tmp_path / f"run-{t}" / "noises")[0].provenance.epsilon for t in (0, 1)]
    assert epsilons[0] != epsilons[1]
    assert not (tmp_path / "noises").exists()


def with_adapters():
    from peft import LoraConfig, get_peft_model

    set_seed(0)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(tiny_model(), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    return model


def test_peft(tmp_path):
    start, model = with_adapters(), with_adapters()
    trainer = trained(tmp_path / "whole", model, Images(), save_strategy="steps", save_steps=1)
    before, after = parameters_of(start), parameters_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert all("lora" in name or "classifier.modules_to_save" in name for name in moved)
    assert {parameter.requires_grad for parameter in model.base_model.model.vit.embeddings.parameters()} == {False}
    assert trainer.noise.tensor.shape == (1, 16, 24)

    images = Images().pixel_values[:4]
    model.eval()
    with torch.no_grad():
        clean = model(images).logits
        with trainer._hook.adding(trainer.noise.tensor):
            assert not torch.equal(model(images).logits, clean), "the base model's patch embedding has the noise"

    saving = {"save_strategy": "steps", "save_steps": 1}
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = trained(tmp_path / "whole", with_adapters(), Images(), resume=checkpoint, **saving)
    assert_same(parameters_of(resumed.model), after)
    assert torch.equal(resumed.noise.tensor, trainer.noise.tensor)
    with pytest.raises(ValueError, match="no FSDP, DeepSpeed or PEFT"):
        NullspaceTrainer(with_adapters(), config(tmp_path, ema_decay=0.9), train_dataset=Images())


@pytest.mark.parametrize("preset", ["descent", "boundary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_resumes(tmp_path, family, preset):
    given = {"steps_per_round": 1, "preset": preset, "noise_pool_images": 16 if preset == "boundary" else 0}
    whole = trained(tmp_path, tiny_model(family), Images(), save_strategy="steps", save_steps=1, **given)
    other = tiny_model(family, seed=9)
    resumed = trained(tmp_path, other, Images(), resume=tmp_path / "checkpoint-1", **given)
    assert_same(parameters_of(resumed.model), parameters_of(whole.model))
    assert_differs(parameters_of(whole.model), parameters_of(tiny_model(family)))


def test_what_a_run_leaves_behind(tmp_path):
    trainer = trained(tmp_path, tiny_model(), Images(), save_strategy="steps", save_steps=1)
    trainer.save_model()
    history = json.loads((tmp_path / "nullspace_history.json").read_text())
    assert history == json.loads((tmp_path / "checkpoint-4" / "nullspace_history.json").read_text()) == trainer.history
    bank = load_noise_bank(tmp_path / "noises")
    assert [noise.provenance.round for noise in bank] == [0, 1]
    assert [noise.provenance.training_step for noise in bank] == [0, 2]
    assert bank[0].provenance.model_sha256 == model_hash(tiny_model())
    assert not torch.equal(bank[0].tensor, bank[1].tensor)
    for place, round_ in (("checkpoint-1", 0), ("checkpoint-2", 0), ("checkpoint-3", 1), ("checkpoint-4", 1), (".", 1)):
        assert torch.equal(NullspaceNoise.from_pretrained(tmp_path / place).tensor, bank[round_].tensor)
    assert torch.equal(trainer.noise.tensor, bank[1].tensor)
    logs = [entry for entry in trainer.state.log_history if "noise/round" in entry]
    for round_, (entry, noise, log) in enumerate(zip(history, bank, logs, strict=True)):
        assert (entry["round"], entry["step"], log["step"]) == (round_, 2 * round_, 2 * round_)
        assert 0 <= entry["noise_steps"] <= 4
        assert entry["stopped"] in ("epsilon", "rescaled")
        assert 0 < entry["influence"] <= 0.03
        assert entry["influence"] == noise.provenance.influence
        assert entry["norm"] == pytest.approx(torch.linalg.vector_norm(noise.tensor).item())
        centred = noise.tensor - noise.tensor.mean(-1, keepdim=True)
        assert entry["centred_norm"] == pytest.approx(torch.linalg.vector_norm(centred).item())
        assert entry["seconds"] > 0
        assert len(entry["trace"]["influence"]) == entry["noise_steps"] + 1
        for name in ("noise_steps", "influence", "norm", "centred_norm", "seconds"):
            assert log[f"noise/{name}"] == entry[name]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    images = Images().pixel_values[:5]
    assert torch.equal(loaded(images).logits, trainer.model.eval()(images).logits)
    assert not loaded.get_input_embeddings()._forward_hooks


class Changed(Images):
    """Images with other columns: a value, or None for a column that is missing."""

    def __init__(self, **columns):
        super().__init__()
        self.columns = columns

    def __getitem__(self, index):
        return {name: value for name, value in (super().__getitem__(index) | self.columns).items() if value is not None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Changed(labels=5), r"labels \[5, .*in \[0, 5\).*map the labels of the data"),
        (lambda: Changed(labels=-1), r"labels \[-1, .*in \[0, 5\).*map the labels of the data"),
        (lambda: Changed(labels=1.5), r"labels torch.float32 of shape \(8,\): expected one whole number per image"),
        (lambda: Changed(labels=None), r"training rows have \['pixel_values'\] but no 'labels'"),
        (lambda: Changed(pixel_values=torch.zeros(3, 20, 20)), r"20.*16"),
        (lambda: Images(0), "the training set is empty; check the split's name"),
        (lambda: hub_dataset([], labels=[]), "the training set is empty; check the split's name"),
        (lambda: Stream([]), "the training stream is empty; check the split's name"),
    ],
)
@pytest.mark.parametrize("objective", ["nullspace", "plain"])
def test_data_that_does_not_fit_is_refused_before_a_noise_is_learned(tmp_path, make, message, objective):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, tiny_model(), make(), objective=objective)
    assert not (tmp_path / "noises").exists()


def test_a_noise_of_another_model_in_a_checkpoint(tmp_path):
    trained(tmp_path, tiny_model(), Images(), save_strategy="steps", save_steps=3)
    other = NullspaceNoise(torch.zeros(1, 4, 24), (2, 2), load_noise_bank(tmp_path / "noises")[1].provenance)
    other.save_beside_model(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()  # as one from the Hub, which has none
    words = r"noise of shape \(1, 4, 24\) does not fit patch embeddings that need \(1, 16, 24\)"
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, tiny_model(), Images(), resume=tmp_path / "checkpoint-3")
