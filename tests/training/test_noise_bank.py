"""Rounds with several noises: learned at once, kept from earlier rounds, mixed within a batch; and resuming them."""

import json
import logging

import numpy as np
import pytest
import torch
from test_objectives import Pictures, agree, logits_of, trained
from torch.nn.functional import cross_entropy

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import patch_embedding_noise
from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.noise.influence import noise_influence
from hf_nullspace.training.noise_stream import noise_stream
from tiny_training import assert_same, parameters_of

BOUNDARY = {
    "preset": "boundary",
    "noise_max_steps": 3,
    "noise_pool_images": 16,
    "noise_bank_size": 3,
    "epsilon": 0.005,
}  # fmt: skip


class Kept:
    """What noises a trainer has at each step."""

    def __init__(self, monkeypatch):
        from hf_nullspace.training.trainer import NullspaceTrainer

        self.seen, inner = [], NullspaceTrainer.compute_loss

        def noted(trainer, *given, **named):
            if trainer.noises:
                self.seen.append(torch.cat([noise.tensor for noise in trainer.noises]))
            return inner(trainer, *given, **named)

        monkeypatch.setattr(NullspaceTrainer, "compute_loss", noted)


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
def test_every_image_gets_its_own_mixture(tmp_path, monkeypatch, mix):
    kept = Kept(monkeypatch)
    trainer = trained(tmp_path, **BOUNDARY, noises_at_once=2, noise_mix=mix)
    assert [len(noises) for noises in kept.seen] == [2, 2, 3, 3]

    def loss(vit, x, y, step):
        noises = mixed(kept.seen[step], mix, step, len(x))
        return cross_entropy(logits_of(vit, x), y) + cross_entropy(logits_of(vit, x, noises), y)

    agree(trainer, loss, tmp_path)


def test_earlier_noises_are_within_epsilon_of_the_present_model_and_the_newest_comes_first(tmp_path):
    data = Pictures()
    given = BOUNDARY | {"rounds": 3, "save_strategy": "steps", "save_steps": 2, "noise_bank_size": 2}
    trainer = trained(tmp_path, data=data, **given)
    bank = load_noise_bank(tmp_path / "noises")
    assert len(bank) == 3, "of each round the newest"
    assert torch.equal(trainer.noises[0].tensor, bank[2].tensor)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(trainer.noises[1].tensor.flatten(), bank[1].tensor.flatten(), dim=0) > 1 - 1e-6, "only scaled"
    assert [[entry["round"] for entry in history["bank"]] for history in trainer.history[1:]] == [[1, 0], [2, 1]]
    # Round 2 began with the weights of step 4.
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float64).eval()
    held_out, _ = noise_stream(data, stack, batch_size=8, held_out_images=8, seed=42, round=2)
    images = torch.cat(held_out)
    for noise in trainer.noises:
        with torch.no_grad():
            clean = model(pixel_values=images).logits
            with patch_embedding_noise(model, noise.tensor):
                influence = noise_influence(clean, model(pixel_values=images).logits).item()
        assert influence == pytest.approx(noise.provenance.influence, rel=1e-6)
        assert influence == pytest.approx(0.005, rel=0.045)


def stack(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def test_a_warm_start_begins_where_the_last_round_ended(tmp_path):
    given = BOUNDARY | {"noise_max_steps": 1, "noise_learning_rate": 1e-9, "noise_bank_size": 1}
    first, second = (n.tensor.flatten() for n in bank_of(tmp_path / "warm", **given, noise_warm_start=True))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(first, second, dim=0) > 1 - 1e-6
    first, second = (n.tensor.flatten() for n in bank_of(tmp_path / "cold", **given))
    assert cosine(first, second, dim=0).abs() < 0.5


def bank_of(folder, **given):
    trained(folder, **given)
    return load_noise_bank(folder / "noises")


@pytest.mark.parametrize("objective", ["random", "permuted"])
def test_the_controls_have_as_many_noises(tmp_path, monkeypatch, objective):
    kept = Kept(monkeypatch)
    trained(tmp_path, **BOUNDARY, noises_at_once=2, objective=objective, noise_mix="choice")
    assert [len(noises) for noises in kept.seen] == ([3] * 4 if objective == "random" else [2, 2, 3, 3])
    assert not torch.allclose(kept.seen[0][0], kept.seen[0][1])


@pytest.mark.parametrize("place", [3, 4])
def test_resumed_in_and_between_rounds_it_ends_with_the_same_bits(tmp_path, place):
    given = BOUNDARY | {"rounds": 3, "save_strategy": "steps", "save_steps": 1, "noise_mix": "convex"}
    given |= {"noise_warm_start": True}
    whole = trained(tmp_path / "run", **given)
    checkpoint = tmp_path / "run" / f"checkpoint-{place}"
    again = trained(tmp_path / "again", resume=str(checkpoint), **given)
    assert again.state.global_step == whole.state.global_step == 6
    assert_same(parameters_of(again.model), parameters_of(whole.model))
    for ours, theirs in zip(again.noises, whole.noises, strict=True):
        assert torch.equal(ours.tensor, theirs.tensor)
    costs = [
        json.loads((tmp_path / name / "cost.json").read_text())["forward_equivalents"] for name in ("run", "again")
    ]
    assert costs[0] == costs[1]


def test_a_round_costs_what_the_history_says_and_noises_are_learned_on_inputs_only(tmp_path):
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
