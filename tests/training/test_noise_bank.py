"""Rounds with several noises: learned at once, kept from earlier rounds, mixed within a batch; and resuming them."""

import json
import logging

import numpy as np
import pytest
import torch
from test_objectives import Pictures, agree, trained
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.training.noise_stream import noise_stream
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import cosine
from tiny_training import assert_same, parameters_of
from written_out import influence_of, logits_of

BOUNDARY = {
    "preset": "boundary",
    "noise_max_steps": 3,
    "noise_pool_images": 16,
    "noise_bank_size": 3,
    "epsilon": 0.005,
}  # fmt: skip


@pytest.fixture
def kept(monkeypatch):
    """What noises a trainer has at each step."""
    seen, inner = [], NullspaceTrainer.compute_loss

    def noted(trainer, *given, **named):
        if trainer.noises:
            seen.append(torch.cat([noise.tensor for noise in trainer.noises]))
        return inner(trainer, *given, **named)

    monkeypatch.setattr(NullspaceTrainer, "compute_loss", noted)
    return seen


def mixed(noises, mix, step, count):
    """The noise of every image, written out: from (seed 42, step, place)."""
    rows = []
    for place in range(count):
        seed = derive_seed(42, step, place)
        if mix == "choice":
            rows.append(noises[seed % len(noises)])
        else:
            weights = np.random.default_rng(seed).exponential(size=len(noises))
            rows.append(sum(w / weights.sum() * noise for w, noise in zip(weights, noises, strict=True)))
    return torch.stack(rows).double()


@pytest.mark.parametrize("mix", ["choice", "convex"])
def test_every_image_gets_its_own_mixture(tmp_path, kept, mix):
    trainer = trained(tmp_path, **BOUNDARY, noises_at_once=2, noise_mix=mix)
    assert [len(noises) for noises in kept] == [2, 2, 3, 3]

    def loss(vit, x, y, step):
        noises = mixed(kept[step], mix, step, len(x))
        return cross_entropy(logits_of(vit, x), y) + cross_entropy(logits_of(vit, x, noises), y)

    agree(trainer, loss, tmp_path)


def test_earlier_noises_are_within_epsilon_of_the_present_model_and_the_newest_comes_first(tmp_path):
    data = Pictures()
    given = BOUNDARY | {"rounds": 3, "save_strategy": "steps", "save_steps": 2, "noise_bank_size": 2}
    trainer = trained(tmp_path, data=data, **given)
    bank = load_noise_bank(tmp_path / "noises")
    assert len(bank) == 3, "of each round the newest"
    assert torch.equal(trainer.noises[0].tensor, bank[2].tensor)
    assert cosine(trainer.noises[1].tensor, bank[1].tensor) > 1 - 1e-6, "only scaled"
    assert [[entry["round"] for entry in history["bank"]] for history in trainer.history[1:]] == [[1, 0], [2, 1]]
    # Round 2 began with the weights of step 4.
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float64).eval()
    held_out, _ = noise_stream(data, trainer.data_collator, batch_size=8, held_out_images=8, seed=42, round=2)
    for noise in trainer.noises:
        influence = influence_of(model, torch.cat(held_out), noise.tensor)
        assert influence == pytest.approx(noise.provenance.influence, rel=1e-6)
        assert influence == pytest.approx(0.005, rel=0.045)


def test_a_warm_start_begins_where_the_last_round_ended(tmp_path):
    given = BOUNDARY | {"noise_max_steps": 1, "noise_learning_rate": 1e-9, "noise_bank_size": 1}
    found = {}
    for warm in (True, False):
        trained(tmp_path / str(warm), **given, noise_warm_start=warm)
        found[warm] = cosine(*(noise.tensor for noise in load_noise_bank(tmp_path / str(warm) / "noises")))
    assert found[True] > 1 - 1e-6
    assert abs(found[False]) < 0.5


@pytest.mark.parametrize("objective", ["random", "permuted"])
def test_the_controls_have_as_many_noises(tmp_path, kept, objective):
    trained(tmp_path, **BOUNDARY, noises_at_once=2, objective=objective, noise_mix="choice")
    assert [len(noises) for noises in kept] == ([3] * 4 if objective == "random" else [2, 2, 3, 3])
    assert not torch.allclose(kept[0][0], kept[0][1])


@pytest.mark.parametrize("place", [3, 4])
def test_resumed_in_and_between_rounds_it_ends_with_the_same_bits(tmp_path, place):
    given = BOUNDARY | {"rounds": 3, "save_strategy": "steps", "save_steps": 1, "noise_mix": "convex"}
    given |= {"noise_warm_start": True}
    whole = trained(tmp_path / "run", **given)
    again = trained(tmp_path / "again", resume=tmp_path / "run" / f"checkpoint-{place}", **given)
    assert again.state.global_step == whole.state.global_step == 6
    assert_same(parameters_of(again.model), parameters_of(whole.model))
    assert all(torch.equal(ours.tensor, theirs.tensor) for ours, theirs in zip(again.noises, whole.noises, strict=True))
    ours, theirs = (json.loads((tmp_path / name / "cost.json").read_text()) for name in ("run", "again"))
    assert ours["forward_equivalents"] == theirs["forward_equivalents"]


def test_the_history_has_the_cost_of_a_round_without_a_backward_pass_to_parameters(tmp_path):
    trainer = trained(tmp_path, **(BOUNDARY | {"noise_bank_size": 1}))
    for entry in trainer.history:
        assert entry["noise_steps"] == 3
        assert entry["cost"]["backward_to_input"] == 3 * 8
        assert entry["cost"]["backward_to_parameters"] == 0
        # The held-out images once clean and then some scalings, the pool once, a noisy pass for every step.
        assert entry["cost"]["forward"] % 8 == 0
        assert entry["cost"]["forward"] > 8 + 16 + 24


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"objective": "nullspace", "preset": "boundary"}, ["bound"]),
        ({"objective": "nullspace", "preset": "paper"}, ["start"]),
        ({"objective": "random", "preset": "boundary"}, ["unreachable"]),
        ({"objective": "permuted", "preset": "descent"}, ["start", "unreachable"]),
    ],
    ids=lambda value: value if isinstance(value, list) else "-".join(value.values()),
)
def test_with_an_epsilon_out_of_reach_training_goes_on_marked_and_warned(tmp_path, caplog, given, words):
    """The same rule for learned and for random noise: a run does not end for it, and nobody takes it for a result."""
    with caplog.at_level(logging.WARNING, "hf_nullspace.noise"):
        trainer = trained(tmp_path, epsilon=1.999, noise_max_steps=2, noise_pool_images=8, **given)
    assert trainer.state.global_step == 4
    assert [entry["stopped"] for entry in trainer.history] == [words[-1]] * 2
    assert all(noise.provenance.stopped == words[-1] for noise in load_noise_bank(tmp_path / "noises"))
    texts = [record.message for record in caplog.records]
    assert [text.split(":")[0] for text in texts] == ["round 0"] * len(words) + ["round 1"] * len(words)
    assert all("epsilon=1.999" in text for text in texts)
