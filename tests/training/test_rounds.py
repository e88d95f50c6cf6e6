"""What a round makes of its settings and of the noises of the round before, asked without a trainer."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.algorithm1 import NoiseSettings
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise
from hf_nullspace.noise.boundary import BoundarySettings
from hf_nullspace.noise.calibration import calibrate
from hf_nullspace.noise.history import NoiseHistory
from hf_nullspace.training.rounds import Round
from tiny_models import cosine, normal, tiny_model
from written_out import influence_of

EPSILON = 0.01


def batches(count, seed):
    return list(normal(count, 6, 3, 16, 16, seed=seed))


HELD_OUT = batches(2, seed=9)


def direction(seed):
    return normal(1, 16, 24, seed=seed)


def noise_of(tensor):
    return NullspaceNoise(tensor, (4, 4), NoiseProvenance(seed=5, steps=7))


def round_of(settings=None, held_out=HELD_OUT, **given):
    model = tiny_model().double()
    stream = lambda: (list(held_out), itertools.cycle(batches(3, seed=1)))  # noqa: E731
    settings = settings or BoundarySettings(EPSILON, steps=1, pool_images=6)
    return Round(number=1, seed=4, settings=settings, model=model, hook=PatchEmbeddingNoise(model), stream=stream,
                 **given)  # fmt: skip


def held_out_influence(model, tensor):
    return influence_of(model, torch.cat(HELD_OUT), tensor)


def test_an_old_noise_is_at_most_doubled():
    """One that the model has got used to stays inside epsilon; one that is nearer is scaled to epsilon."""
    model = tiny_model().double()
    at_epsilon = calibrate(model, [direction(0)], EPSILON, HELD_OUT, tolerance=1e-3)[0].noise
    far, near = noise_of(at_epsilon / 10), noise_of(at_epsilon / 1.5)
    weak, strong = round_of(previous=(far, near)).rescale_previous(2)
    torch.testing.assert_close(weak.tensor, 2 * far.tensor, rtol=1e-12, atol=0)
    assert weak.provenance.influence == pytest.approx(held_out_influence(model, weak.tensor), rel=1e-9)
    assert weak.provenance.influence < 0.5 * EPSILON
    assert (weak.provenance.stopped, strong.provenance.stopped) == ("bound", "calibrated")
    assert strong.provenance.influence == pytest.approx(EPSILON, rel=0.02)
    torch.testing.assert_close(strong.tensor, at_epsilon, rtol=0.05, atol=0)
    assert (strong.provenance.seed, strong.provenance.steps, strong.provenance.influence_images) == (5, 7, 12)


@pytest.mark.parametrize(("bank", "learned"), [(1, 0), (2, 1), (3, 2), (9, 2)])
def test_the_bank_is_filled_with_the_newest_of_the_round_before(bank, learned):
    previous = (noise_of(direction(1)), noise_of(direction(2)))
    made = round_of(previous=previous, bank_size=bank).learn()
    assert len(made.noises) == 1 + learned
    for ours, theirs in zip(made.noises[1:], previous, strict=False):
        assert cosine(ours.tensor, theirs.tensor) == pytest.approx(1, abs=1e-12)
    alone = round_of(previous=previous, bank_size=bank).learn(without_previous=True)
    assert len(alone.noises) == 1
    assert torch.equal(alone.noises[0].tensor, made.noises[0].tensor)


DESCENT = NoiseSettings(epsilon=1e-9, max_steps=1, learning_rate=1e-9)
BOUNDARY = BoundarySettings(EPSILON, steps=1, learning_rate=1e-9, pool_images=6, count=2)


@pytest.mark.parametrize("settings", [DESCENT, BOUNDARY], ids=["descent", "boundary"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_warm_start_is_the_newest_noise_with_either_learner(settings, warm):
    """With steps too small to move: descent starts from the newest one, the boundary from as many as it learns."""
    previous = tuple(noise_of(tensor - tensor.mean(-1, keepdim=True)) for tensor in (direction(1), direction(2)))
    made = round_of(settings, previous=previous, warm_start=warm).learn()
    alone = round_of(settings, previous=previous, warm_start=warm).learn(without_previous=True)
    for noises, expected in ((made.noises, warm), (alone.noises, False)):
        assert len(noises) == (1 if settings is DESCENT else 2)
        for ours, theirs in zip(noises, previous, strict=False):
            assert (cosine(ours.tensor, theirs.tensor) > 1 - 1e-6) == expected


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (NoiseSettings(stop_on="minibatch", on_limit="use", max_steps=1), False),
        (NoiseSettings(stop_on="minibatch", on_limit="rescale", max_steps=1), True),
        (NoiseSettings(stop_on="held_out", on_limit="use", max_steps=1), True),
        (BoundarySettings(steps=1, pool_images=6), True),
    ],
)
def test_held_out_images_are_asked_for_where_they_are_needed(settings, needed):
    if not needed:
        assert round_of(settings, held_out=()).learn().history.steps == 1
        return
    with pytest.raises(ValueError, match="held-out images: pass"):
        round_of(settings, held_out=()).learn()


def test_a_random_direction_is_scaled_and_its_provenance_records_it():
    round_ = round_of(known=lambda: NoiseProvenance(base_model="some/model"))
    history = NoiseHistory(steps=3, seconds=100.0)
    made = round_.scale_to_epsilon([direction(1), direction(2)], "by hand", history)
    assert (made.history.stopped, made.history.steps) == ("calibrated", 3)
    assert made.history.seconds > 100
    assert made.history.held_out_influence == made.noises[0].provenance.influence
    for index, noise in enumerate(made.noises):
        known = noise.provenance
        assert held_out_influence(round_.model, noise.tensor) == pytest.approx(known.influence, rel=1e-9)
        assert known.influence == pytest.approx(EPSILON, rel=0.02)
        assert (known.base_model, known.seed, known.epsilon, known.steps) == ("some/model", 4, EPSILON, 3)
        assert (known.stopped, known.influence_images, known.settings["made"]) == ("calibrated", 12, "by hand")
        torch.testing.assert_close(noise.tensor, known.settings["factor"] * direction(index + 1))
        assert known.settings["evaluations"] > 0
    with pytest.raises(ValueError, match="epsilon is not set"):
        round_of(NoiseSettings(epsilon=None)).scale_to_epsilon([direction(1)], "by hand")
    with pytest.raises(ValueError, match="a noise is scaled on held-out images"):
        round_of(held_out=()).scale_to_epsilon([direction(1)], "by hand")


def test_an_epsilon_out_of_reach_marks_random_noise_and_warns_once(caplog):
    """The influence of a random model's predictions never comes near the largest that there is, 2."""
    settings = BoundarySettings(1.99, steps=1, pool_images=6)
    with caplog.at_level(logging.WARNING, "hf_nullspace"):
        made = round_of(settings, bank_size=2).scale_to_epsilon([direction(1), direction(2)], "by hand")
    assert made.history.stopped == "unreachable"
    (record,) = caplog.records
    shown = min(noise.provenance.influence for noise in made.noises)
    assert f"round 1: no length of the noise has an influence near epsilon=1.99; it is used with {shown:.3g}" in (
        record.message
    )
    for index, noise in enumerate(made.noises):
        assert noise.provenance.stopped == "unreachable"
        assert 0 < noise.provenance.influence < 0.96 * 1.99
        # Farther out hardly more is to be had: it is no number that half precision does not have.
        assert held_out_influence(tiny_model().double(), 1e6 * direction(index + 1)) < 1.03 * noise.provenance.influence
        assert noise.tensor.abs().max() < 65504


def test_what_went_wrong_before_a_permutation_stays_in_the_history():
    history = NoiseHistory(stopped="start")
    made = round_of().scale_to_epsilon([direction(1)], "learned, then permuted", history)
    assert (made.history.stopped, made.noises[0].provenance.stopped) == ("start", "calibrated")


def test_the_shape_is_known_with_and_without_held_out_images():
    for held_out in (HELD_OUT, ()):
        shape = round_of(held_out=held_out).shape
        assert (shape.patches, shape.features, tuple(shape.grid)) == (16, 24, (4, 4))
    assert replace(round_of(), bank_size=3).held_out == HELD_OUT
