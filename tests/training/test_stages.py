"""Views in one pass or several, and stages in turn: what is synchronised, what is known of the gradient."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.training import objectives
from hf_nullspace.training.objectives import Objective, View, register_objective
from hf_nullspace.training.stages import Stages, forward_views
from tiny_models import normal, tiny_model
from tiny_training import Images, assert_same, trained
from written_out import logits_of


@pytest.mark.parametrize("noises", [(0, 0), (1, 0), (5, 0), (5, 1)])
def test_views_in_one_forward_pass_are_views_in_turn(noises):
    """The way of a GPU and that of a CPU: the same logits and gradients, and each view has its own noise or none."""
    found = []
    for together in (False, True):
        vit, images, other = tiny_model().double(), normal(5, 3, 16, 16), normal(5, 3, 16, 16, seed=1)
        v, w = (normal(count, 16, 24, seed=2 + count).requires_grad_() if count else None for count in noises)
        views = {"noisy": View(images, v), "clean": View(images), "other": View(other, w)}
        inputs = {"pixel_values": images, "labels": torch.arange(5), "interpolate_pos_encoding": True}
        logits = forward_views(vit, PatchEmbeddingNoise(vit), inputs, views, "pixel_values", together=together)
        for name, x, noise in [("clean", images, None), ("other", other, w), ("noisy", images, v)]:
            torch.testing.assert_close(logits[name], logits_of(vit, x, 0.0 if noise is None else noise))
        sum(index * logits[name].square().sum() for index, name in enumerate(sorted(logits), 1)).backward()
        gradients = {name: parameter.grad for name, parameter in vit.named_parameters()}
        found.append(gradients | {str(each.shape): each.grad for each in (v, w) if each is not None})
    assert_same(*found, rtol=1e-9, atol=1e-12)


class Ascending(Objective):
    """The views of an image, each one step further along the gradient of the one before."""

    def __init__(self, steps):
        self.then = Ascending(steps - 1) if steps > 1 else None
        self.name = "clean" if self.then else "last"

    def views(self, batch):
        noise = None if batch.gradient is None else 100 * batch.gradient
        return {self.name: View(batch.images + (0 if noise is None else noise.mean()))}

    def loss(self, logits, batch):
        return batch.cross_entropy(logits[self.name])


def test_three_stages_are_three_losses_and_the_gradients_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "_OBJECTIVES", dict(objectives._OBJECTIVES))
    register_objective("ascending", lambda args: Ascending(3))
    data = Images(count=8, dtype=torch.float64)
    given = {"objective": "ascending", "rounds": 1, "steps_per_round": 1, "max_grad_norm": 0.0, "optim": "sgd"}
    trainer = trained(tmp_path, data=data, weight_decay=0.0, **given)
    vit, x, y, total = tiny_model().double(), data.pixel_values, data.labels, 0.0
    for _ in range(3):
        zero = torch.zeros(8, 16, 24, dtype=torch.float64, requires_grad=True)
        loss = cross_entropy(logits_of(vit, x, zero), y)
        total = total + loss
        x = x + 100 * torch.autograd.grad(loss, zero, retain_graph=True)[0].mean()
    total.backward()
    expected = {name: value.detach() - 1e-2 * value.grad for name, value in vit.named_parameters()}
    assert_same(dict(trainer.model.named_parameters()), expected, rtol=1e-9, atol=1e-11)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-6)


def test_only_the_last_backward_pass_is_synchronised():
    """Each of the others is inside of no_sync with its forward pass, as DDP wants it; afterwards all is as before."""
    stages, seen, events = Stages(Ascending(3)), [], []

    @contextmanager
    def no_sync():
        events.append("open")
        yield
        events.append("close")

    def step():
        seen.append(stages.objective)
        events.append("step")
        return torch.tensor(float(len(seen)))

    assert stages.run(step, no_sync) == 1 + 2 + 3
    assert events == ["open", "step", "close"] * 2 + ["step"]
    assert [objective.name for objective in seen] == ["clean", "clean", "last"]
    assert stages.objective is seen[0]
    with pytest.raises(ZeroDivisionError):
        stages.run(lambda: 1 / 0, no_sync)
    assert stages.objective is seen[0]


def test_weights_over_processes_are_refused():
    with pytest.raises(ValueError, match=r"not supported with FSDP and DeepSpeed; use DDP"):
        Stages(Ascending(2), sharded=True)
    Stages(Ascending(1), sharded=True)
