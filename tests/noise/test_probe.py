"""The numbers that a probe measures, against plain PyTorch."""

import pytest
import torch

from hf_nullspace.models.patch_embedding import patch_embedding_noise
from hf_nullspace.noise.algorithm1 import l2, squared_l2
from hf_nullspace.noise.influence import noise_influence
from hf_nullspace.noise.probe import probing
from tiny_models import normal, tiny_model
from written_out import influence_of, logits_of


def images(count, seed=1, dtype=torch.float64):
    return normal(count, 3, 16, 16, seed=seed).to(dtype)


def noise(count=1, dtype=torch.float64):
    return 0.3 * normal(count, 16, 24, seed=2).to(dtype)


def test_half_precision_logits_are_compared_in_float32():
    """In bfloat16 itself the softmax and its differences would have 3 digits."""
    model = tiny_model().to(torch.bfloat16)
    x, v = images(6, dtype=torch.bfloat16), noise(dtype=torch.float32)
    with torch.no_grad():
        clean = model(pixel_values=x).logits
        with patch_embedding_noise(model, v):
            noisy = model(pixel_values=x).logits
    assert clean.dtype == torch.bfloat16
    expected = noise_influence(clean.float(), noisy.float()).item()
    distance = torch.linalg.vector_norm(noisy.float() - clean.float(), dim=1).mean().item()
    with probing(model, [x]) as probe:
        assert probe.clean[0].dtype == probe.clean_logits(x).dtype == torch.float32
        assert probe.held_out_influence(v) == pytest.approx(expected, rel=1e-6)
        (influence,), (loss,), gradient = probe.measure(x, v.requires_grad_(), l2)
    assert influence == pytest.approx(expected, rel=1e-6)
    assert loss == pytest.approx(distance, rel=1e-6)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("chunk_size", [None, 4, 1])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_every_noise_has_its_own_images(chunk_size, known, squared):
    """Three noises over eleven images: number m has the images m, m + 3, ...; each number is the mean over those."""
    model = tiny_model().double()
    x, v = images(11), noise(3).requires_grad_()
    with probing(model, [images(5, seed=3), images(2, seed=4)], chunk_size=chunk_size) as probe:
        clean = probe.clean_logits(x) if known else None
        influences, losses, gradient = probe.measure(x, v, squared_l2 if squared else l2, clean)
        for m in range(3):
            own, one = x[m::3], v[m : m + 1].detach().requires_grad_()
            distance = torch.linalg.vector_norm(logits_of(model, own, one) - logits_of(model, own), dim=1)
            loss = (distance.square() if squared else distance).mean()
            (expected,) = torch.autograd.grad(loss, one)
            assert influences[m] == pytest.approx(influence_of(model, own, one), rel=1e-9)
            assert losses[m] == pytest.approx(loss.item(), rel=1e-9)
            torch.testing.assert_close(gradient[m : m + 1], expected, rtol=1e-9, atol=1e-12)


def test_the_held_out_influence_is_the_mean_over_images_whatever_the_batches():
    model, v = tiny_model().double(), noise()
    batches = [images(5, seed=3), images(2, seed=4)]
    for chunk_size in (None, 3):
        with probing(model, batches, chunk_size=chunk_size) as probe:
            assert probe.held_out_images == 7
            whole, first = probe.held_out_influence(v), probe.held_out_influence(v, 1)
            for found, seen in ((whole, torch.cat(batches)), (first, batches[0][:chunk_size])):
                assert found == pytest.approx(influence_of(model, seen, v), rel=1e-9)


def test_a_sharded_model_of_one_process_is_asked_as_often():
    """Pieces that count for nothing are only for a rank with fewer than another one."""
    model = tiny_model().double()
    with probing(model, [images(5, seed=3)], chunk_size=2) as probe:
        before = [(len(piece), count) for piece, count in probe.chunks([images(7)])]
        probe.sharded = True
        assert [(len(piece), count) for piece, count in probe.chunks([images(7)])] == before
    assert before == [(2, 2), (2, 2), (2, 2), (1, 1)]
