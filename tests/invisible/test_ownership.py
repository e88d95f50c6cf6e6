"""A fingerprint of null patterns: its own model is told from others, and the rate of errors is counted."""

import math

import numpy as np
import pytest
import torch

from hf_nullspace.invisible.ownership import fingerprint, invariance_score, verify_owner
from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.robustness.pixel_model import PixelModel
from tiny_models import numpy_patches, numpy_projection, tiny_model

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.2)


def classifier(model):
    return PixelModel(model, MEAN, STD)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def mark():
    return fingerprint(PatchNullspace.from_model(tiny_model()).in_pixels(STD), (16, 16), 5, seeded(0))


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(6, 3, 16, 16, generator=seeded(1))


def test_the_patterns_are_null_by_numpy_and_the_controls_are_as_large(mark):
    weight, _ = numpy_projection(tiny_model())
    changes = (images.permute(0, 2, 3, 1).double().numpy() / STD for images in (mark.patterns, mark.controls))
    patterns, controls = (numpy_patches(each) for each in changes)
    seen = [np.linalg.norm(each @ weight.T) / np.linalg.norm(each) for each in (patterns, controls)]
    assert seen[0] < 1e-5 < 0.5 < seen[1]
    for pattern, control in zip(mark.patterns, mark.controls, strict=True):
        assert pattern.abs().max() == pytest.approx(0.2)
        assert torch.equal(pattern.flatten().sort().values, control.flatten().sort().values)
        assert not torch.equal(pattern, control)


def test_the_owner_is_told_from_others_and_the_false_positives_are_counted(mark, pixels):
    own, others = classifier(tiny_model()), [classifier(tiny_model(seed=seed)) for seed in range(1, 7)]
    found = verify_owner(mark, own, others, pixels)
    assert found.claimed
    assert found.score < 0.01 < 0.2 < min(found.other_scores)
    assert found.false_positives == 0
    high = 1.959964**2 / (6 + 1.959964**2)  # Wilson's interval for 0 of 6
    assert found.false_positive_rate.high == pytest.approx(high, rel=1e-5)
    stranger = verify_owner(mark, others[0], others[1:], pixels)
    assert not stranger.claimed
    counted = verify_owner(mark, own, [*others, own], pixels)
    assert counted.false_positives == 1
    assert counted.false_positive_rate.value == pytest.approx(1 / 7)


def test_a_fine_tuned_copy_is_recognised(mark, pixels):
    thief = tiny_model()
    thief.classifier = torch.nn.Linear(24, 3)
    optimizer = torch.optim.SGD(thief.parameters(), lr=1e-2)
    for _ in range(5):
        torch.nn.functional.cross_entropy(classifier(thief)(pixels), torch.tensor([0, 1, 2] * 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not np.array_equal(numpy_projection(thief)[0], numpy_projection(tiny_model())[0])
    assert verify_owner(mark, classifier(thief), [classifier(tiny_model(seed=9))], pixels).claimed


def test_the_score_is_the_median_ratio_of_influences(mark, pixels):
    """Written out in NumPy: images of less contrast, 8 bits, squared distance of the probabilities."""
    model = tiny_model(seed=3)

    def probabilities(images):
        mean, std = (np.array(each)[:, None, None] for each in (MEAN, STD))
        values = (np.clip(np.round(images * 255), 0, 255) / 255 - mean) / std
        with torch.no_grad():
            logits = model(torch.tensor(values, dtype=torch.float32)).logits.double().numpy()
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    base = np.round((0.2 + 0.6 * pixels.numpy()) * 255) / 255
    clean, ratios = probabilities(base), []
    for pattern, control in zip(mark.patterns.numpy(), mark.controls.numpy(), strict=True):
        seen, reference = (((probabilities(base + each) - clean) ** 2).sum(1).mean() for each in (pattern, control))
        ratios.append(seen / reference)
    score = invariance_score(classifier(model), mark, pixels)
    assert score == pytest.approx(np.median(ratios), rel=1e-3)
    assert math.isfinite(score)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_whose_answers_are_no_numbers_is_neither_guilty_nor_innocent(broken, mark, pixels):
    damaged = tiny_model()
    damaged.classifier.weight.data[0, 0] = broken
    own, spoilt = classifier(tiny_model()), classifier(damaged)
    for suspect, others in ((spoilt, [own]), (own, [spoilt])):
        with pytest.raises(ValueError, match="NaN or infinite"):
            verify_owner(mark, suspect, others, pixels)
