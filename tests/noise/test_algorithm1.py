"""learn_noise against a plain transcription of Algorithm 1, and what it promises about the model."""

import itertools
import logging
import math

import pytest
import torch

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import EmbeddingShape, PatchEmbeddingNoise
from hf_nullspace.noise.algorithm1 import NoiseNotLearnedError, NoiseSettings, learn_noise, start_noise
from hf_nullspace.noise.artifact import model_hash
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.calibration import calibrate
from hf_nullspace.noise.history import NoiseHistory
from tiny_models import cosine, tiny_model
from written_out import algorithm_1, influence_of

SHAPE = EmbeddingShape(16, 24, (4, 4))


def stream(batch_size=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(batch_size, 3, 16, 16, generator=generator, dtype=dtype)


def held_out(dtype=torch.float64):
    return list(itertools.islice(stream(seed=99, dtype=dtype), 3))


class RecordingHook(PatchEmbeddingNoise):
    """The hook, keeping a copy of every noise that it is asked to add."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def adding(self, noise, parts=1):
        self.seen.append(noise.detach().clone())
        return super().adding(noise, parts)


STOPS = {"epsilon": 0.05, "max_steps": 60, "stop_on": "minibatch"}
EXPLORES = {"epsilon": None, "noise_limit": 0.1, "max_steps": 4, "norm_weight": 0.7}


@pytest.mark.parametrize(
    "given",
    [
        *({**STOPS, "loss": loss, "weight_decay": decay} for loss in ("l2", "squared_l2") for decay in (0.0, 0.01)),
        *({**EXPLORES, "norm": norm} for norm in ("centred", "raw")),
    ],
    ids=str,
)
def test_it_is_algorithm_1_step_by_step(given):
    vit, settings = tiny_model().double(), NoiseSettings(**given)
    expected, influences = algorithm_1(vit, stream(), 5, settings)
    if settings.epsilon:
        assert 5 < len(expected) < 60, "the test means something only if it stops by epsilon, after several steps"
    hook = RecordingHook(vit)
    noise, history = learn_noise(vit, stream(), settings, seed=5, hook=hook)
    for ours, theirs in zip(hook.seen, expected, strict=True):  # one noisy forward pass per step
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert torch.equal(noise.tensor, hook.seen[-1])
    assert history.influence[: len(influences)] == pytest.approx(influences, rel=1e-9)
    assert history.norm == pytest.approx([v.norm().item() for v in expected], rel=1e-9)
    assert history.steps == len(expected) - 1
    assert history.stopped == ("epsilon" if settings.epsilon else "steps")


@pytest.mark.parametrize("stop_on", ["minibatch", "held_out"])
def test_it_stops_where_the_influences_are_first_below_epsilon_and_nowhere_else(stop_on):
    """Epsilon a billionth above and below every influence of a known run, on the minibatch and on held-out images."""
    given = {"max_steps": 4, "learning_rate": 0.1}
    images, vit = next(stream()), tiny_model().double()
    hook = RecordingHook(vit)
    _, known = learn_noise(vit, itertools.repeat(images), NoiseSettings(epsilon=None, **given), seed=5, hook=hook)
    pairs = [
        (seen, influence_of(vit, torch.cat(held_out()), noise) if stop_on == "held_out" else 0.0)
        for noise, seen in zip(hook.seen, known.influence, strict=True)
    ]
    assert len(pairs) == 5
    ends = set()
    for value in {value for pair in pairs for value in pair} - {0.0}:
        for epsilon in (value * (1 - 1e-9), value * (1 + 1e-9)):
            settings = NoiseSettings(epsilon=epsilon, stop_on=stop_on, **given)
            _, history = learn_noise(vit, itertools.repeat(images), settings, seed=5, held_out=held_out(), hook=hook)
            first = next((step for step, pair in enumerate(pairs) if max(pair) < epsilon), None)
            word = "steps" if first is None else "epsilon" if first else "start"
            assert (history.steps, history.stopped) == (4 if first is None else first, word)
            ends.add(first)
    assert len(ends) >= 4, "runs of several lengths"


@pytest.mark.parametrize("stop_on", ["minibatch", "held_out"])
def test_equal_to_epsilon_is_not_below(stop_on):
    vit, images = tiny_model().double(), next(stream())
    given = {"stop_on": stop_on, "max_steps": 1}
    batch = itertools.repeat(images)
    _, known = learn_noise(vit, batch, NoiseSettings(epsilon=1e-9, **given), seed=5, held_out=[images])
    settings = NoiseSettings(epsilon=known.influence[0], **given)
    assert learn_noise(vit, batch, settings, seed=5, held_out=[images])[1].steps == 1


def test_epsilon_is_true_of_the_noise_that_is_returned():
    vit = tiny_model().double()
    noise, history = learn_noise(vit, stream(), NoiseSettings(epsilon=0.05), seed=5, held_out=held_out())
    assert history.stopped == "epsilon"
    measured = influence_of(vit, torch.cat(held_out()), noise.tensor)
    assert measured < 0.05
    assert history.held_out_influence == pytest.approx(measured, rel=1e-9)
    assert noise.provenance.influence == history.held_out_influence
    assert noise.provenance.influence_images == 18
    assert noise.provenance.model_sha256 == model_hash(vit)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(training, fails):
    vit = tiny_model().train(training)
    vit.classifier.train(not training)
    vit.classifier.bias.requires_grad_(False)
    modes = [module.training for module in vit.modules()]
    before, flags = model_hash(vit), [p.requires_grad for p in vit.parameters()]
    settings = NoiseSettings(epsilon=1e-9, max_steps=3, stop_on="minibatch")
    if fails:
        with pytest.raises(ValueError, match="ran out at noise step 2"):
            learn_noise(vit, itertools.islice(stream(dtype=torch.float32), 2), settings, seed=0)
    else:
        learn_noise(vit, stream(dtype=torch.float32), settings, seed=0)
    assert [module.training for module in vit.modules()] == modes
    assert [p.requires_grad for p in vit.parameters()] == flags
    assert all(p.grad is None for p in vit.parameters())
    assert model_hash(vit) == before
    assert not vit.get_input_embeddings()._forward_hooks


def test_learning_runs_in_eval_mode():
    vit = tiny_model()
    for module in vit.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    settings = NoiseSettings(epsilon=None, max_steps=2)
    quiet, _ = learn_noise(vit.eval(), stream(dtype=torch.float32), settings, seed=0)
    again, _ = learn_noise(vit.train(), stream(dtype=torch.float32), settings, seed=0)
    assert torch.equal(quiet.tensor, again.tensor)


def test_what_happens_at_the_limit_is_an_option(caplog):
    caplog.set_level(logging.WARNING, "hf_nullspace")
    vit = tiny_model().double()
    limited = {"epsilon": 1e-4, "max_steps": 5}
    noise, history = learn_noise(vit, stream(), NoiseSettings(**limited), seed=0, held_out=held_out())
    assert history.stopped == "steps"
    assert history.steps == 5
    assert history.held_out_influence > 1e-4
    with pytest.raises(NoiseNotLearnedError, match="5 steps left the influence at"):
        learn_noise(vit, stream(), NoiseSettings(**limited, on_limit="error"), seed=0, held_out=held_out())
    scaled, history = learn_noise(
        vit, stream(), NoiseSettings(**limited, on_limit="rescale"), seed=0, held_out=held_out()
    )
    assert history.stopped == "rescaled"
    assert caplog.text.count("5 noise steps did not reach epsilon=0.0001; the noise is") == 2
    assert "used as it is" in caplog.text
    assert "scaled into it" in caplog.text
    assert 0 < history.held_out_influence <= 1e-4
    assert cosine(scaled.tensor, noise.tensor) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("stop_on", "known"), [("held_out", True), ("minibatch", True), ("minibatch", False)])
def test_a_start_inside_epsilon_is_reported(stop_on, known, caplog):
    """Without held-out images with its influence on the last minibatch."""
    vit = tiny_model().double()
    torch.nn.init.normal_(vit.classifier.weight, std=0.002)  # a head that was just made
    images = held_out() if known else ()
    with caplog.at_level(logging.WARNING, "hf_nullspace"):
        noise, history = learn_noise(vit, stream(), NoiseSettings(stop_on=stop_on), seed=5, held_out=images)
    assert torch.equal(noise.tensor, start_noise(SHAPE, 3.0, 5).double())
    assert (history.steps, history.stopped, noise.provenance.stopped) == (0, "start", "start")
    (record,) = caplog.records
    assert "no step was taken and nothing was learned; raise noise_limit (A)" in record.message
    (last,) = history.influence
    assert (history.held_out_influence is not None) == known
    shown = history.held_out_influence if known else last
    assert record.message.startswith(f"the noise began with an influence of {shown:.3g}, inside epsilon=0.03")


def test_nan_names_the_step():
    vit = tiny_model()
    bad = [next(stream(dtype=torch.float32)), torch.full((2, 3, 16, 16), float("nan"))]
    with pytest.raises(FloatingPointError, match=r"noise step 1: influence nan, loss nan on minibatch.*the images"):
        learn_noise(vit, bad, NoiseSettings(epsilon=1e-9, stop_on="minibatch"), seed=0)
    pole = NoiseSettings(epsilon=None, max_steps=1, norm_weight=1.0)  # log||v|| at 0
    with pytest.raises(FloatingPointError, match=r"noise step 1: .*the noise is: lower its learning rate"):
        learn_noise(vit, stream(dtype=torch.float32), pole, seed=0, start=torch.zeros(1, 16, 24))


SOURCES = {
    "the images": None,
    "the weight classifier.bias is": ("classifier.bias", math.nan),
    "the patch embeddings are": ("vit.embeddings.patch_embeddings.projection.bias", 65504.0),
    "the clean logits are": ("vit.layernorm.weight", 65504.0),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("learner", ["descent", "boundary", "calibration"])
def test_what_is_nan_is_named_before_anything_is_learned(source, learner):
    vit, images = tiny_model().half(), [1000 * batch for batch in held_out(torch.float16)]
    if SOURCES[source] is None:
        images[1][0, 0, 0, 0] = math.nan
    else:
        name, value = SOURCES[source]
        torch.nn.init.constant_(vit.get_parameter(name), value)
    with pytest.raises(FloatingPointError, match=f"logits without noise on held-out images, NaN or infinite: {source}"):
        learn_with(learner, vit, images)


def learn_with(learner, vit, images):
    batches, direction = stream(dtype=images[0].dtype), torch.ones(1, 16, 24)
    if learner == "descent":
        return learn_noise(vit, batches, NoiseSettings(on_limit="rescale"), seed=0, held_out=images)
    if learner == "boundary":
        return follow_boundary(vit, batches, BoundarySettings(steps=1), seed=0, held_out=images)
    return calibrate(vit, [direction], 0.03, images)


def test_chunks_change_only_the_rounding():
    vit = tiny_model().double()
    settings = NoiseSettings(epsilon=0.05, max_steps=30, stop_on="minibatch")
    whole, history = learn_noise(vit, stream(), settings, seed=0, held_out=held_out())
    pieces, again = learn_noise(vit, stream(), settings, seed=0, held_out=held_out(), chunk_size=4)
    torch.testing.assert_close(pieces.tensor, whole.tensor, rtol=1e-9, atol=1e-9)
    assert again.held_out_influence == pytest.approx(history.held_out_influence, rel=1e-9)
    assert again.steps == history.steps


def test_seeds_of_rounds_differ():
    assert len({derive_seed(seed, k) for seed in range(30) for k in range(30)}) == 900


def test_start_is_uniform_in_the_limit():
    start = start_noise(EmbeddingShape(64, 256, (8, 8)), 3.0, seed=0)
    assert start.abs().max() <= 3
    assert start.mean().abs() < 0.05
    assert start.std().item() == pytest.approx(3 / math.sqrt(3), rel=0.01)


def test_bf16_model_keeps_a_float32_noise():
    vit = tiny_model().to(torch.bfloat16)
    noise, history = learn_noise(vit, stream(dtype=torch.bfloat16), NoiseSettings(epsilon=None, max_steps=3), seed=0)
    assert noise.tensor.dtype == torch.float32
    assert all(math.isfinite(value) for value in history.loss)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_that_run_out_are_an_error_with_the_step_and_the_number_needed(count):
    settings = NoiseSettings(epsilon=1e-9, max_steps=5, stop_on="minibatch")
    batches = itertools.islice(stream(dtype=torch.float32), count)
    with pytest.raises(ValueError, match=f"ran out at noise step {count}; up to 6 are needed: repeat the data"):
        learn_noise(tiny_model(), batches, settings, seed=0)


@pytest.mark.parametrize(("count", "stride"), [(0, 1), (1, 1), (200, 1), (201, 2), (400, 2), (401, 3)])
def test_a_summary_keeps_at_most_200_points_of_a_curve(count, stride):
    history = NoiseHistory()
    for index in range(count):
        history.record(torch.ones(1, 16, 24), [index, index + 1], [1.0])
    found = history.summary(torch.ones(1, 16, 24))
    assert found["trace_stride"] == stride
    assert found["trace"]["influence"] == [index + 0.5 for index in range(0, count, stride)]
    assert found["minibatch_influence"] == (count - 0.5 if count else None)


def test_a_noise_that_is_inside_on_held_out_images_is_not_scaled():
    """After T steps outside on the minibatch; the held-out image is the one that sees the noise least."""
    vit, images = tiny_model().double(), next(stream())
    known, before = learn_noise(vit, itertools.repeat(images), NoiseSettings(epsilon=None, max_steps=2), seed=5)
    least = min(images.split(1), key=lambda image: influence_of(vit, image, known.tensor))
    epsilon = 0.999 * min(before.influence)
    assert influence_of(vit, least, known.tensor) < 0.9 * epsilon
    settings = NoiseSettings(epsilon=epsilon, max_steps=2, stop_on="minibatch", on_limit="rescale")
    noise, history = learn_noise(vit, itertools.repeat(images), settings, seed=5, held_out=[least])
    assert history.stopped == "rescaled"
    assert torch.equal(noise.tensor, known.tensor)
