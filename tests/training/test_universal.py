"""One noise for all images that the training ascends: against a loop without the library; in pieces, resumed."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.training.record import STATE_NAME
from tiny_models import FAMILIES, tiny_model
from tiny_training import Images, Recorder, assert_same, labelled, logged, parameters_of, trained
from written_out import fine_tuned, logits_of

SHARE, STEP = 0.3, 0.8
GIVEN = {"universal_share": SHARE, "universal_step": STEP, "max_grad_norm": 0.0}


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """(x, y) of every step: their order depends on the seed alone, so a run with two views without noise shows it."""
    model, data = tiny_model().double(), Images(dtype=torch.float64)
    recorder = Recorder(model)
    trained(tmp_path_factory.mktemp("order"), model, data, objective="plain")
    return labelled([images for training, images in recorder.seen if training][::2], data)


class AtTheEmbeddings:
    """CE(z, y) + CE(z', y), and v goes up: ``ascend`` after each step's backward pass."""

    def __init__(self):
        self.v = torch.zeros(1, 16, 24, dtype=torch.float64, requires_grad=True)

    def __call__(self, vit, x, y):
        u = vit.vit.embeddings.patch_embeddings(x).detach()
        self.radius = SHARE * (u - u.mean(2, keepdim=True)).square().sum((1, 2)).sqrt().mean()
        return cross_entropy(logits_of(vit, x), y) + cross_entropy(logits_of(vit, x, self.v), y)

    def ascend(self):
        moved = self.v.detach() + STEP * self.radius * self.v.grad / self.v.grad.norm()
        if moved.norm() > self.radius:
            moved = moved * self.radius / moved.norm()
        self.v = moved.requires_grad_()


def state_of(trainer):
    return list(trainer.record.objective.state().values())


@pytest.mark.parametrize("objective", ["universal", "plain+universal", "nullspace+universal"])
def test_it_is_the_loop_without_the_trainer(tmp_path, batches, objective):
    trainer = trained(tmp_path, objective=objective, **GIVEN)
    bank = [noise.tensor for noise in load_noise_bank(tmp_path / "noises")] if "nullspace" in objective else []
    written = AtTheEmbeddings()

    def loss(vit, x, y, step):
        if step:
            written.ascend()
        other = 0.0
        if objective != "universal":
            other = cross_entropy(logits_of(vit, x), y) + cross_entropy(
                logits_of(vit, x, bank[step // 2] if bank else 0), y
            )
        return other + written(vit, x, y)

    theirs, losses = fine_tuned(batches, loss)
    assert_same(parameters_of(trainer.model), parameters_of(theirs), rtol=1e-7, atol=1e-9)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    written.ascend()
    torch.testing.assert_close(written.v.norm(), written.radius, msg="no step was projected")
    torch.testing.assert_close(state_of(trainer), [written.v.detach()], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_for_the_price_of_plain(tmp_path, family):
    trainer = trained(tmp_path, tiny_model(family), Images(), objective="universal", rounds=1)
    assert trainer.cost.summary()["forward_equivalents"] == 6 * 2 * 8, "two views of 8 images"
    assert state_of(trainer)[0].norm() > 0


def test_accumulation_and_checkpointed_activations_change_nothing(tmp_path):
    """The noise goes up once per optimizer step, along the sum over its micro-batches."""
    given = GIVEN | {"objective": "universal"}
    whole = trained(tmp_path / "whole", **given)
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # before 5.19
    pieces = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, f"{kind}_checkpointing": True}
    other = trained(tmp_path / "pieces", **given | pieces)
    assert_same(parameters_of(other.model), parameters_of(whole.model), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(state_of(other), state_of(whole), rtol=1e-7, atol=1e-9)


def test_it_goes_on_from_a_checkpoint_that_has_it(tmp_path):
    given = GIVEN | {"objective": "universal", "save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path / "run", **given)
    half = tmp_path / "run" / "checkpoint-2"
    other = trained(tmp_path / "again", resume=half, **given)
    assert_same(parameters_of(other.model), parameters_of(whole.model))
    torch.testing.assert_close(state_of(other), state_of(whole), rtol=0, atol=0)
    (half / "manifest.json").unlink()  # as a checkpoint from elsewhere
    save_file({name: tensor[:, :4].clone() for name, tensor in load_file(half / STATE_NAME).items()}, half / STATE_NAME)
    with pytest.raises(
        ValueError, match=r"has the shape \(1, 4, 24\), expected \(1, 16, 24\): go on with the settings"
    ):
        trained(tmp_path / "other", resume=half, **given)
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
        (noise,) = objective.noise([before.shape], torch.ones(8, dtype=torch.float64))
        (values * noise).sum().backward()
        objective.end_step()
        assert torch.equal(state_of(trainer)[0], before) == (values == torch.inf)
        assert objective._noise[0].grad is None


@pytest.mark.slow
def test_compiled(tmp_path):
    """Slow: two graphs, one of them with a noise that needs a gradient."""
    given = GIVEN | {"objective": "universal"}
    whole = trained(tmp_path / "whole", **given)
    torch._dynamo.reset()
    compiled = trained(tmp_path / "compiled", **given, torch_compile=True, torch_compile_backend="aot_eager")
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert_same(parameters_of(compiled.model), parameters_of(whole.model), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(state_of(compiled), state_of(whole), rtol=1e-6, atol=1e-9)
    torch._dynamo.reset()
