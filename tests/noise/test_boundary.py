"""follow_boundary against a plain transcription, and what it promises about the noises and the model."""

import itertools
import logging
import math

import pytest
import torch
from test_algorithm1 import held_out, stream

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.noise.artifact import model_hash
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.calibration import calibrate, scale_to_influence
from hf_nullspace.noise.influence import centre, centred_norm
from hf_nullspace.noise.probe import probing
from tiny_models import FAMILIES, cosine, normal, tiny_model
from written_out import influence, influence_of, logits_of

EPSILON = 0.01
UNMOVED = {"steps": 1, "learning_rate": 1e-9}
"""A step that leaves the direction where it was."""
HELD_OUT = held_out()


def follow(vit, seed=5, batches=None, start=None, **given):
    settings = BoundarySettings(**({"epsilon": EPSILON, "steps": 8, "pool_images": 18} | given))
    return follow_boundary(vit, batches or stream(), settings, seed=seed, held_out=HELD_OUT, start=start)


def held_out_influence(vit, noise):
    return influence_of(vit.eval(), torch.cat(HELD_OUT), noise.double())


def transcription(vit, v, radius, steps, rate, longest, seed):
    """Projected Adam on the direction, the radius after the influence; three batches of the pool over and over."""
    pool, order, influences = list(itertools.islice(stream(), 3)), [], []
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for t in range(1, steps + 1):
        if not order:
            generator = torch.Generator().manual_seed(derive_seed(seed, 2, (t - 1) // 3))
            order = torch.randperm(3, generator=generator).tolist()
        x = pool[order.pop()]
        u = v.clone().requires_grad_()
        noise = radius * u / u.norm()
        noise = noise * (longest / noise.norm(dim=-1, keepdim=True)).clamp(max=1)
        z, z_noisy = logits_of(vit, x, 0), logits_of(vit, x, noise)
        (gradient,) = torch.autograd.grad((z_noisy - z).norm(dim=1).mean(), [u])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        now = rate / math.sqrt(16 * 24) * (1 + math.cos(math.pi * (t - 1) / steps)) / 2
        v = v - now * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        v = centre(v)
        v = v / v.norm()
        influences.append(influence(z, z_noisy))
        radius *= min(max((EPSILON / influences[-1]) ** 0.25, 0.7), 1.3)
    return v, influences


@pytest.mark.parametrize("noise_limit", [3.0, 0.7])
def test_it_is_the_transcription_step_by_step(noise_limit):
    vit = tiny_model().double().eval()
    longest = noise_limit * math.sqrt(24 / 3)  # the lower limit cuts tokens
    v = centre(torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(5)).double())
    v = v / v.norm()

    def at(radius):
        return influence_of(vit, HELD_OUT[0], cut(radius * v, longest))

    radius = scale_to_influence(at, EPSILON, start=longest * 4 / 8, tolerance=0.25).factor
    expected, influences = transcription(vit, v, radius, 8, 0.2, longest, 5)
    (found,), history = follow(vit, noise_limit=noise_limit)
    assert history.influence == pytest.approx(influences, rel=1e-9)
    assert history.steps == 8
    lengths = found.tensor.norm(dim=-1)
    assert (noise_limit == 0.7) == bool((lengths > 0.9999 * longest).any())
    radius, _, _ = scale_to_influence(
        lambda radius: held_out_influence(vit, cut(radius * expected, longest)),
        0.98 * EPSILON, start=radius, tolerance=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(found.tensor.double(), cut(radius * expected, longest), rtol=0.03, atol=0.01)


def cut(noise, longest):
    return noise * (longest / noise.norm(dim=-1, keepdim=True)).clamp(max=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_within_epsilon_on_held_out_images_for_every_family(family):
    model = tiny_model(family).double()
    before = model_hash(model)
    model.train()
    (noise,), history = follow(model, steps=3, noise_limit=30)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model_hash(model) == before
    model.eval()
    with probing(model, HELD_OUT) as probe:
        measured = probe.held_out_influence(noise.tensor)
    assert 0.95 * EPSILON < measured <= EPSILON
    assert history.held_out_influence == noise.provenance.influence == pytest.approx(measured)
    assert noise.provenance.influence_images == 18
    assert centre(noise.tensor).sub(noise.tensor).abs().max() < 1e-5, "nothing along the LayerNorm direction"


def test_it_reaches_a_larger_norm_than_a_random_direction():
    vit = tiny_model().double()
    (random,), _ = follow(vit, **UNMOVED)
    (found,), _ = follow(vit, steps=25)
    assert found.centred_norm > 1.2 * random.centred_norm


def test_a_start_is_where_it_starts_and_missing_ones_are_random():
    vit = tiny_model().double()
    start = 100 * normal(1, 16, 24, seed=8, dtype=torch.float32)
    (given, random), _ = follow(vit, **UNMOVED, count=2, start=start)
    assert cosine(given.tensor, centre(start)) > 1 - 1e-6
    assert cosine(random.tensor, follow(vit, **UNMOVED, count=2)[0][1].tensor) > 1 - 1e-6


def test_several_noises_differ_and_each_is_within_epsilon():
    vit = tiny_model().double()
    found, history = follow(vit, count=3)
    assert len(found) == 3
    assert history.steps == 8
    for noise in found:
        assert 0.95 * EPSILON < held_out_influence(vit, noise.tensor) <= EPSILON
    assert abs(cosine(found[0].tensor, found[1].tensor)) < 0.5


def test_no_token_is_longer_than_the_limit():
    vit = tiny_model().double()
    (free,), _ = follow(vit, steps=12)
    limit = 0.6 * float(free.tensor.norm(dim=-1).max()) / math.sqrt(24 / 3)
    (bounded,), _ = follow(vit, steps=12, noise_limit=limit)
    assert bounded.tensor.norm(dim=-1).max() <= limit * math.sqrt(24 / 3) * (1 + 1e-6)
    assert held_out_influence(vit, bounded.tensor) <= EPSILON


def test_a_noise_that_stays_inside_at_every_length_has_every_token_as_long_as_it_may_be(caplog):
    vit = tiny_model().double()
    with caplog.at_level(logging.WARNING, "hf_nullspace"):
        (noise,), history = follow(vit, epsilon=0.5, noise_limit=0.01, steps=2)
    assert history.stopped == noise.provenance.stopped == "bound"
    (record,) = caplog.records
    assert record.message.startswith("every token of the noise is as long as noise_limit (A) allows, and its influence")
    torch.testing.assert_close(
        noise.tensor.norm(dim=-1), torch.full((1, 16), 0.01 * math.sqrt(24 / 3)), check_dtype=False
    )
    assert 0 < history.held_out_influence < 0.01


def test_on_a_new_head_the_default_learner_warns_that_it_found_no_noise(caplog):
    vit = tiny_model().double()
    torch.nn.init.normal_(vit.classifier.weight, std=0.002)
    with caplog.at_level(logging.WARNING, "hf_nullspace"):
        noises, history = follow(vit, epsilon=0.03, count=2)
    assert history.held_out_influence < 0.96 * 0.03
    assert [history.stopped, *(noise.provenance.stopped for noise in noises)] == ["bound"] * 3
    assert "train it first" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_nullspace"):
        (noise,), history = follow(tiny_model().double())
    assert history.stopped == noise.provenance.stopped == "calibrated"
    assert not caplog.records


class Calls:
    """A model that notes how many images each call had, and whether a gradient was wanted."""

    def __init__(self, vit):
        self.seen = []
        vit.register_forward_pre_hook(lambda module, args, given: self.note(given["pixel_values"]), with_kwargs=True)

    def note(self, images):
        self.seen.append((len(images), torch.is_grad_enabled()))


@pytest.mark.parametrize("pool", [21, 0])
def test_cached_clean_logits_cost_two_passes_a_step_and_fresh_ones_three(pool):
    vit = tiny_model().double()
    calls = Calls(vit)
    follow(vit, batches=stream(batch_size=7), pool_images=pool)  # held-out batches have 6 images
    clean, noisy = calls.seen.count((7, False)), calls.seen.count((7, True))
    assert noisy == 8, "a forward and a backward pass"
    assert clean == (3 if pool else 8), "of the pool once, or of every batch"


def test_nan_is_named_with_its_step():
    with pytest.raises(FloatingPointError, match="noise step 0"):
        follow(tiny_model().double(), batches=(batch * float("nan") for batch in stream()))


def test_a_scaled_random_direction_agrees_with_the_calibration_of_the_controls():
    vit = tiny_model().double()
    (ours,), _ = follow(vit, **UNMOVED)
    (theirs,) = calibrate(vit, [ours.tensor], EPSILON * 0.98, HELD_OUT, tolerance=0.001)
    assert ours.centred_norm == pytest.approx(float(centred_norm(theirs.noise)), rel=0.03)


@pytest.mark.parametrize(("pool_images", "batches"), [(18, 3), (19, 4), (1, 1), (0, 6)])
def test_the_pool_holds_as_many_batches_as_it_needs_images(pool_images, batches):
    """Six steps on batches of six images; without a pool every step takes one."""
    taken = []
    source = stream()
    follow(tiny_model().double().eval(), batches=(taken.append(1) or next(source) for _ in range(99)), steps=6,
           pool_images=pool_images)  # fmt: skip
    assert len(taken) == batches


def test_a_noise_grows_until_tokens_of_a_tenth_of_the_mean_length_are_cut():
    """A small limit keeps even the longest noise inside epsilon; the token of 1 / 9.5 of the mean is cut as well."""
    limit = 1e-3
    longest = limit * math.sqrt(24 / 3)
    start = centre(torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(5)).double())
    start = start / start.norm(dim=-1, keepdim=True)
    start[0, 3] *= 1 / 9.5
    start = start / start.norm() * 4  # now 1 is the mean length
    start[0, 3] *= 1 / 9.5 / start[0, 3].norm()
    (found,), _ = follow(tiny_model().double().eval(), start=start, steps=1, learning_rate=1e-9, noise_limit=limit)
    assert found.provenance.influence < EPSILON / 2
    torch.testing.assert_close(
        found.tensor.norm(dim=-1), torch.full((1, 16), longest, dtype=torch.float64), rtol=1e-6, atol=0
    )
