"""Every objective against a loop without Trainer and hook; the controls' influence; costs as they are counted."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax, softmax

from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.noise.influence import centre, centred_norm
from hf_nullspace.training import objectives
from hf_nullspace.training.noise_stream import noise_stream
from hf_nullspace.training.objectives import (
    Objective,
    View,
    check_labels,
    check_objective,
    mean_over_images,
    register_objective,
    view_loss,
)
from tiny_attacks import EPS, Pictures, agree, divergence_pgd, pgd, trained
from tiny_models import cosine, tiny_model
from tiny_training import assert_same, logged, parameters_of
from written_out import influence_of, logits_of


def test_madry_is_the_loop_without_the_trainer(tmp_path):
    trainer = trained(tmp_path, objective="madry")
    agree(trainer, lambda vit, x, y, step: cross_entropy(logits_of(vit, pgd(vit, x, y, 42, step)), y), tmp_path)


def fast_loss(vit, x, y, step):
    """One step of 1.25 eps from a uniform start (Wong et al. 2020), beside the clean view."""
    adversarial = pgd(vit, x, y, 42, step, steps=1, step=1.25 * EPS)
    return cross_entropy(logits_of(vit, x), y) + cross_entropy(logits_of(vit, adversarial), y)


def test_fast_is_the_loop_without_the_trainer(tmp_path):
    agree(trained(tmp_path, objective="fast"), fast_loss, tmp_path)


def trades_loss(vit, x, y, step):
    adversarial = divergence_pgd(vit, x, 42, step)
    z, z_adversarial = logits_of(vit, x), logits_of(vit, adversarial)
    p = softmax(z, 1)
    divergence = (p * (p.log() - log_softmax(z_adversarial, 1))).sum(1).mean()
    return cross_entropy(z, y) + 4 * divergence


def test_trades_is_the_loop_without_the_trainer(tmp_path):
    agree(trained(tmp_path, objective="trades", trades_beta=4.0), trades_loss, tmp_path)


@pytest.mark.parametrize("objective", ["random", "permuted", "nullspace"])
def test_a_noisy_view_is_the_loop_without_the_trainer(tmp_path, objective):
    trainer = trained(tmp_path, objective=objective)
    bank = [noise.tensor for noise in load_noise_bank(tmp_path / "noises")]
    assert objective != "random" or abs(cosine(*bank)) < 0.2, "drawn anew every round"

    def loss(vit, x, y, step):
        return cross_entropy(logits_of(vit, x), y) + cross_entropy(logits_of(vit, x, bank[step // 2]), y)

    agree(trainer, loss, tmp_path)


def test_a_sum_is_the_union_of_the_views_and_the_sum_of_the_losses(tmp_path):
    """nullspace+madry+trades: CE(z) + CE(z') + CE(z_adv) + CE(z) + 4 KL, and every view is computed once."""
    trainer = trained(tmp_path, objective="nullspace+madry+trades", trades_beta=4.0)
    forward = trainer.cost.summary()["stages"]["training"]["forward"]
    assert forward == 4 * 8 * 4, "clean, adversarial, divergent, noisy"
    bank = [noise.tensor for noise in load_noise_bank(tmp_path / "noises")]

    def loss(vit, x, y, step):
        noisy, adversarial = logits_of(vit, x, bank[step // 2]), logits_of(vit, pgd(vit, x, y, 42, step))
        both = cross_entropy(logits_of(vit, x), y) + cross_entropy(noisy, y)
        return both + cross_entropy(adversarial, y) + trades_loss(vit, x, y, step)

    agree(trainer, loss, tmp_path)


@pytest.mark.parametrize(("objective", "distribution"), [("random", "uniform"), ("random", "normal"), ("permuted", "")])
def test_controls_have_the_influence_epsilon_on_held_out_images(tmp_path, objective, distribution):
    """Measured again, without our probe, on the round's own held-out images and the model as it was."""
    trainer = trained(tmp_path, objective=objective, noise_distribution=distribution or "uniform", rounds=1)
    (noise,) = load_noise_bank(tmp_path / "noises")
    known = {"batch_size": 8, "held_out_images": 8, "seed": 42, "round": 0}
    held_out, _ = noise_stream(Pictures(), trainer.data_collator, **known)
    influence = influence_of(tiny_model().double(), torch.cat(held_out), noise.tensor)
    assert influence == pytest.approx(0.01, rel=0.02)
    assert noise.provenance.influence == pytest.approx(influence, rel=1e-9)
    assert noise.provenance.stopped == trainer.history[0]["stopped"] == "calibrated"
    values = noise.tensor.flatten() / noise.provenance.settings["factor"]
    if distribution == "uniform":
        assert values.abs().max() <= 1
        assert values.std() == pytest.approx(3**-0.5, rel=0.1)
    if distribution == "normal":
        assert values.std() == pytest.approx(1, rel=0.1)
        assert values.abs().max() > 2


def test_images_labelled_minus_100_count_for_nothing():
    values, labels = torch.tensor([1.0, float("inf"), 5.0]), torch.tensor([0, -100, 2])
    assert mean_over_images(values, labels, None) == 3
    assert mean_over_images(values, labels, 4) == 1.5
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    expected = cross_entropy(logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(view_loss(logits, labels, None), expected)
    torch.testing.assert_close(view_loss(logits, labels, 4), expected / 2)
    model = torch.nn.Identity()
    model.config = SimpleNamespace(num_labels=3)
    check_labels({"labels": labels}, model)
    for wrong in (torch.tensor([0, -99]), torch.tensor([3]), torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(ValueError, match=r"expected one whole number per image, in \[0, 3\)"):
            check_labels({"labels": wrong}, model)


def test_the_loss_of_half_precision_logits_is_that_of_float32():
    logits, labels = 8 * torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.arange(6) % 5
    assert torch.equal(view_loss(logits, labels, None), cross_entropy(logits.float(), labels))
    assert view_loss(logits.double(), labels, None).dtype == torch.float64


def test_the_permuted_noise_is_the_learned_one_in_another_order(tmp_path):
    learned = trained(tmp_path / "learned", objective="nullspace", rounds=1).noise.tensor
    shuffled = trained(tmp_path / "permuted", objective="permuted", rounds=1).noise
    direction = shuffled.tensor / shuffled.provenance.settings["factor"]
    assert float(centred_norm(direction)) == pytest.approx(float(centred_norm(learned)), rel=1e-6)
    assert abs(cosine(centre(direction), centre(learned))) < 0.2


class Brighter(Objective):
    """An objective of a user's own: the same images, brighter."""

    def __init__(self, by):
        self.by = by

    def views(self, batch):
        return {"clean": View(batch.images), "bright": View(batch.images + self.by)}

    def loss(self, logits, batch):
        return batch.cross_entropy(logits["clean"]) + 3 * batch.cross_entropy(logits["bright"])


def test_a_new_objective_needs_no_edit_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "_OBJECTIVES", dict(objectives._OBJECTIVES))
    register_objective("brighter", lambda args: Brighter(by=args.trades_beta))
    trainer = trained(tmp_path, objective="brighter", trades_beta=0.5)

    def loss(vit, x, y, step):
        return cross_entropy(logits_of(vit, x), y) + 3 * cross_entropy(logits_of(vit, x + 0.5), y)

    agree(trainer, loss, tmp_path)
    with pytest.raises(ValueError, match="expected a new name"):
        register_objective("brighter", Brighter)


def test_the_parts_of_a_sum_are_known():
    assert check_objective("plain+madry") == ["plain", "madry"]


def test_the_attack_leaves_nothing_behind(tmp_path):
    """No gradient, the mode and the generators as before; the loss is the same a second time."""
    trainer = trained(tmp_path, objective="madry+trades")
    data, model = Pictures(), trainer.model
    inputs = {"pixel_values": data.pixel_values[:8], "labels": data.labels[:8]}
    model.zero_grad()
    model.train()
    state, modes = torch.get_rng_state(), []
    handle = model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    first = trainer.compute_loss(model, dict(inputs))
    handle.remove()
    assert modes == [False] * (3 + 1 + 3) + [True] * 3, (
        "in eval mode while attacked, then a pass per view in training mode"
    )
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert first.item() == trainer.compute_loss(model, dict(inputs)).item()


def test_bf16_trains(tmp_path):
    """Autocast keeps no copy of the weights from the frozen attack: the parameters get their gradients and move."""
    objective = "nullspace+madry+trades+fast+pyramid+fgm+universal"
    trainer = trained(tmp_path, tiny_model(), Pictures(dtype=torch.float32), objective=objective, bf16=True)
    before = parameters_of(tiny_model())
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    assert all(map(math.isfinite, logged(trainer, "loss")))


def test_resumed_within_a_run_it_ends_with_the_same_weights_and_cost(tmp_path):
    given = {
        "objective": "permuted+trades+fast+pyramid+fgm+universal",
        "epsilon": 0.003,
        "rounds": 3,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = trained(tmp_path / "run", **given)
    again = trained(tmp_path / "again", resume=tmp_path / "run" / "checkpoint-3", **given)
    assert again.state.global_step == whole.state.global_step == 6
    assert_same(parameters_of(again.model), parameters_of(whole.model))
    costs = [json.loads((tmp_path / name / "cost.json").read_text()) for name in ("run", "again")]
    for kind in ("forward", "backward_to_input", "backward_to_parameters", "forward_equivalents"):
        assert costs[0][kind] == costs[1][kind] > 0
    assert costs[1]["seconds"] > 0
    assert [entry["cost"] for entry in again.history] == [entry["cost"] for entry in whole.history]


class Passes(torch.nn.Module):
    """Counts images at the patch embedding, forward and, at the classifier's output, backward."""

    def __init__(self, model):
        super().__init__()
        self.forwards = self.to_parameters = self.to_input = 0
        model.classifier.register_forward_hook(self._forward)
        self._weight = model.classifier.weight

    def _forward(self, module, args, output):
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._backward(len(gradient), module.weight.requires_grad))

    def _backward(self, images, trains):
        self.to_parameters += images if trains else 0
        self.to_input += 0 if trains else images


ATTACKED = {"madry": 3, "trades": 4, "nullspace+madry": 3, "fast": 1, "random+fast": 1, "pyramid": 3, "madry+fgm": 3}
"""Forward passes of the attack, per image."""


@pytest.mark.parametrize("objective", ["plain", "nullspace", "random", "permuted", "universal", *ATTACKED])
def test_the_cost_is_what_passes_through_the_model(tmp_path, objective):
    model = tiny_model().double()
    passes = Passes(model)
    trainer = trained(tmp_path, model, objective=objective, save_strategy="steps", save_steps=2)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["forward"] == passes.forwards
    assert cost["backward_to_parameters"] == passes.to_parameters
    assert cost["backward_to_input"] == passes.to_input
    assert cost["forward_equivalents"] == passes.forwards + passes.to_input + 2 * passes.to_parameters
    views = {"madry": 1, "nullspace+madry": 3, "random+fast": 3, "madry+fgm": 3}.get(objective, 2)
    assert (
        cost["stages"]["training"]["forward"] == cost["stages"]["training"]["backward_to_parameters"] == 4 * 8 * views
    )
    assert cost["stages"]["attack"]["forward"] == 4 * 8 * ATTACKED.get(objective, 0)
    watched = cost["stages"]["watch"]["forward_equivalents"]
    assert watched == (3 * 10 * (2 * 1 + 1 + 2 * 10 + 1) if "fast" in objective else 0), (
        "3 times, a quarter of 40 images"
    )
    if objective == "fast":
        assert cost["forward_equivalents"] - watched == 4 * 8 * 8, "8 per image, the price in docs/robustness.md"
    noise = [sum(entry["cost"][kind] for entry in trainer.history) for kind in ("forward", "backward_to_input")]
    assert [cost["stages"]["noise"][kind] for kind in ("forward", "backward_to_input")] == noise
    assert logged(trainer, "cost/forward_equivalents")[-1] == cost["forward_equivalents"]
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert any("cost/forward_equivalents" in entry for entry in saved)
