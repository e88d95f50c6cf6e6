"""The watch for catastrophic overfitting: its numbers, computed again without it; its words; a model that overfits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.training.noise_stream import noise_stream
from hf_nullspace.training.watch import SEVERAL_STEPS, SINGLE_STEP, overfitting
from tiny_models import tiny_model
from tiny_training import Images, trained
from written_out import logits_of

EPS = 0.005


class Pictures(Images):
    """Pixels in [0, 1], normalised with mean and std 0.5; nearly every image has the label that the model gives."""

    def __init__(self, count=100):
        super().__init__(count, torch.float64)
        self.pixel_values = 2 * self.pixel_values.sigmoid() - 1
        self.labels = torch.cat([logits_of(tiny_model().double(), each[None]).argmax(1) for each in self.pixel_values])
        self.labels[::7] = 0


def accuracy(vit, x, y, steps, step):
    """After ``steps`` signed steps in pixels from a uniform start, within EPS; image i starts from (seed 42, i)."""
    pixels = (x + 1) / 2
    draws = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(derive_seed(42, i))) for i in range(len(x))]
    adversarial = (pixels + EPS * (2 * torch.stack(draws).double() - 1)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(logits_of(vit, 2 * adversarial - 1), y), [adversarial])
        moved = adversarial.detach() + step * gradient.sign()
        adversarial = (pixels + (moved - pixels).clamp(-EPS, EPS)).clamp(0, 1)
    return float((logits_of(vit, 2 * adversarial - 1).argmax(1) == y).double().mean())


def test_it_logs_the_accuracies_on_images_of_a_stream_of_its_own(tmp_path):
    data = Pictures()
    given = {"processing_class": make_image_processor(16), "attack_eps": str(EPS), "max_grad_norm": 0.0}
    trainer = trained(tmp_path, data=data, objective="fast", rounds=2, steps_per_round=3, **given)
    logged = [entry for entry in trainer.state.log_history if SINGLE_STEP in entry]
    assert [entry["step"] for entry in logged] == [0, 3, 6]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    held_out, _ = noise_stream(data, lambda rows: {"rows": rows}, batch_size=64, held_out_images=64, seed=42, round=0,
                               input_name="rows")  # fmt: skip
    x, y = (torch.stack([row[name] for row in held_out[0]]) for name in ("pixel_values", "labels"))
    assert len(x) == 25, "a quarter of the images"
    for entry, model in ((logged[0], tiny_model().double()), (logged[-1], trainer.model)):
        assert entry[SINGLE_STEP] == pytest.approx(accuracy(model, x, y, 1, 1.25 * EPS), abs=1e-6)
        assert entry[SEVERAL_STEPS] == pytest.approx(accuracy(model, x, y, 10, EPS / 4), abs=1e-6)
    assert 0 < logged[0][SEVERAL_STEPS] < logged[0][SINGLE_STEP], "else the comparison would say little"


def test_it_warns_when_pgd_has_fallen_behind_the_single_step():
    start = {SINGLE_STEP: 0.4, SEVERAL_STEPS: 0.35}
    assert overfitting({SINGLE_STEP: 0.6, SEVERAL_STEPS: 0.36}, start) is None
    said = overfitting({SINGLE_STEP: 0.9, SEVERAL_STEPS: 0.0}, start)
    assert said is not None
    assert "catastrophic overfitting: 90% of the watched images" in said
    assert "0% under PGD-10 of the same radius (5% apart at the start)" in said
