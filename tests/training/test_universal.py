"""One noise for all images that the training ascends: against a loop without the library; in pieces, resumed."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.training.record import STATE_NAME
from tiny_attacks import EPS, agree, denormalise, normalise, trained
from tiny_models import FAMILIES, tiny_model
from tiny_training import Images, assert_same, parameters_of
from written_out import logits_of

SHARE, STEP = 0.3, 0.8
SCALES, MULTIPLIERS = [6, 1], [3.0, 0.5]
GIVEN = {"universal_share": SHARE, "universal_step": STEP, "pyramid_scales": SCALES, "pyramid_multipliers": MULTIPLIERS}
PLACES = ["embeddings", "pixels"]


class OnEmbeddings:
    """CE(z', y), and v goes up along the gradient: ``ascend`` after each step's backward pass."""

    def __init__(self):
        self.noise = [torch.zeros(1, 16, 24, dtype=torch.float64, requires_grad=True)]

    def loss(self, vit, x, y):
        u = vit.vit.embeddings.patch_embeddings(x).detach()
        self.radius = SHARE * (u - u.mean(2, keepdim=True)).square().sum((1, 2)).sqrt().mean()
        return cross_entropy(logits_of(vit, x, self.noise[0]), y)

    def ascend(self):
        (v,) = self.noise
        moved = v.detach() + STEP * self.radius * v.grad / v.grad.norm()
        if moved.norm() > self.radius:
            moved = moved * self.radius / moved.norm()
        self.noise = [moved.requires_grad_()]


class InPixels:
    """The same at two scales; 6 px squares on an image of 16 px: the last ones are cut."""

    def __init__(self):
        self.noise = [torch.zeros(1, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (3, 16)]

    def loss(self, vit, x, y):
        place = torch.arange(16)
        change = sum(
            multiplier * delta[:, :, place // scale][:, :, :, place // scale]
            for scale, multiplier, delta in zip(SCALES, MULTIPLIERS, self.noise, strict=True)
        )
        return cross_entropy(logits_of(vit, normalise((denormalise(x) + change).clamp(0, 1))), y)

    def ascend(self):
        moved = [delta.detach() + STEP * EPS * delta.grad.sign() for delta in self.noise]
        self.noise = [delta.clamp(-EPS, EPS).requires_grad_() for delta in moved]


def state_of(trainer):
    return list(trainer.record.objective.state().values())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("objective", ["universal", "nullspace+universal"])
def test_it_is_the_loop_without_the_trainer(tmp_path, objective, place):
    trainer = trained(tmp_path, objective=objective, universal_in=place, **GIVEN)
    bank = [noise.tensor for noise in load_noise_bank(tmp_path / "noises")] if "nullspace" in objective else []
    written = {"embeddings": OnEmbeddings, "pixels": InPixels}[place]()

    def loss(vit, x, y, step):
        if step:
            written.ascend()
        times = 2 if bank else 1
        other = cross_entropy(logits_of(vit, x, bank[step // 2]), y) if bank else 0.0
        return times * cross_entropy(logits_of(vit, x), y) + other + written.loss(vit, x, y)

    agree(trainer, loss, tmp_path)
    written.ascend()
    expected = [each.detach() for each in written.noise]
    torch.testing.assert_close(state_of(trainer), expected, rtol=1e-7, atol=1e-9)
    sizes = (
        [each.abs().max() / EPS for each in expected] if place == "pixels" else [expected[0].norm() / written.radius]
    )
    assert max(sizes).item() == pytest.approx(1), "no step was too far"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_for_the_price_of_plain(tmp_path, family):
    trainer = trained(tmp_path, tiny_model(family), Images(), objective="universal", rounds=1, processing_class=None)
    assert trainer.cost.summary()["forward_equivalents"] == 6 * 2 * 8, "two views of 8 images"
    assert state_of(trainer)[0].norm() > 0


@pytest.mark.parametrize("place", PLACES)
def test_accumulation_and_checkpointed_activations_change_nothing(tmp_path, place):
    """The noise goes up once per optimizer step, along the sum over its micro-batches."""
    given = GIVEN | {"objective": "universal", "universal_in": place}
    whole = trained(tmp_path / "whole", **given)
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # before 5.19
    pieces = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, f"{kind}_checkpointing": True}
    other = trained(tmp_path / "pieces", **given | pieces)
    assert_same(parameters_of(other.model), parameters_of(whole.model), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(state_of(other), state_of(whole), rtol=1e-7, atol=1e-9)


def test_it_goes_on_from_a_checkpoint_that_has_it(tmp_path):
    given = GIVEN | {"objective": "universal", "save_strategy": "steps", "save_steps": 1, "universal_in": "pixels"}
    whole = trained(tmp_path / "run", **given)
    half = tmp_path / "run" / "checkpoint-2"
    other = trained(tmp_path / "again", resume=half, **given)
    assert_same(parameters_of(other.model), parameters_of(whole.model))
    torch.testing.assert_close(state_of(other), state_of(whole), rtol=0, atol=0)
    (half / "manifest.json").unlink()  # as a checkpoint from elsewhere
    words = (
        r"has the shape \(1, 3, 3, 3\), \(1, 3, 16, 16\), expected \(1, 3, 4, 4\), \(1, 3, 16, 16\): go on with the set"
    )
    with pytest.raises(ValueError, match=words):
        trained(tmp_path / "other", resume=half, **given | {"pyramid_scales": [4, 1]})
    (half / STATE_NAME).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{STATE_NAME} is damaged .*; go on from another checkpoint"):
        trained(tmp_path / "other", resume=half, **given)
    (half / STATE_NAME).unlink()
    with pytest.raises(
        ValueError, match="the checkpoint has no universal noise: it is of a run with another objective"
    ):
        trained(tmp_path / "other", resume=half, **given)


def test_a_gradient_that_is_not_finite_leaves_the_noise(tmp_path):
    """As in fp16, before its scale is found; the next step takes the next gradient."""
    trainer = trained(tmp_path, objective="universal", rounds=1, **GIVEN)
    objective, (before,) = trainer.record.objective, state_of(trainer)
    for values in (torch.inf, 1.0):
        (noise,) = objective.noise([before.shape], torch.ones(8, dtype=torch.float64))  # of a batch of 8
        (values * noise).sum().backward()
        objective.end_step()
        assert torch.equal(state_of(trainer)[0], before) == (values == torch.inf)
        assert objective._noise[0].grad is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.13: dynamo reads it
@pytest.mark.parametrize("place", PLACES)
def test_compiled(tmp_path, place):
    """Slow: two graphs, one of them with a noise, or with images, that needs a gradient."""
    given = GIVEN | {"objective": "universal", "universal_in": place}
    whole = trained(tmp_path / "whole", **given)
    torch._dynamo.reset()
    compiled = trained(tmp_path / "compiled", **given, torch_compile=True, torch_compile_backend="aot_eager")
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert_same(parameters_of(compiled.model), parameters_of(whole.model), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(state_of(compiled), state_of(whole), rtol=1e-6, atol=1e-9)
    torch._dynamo.reset()
