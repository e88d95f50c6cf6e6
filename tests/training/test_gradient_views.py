"""Views from the step's own gradient: each objective against a loop without Trainer, hook and second backward pass."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.training.gradient_views import along
from tiny_models import FAMILIES, normal, tiny_model
from tiny_training import Images, Recorder, assert_differs, assert_same, labelled, logged, parameters_of, trained
from written_out import fine_tuned, logits_of

SHARE = 0.3


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """(x, y) of every step: their order depends on the seed alone, so a run with two views without noise shows it."""
    model = tiny_model().double()
    recorder, data = Recorder(model), Images(dtype=torch.float64)
    trained(tmp_path_factory.mktemp("order"), model, data, objective="plain")
    return labelled([images for training, images in recorder.seen if training][::2], data)


def fgm_loss(vit, x, y):
    """CE(z, y) + CE(z', y), with the gradient taken by autograd at the embeddings themselves."""
    embeddings = vit.vit.embeddings.patch_embeddings(x)
    tokens = torch.cat([vit.vit.embeddings.cls_token.expand(len(x), -1, -1), embeddings], 1)
    tokens = tokens + vit.vit.embeddings.position_embeddings
    for layer in vit.vit.layers:
        tokens = layer(tokens)
    clean = cross_entropy(vit.classifier(vit.vit.layernorm(tokens)[:, 0]), y)
    (g,) = torch.autograd.grad(clean, embeddings, retain_graph=True)
    u = embeddings.detach()
    sizes = (u - u.mean(2, keepdim=True)).square().sum((1, 2)).sqrt()
    noise = SHARE * sizes[:, None, None] * g / g.square().sum((1, 2), keepdim=True).sqrt()
    return clean + cross_entropy(logits_of(vit, x, noise), y)


@pytest.mark.parametrize("objective", ["fgm", "plain+fgm", "nullspace+fgm"])
def test_fgm_is_the_loop_without_the_trainer(tmp_path, batches, objective):
    """In a sum the gradient is that of the sum of all losses of the clean view, which has the same direction here."""
    trainer = trained(tmp_path, objective=objective, fgm_share=SHARE, max_grad_norm=0.0)
    bank = [noise.tensor for noise in load_noise_bank(tmp_path / "noises")] if "nullspace" in objective else []

    def loss(vit, x, y, step):
        other = {"fgm": 0, "plain+fgm": 2, "nullspace+fgm": 1}[objective] * cross_entropy(logits_of(vit, x), y)
        if bank:
            other = other + cross_entropy(logits_of(vit, x, bank[step // 2]), y)
        return other + fgm_loss(vit, x, y)

    theirs, losses = fine_tuned(batches, loss)
    assert_same(parameters_of(trainer.model), parameters_of(theirs), rtol=1e-7, atol=1e-9)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)


def test_the_noise_has_the_norm_that_was_asked_for_or_is_zero():
    """Where the gradient is zero (an image that counts for nothing), or not finite (fp16 before its scale is found)."""
    gradient, norms = normal(4, 16, 24), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    gradient[1], gradient[2, 3, 4] = 0, torch.inf
    noise = along(gradient, norms)
    torch.testing.assert_close(torch.linalg.vector_norm(noise, dim=(1, 2)), norms * torch.tensor([1.0, 0, 0, 1]))
    torch.testing.assert_close(noise[0], gradient[0] / gradient[0].norm())
    torch.testing.assert_close(along(1e-3 * gradient, norms), noise)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(tmp_path, family):
    trainer = trained(tmp_path, tiny_model(family), Images(), objective="fgm", rounds=1)
    assert trainer.cost.summary()["forward_equivalents"] == 6 * 2 * 8, "two views of 8 images: the price of plain"
    before = parameters_of(tiny_model(family))
    for part in ("clas", "patch_embed"):  # the head, and below the noise
        assert_differs(
            *({k: v for k, v in each.items() if part in k} for each in (parameters_of(trainer.model), before))
        )


@pytest.mark.parametrize("objective", ["fgm"])
def test_accumulation_and_checkpointed_activations_change_nothing(tmp_path, objective):
    given = {"objective": objective, "max_grad_norm": 0.0}
    whole = trained(tmp_path / "whole", **given)
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # before 5.19
    pieces = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, f"{kind}_checkpointing": True}
    other = trained(tmp_path / "pieces", **given | pieces)
    assert_same(parameters_of(other.model), parameters_of(whole.model), rtol=1e-7, atol=1e-9)
    assert logged(other, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["fgm"])
def test_compiled(tmp_path, objective):
    """Slow: two graphs, one that gives the gradient of a noise and one with a noise for each image."""
    given = {"objective": objective, "max_grad_norm": 0.0}
    whole = trained(tmp_path / "whole", **given)
    torch._dynamo.reset()
    compiled = trained(tmp_path / "compiled", **given, torch_compile=True, torch_compile_backend="aot_eager")
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert_same(parameters_of(compiled.model), parameters_of(whole.model), rtol=1e-6, atol=1e-9)
    torch._dynamo.reset()
