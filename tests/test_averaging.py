"""Averages of weights are plain sums over state dicts; what has no average is refused in one line."""

import pytest
import torch

from bad_models import save_good
from hf_nullspace.averaging import NotAveragedError, greedy_soup, interpolate, soup
from tiny_models import FAMILIES, tiny_model


def plain(models, coefficients):
    """The average written out, in float64."""
    states = [model.state_dict() for model in models]
    return {
        name: sum(weight * state[name].double() for weight, state in zip(coefficients, states, strict=True)).to(
            states[0][name].dtype
        )
        for name in states[0]
    }


def same(state, wanted, rtol=0.0, atol=0.0):
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_interpolation_is_the_sum_written_out(family):
    base, tuned = tiny_model(family), tiny_model(family, seed=1)
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    floats = {name for name, value in before.items() if value.is_floating_point()}
    wanted = plain([base, tuned], [0.7, 0.3])
    found = interpolate(base, tuned, 0.3)
    # Two orders of one sum differ in float64's last bit, so at most in float32's last bit after rounding.
    same({name: found.state_dict()[name] for name in floats}, {name: wanted[name] for name in floats}, rtol=2e-7)
    assert type(found) is type(tuned)
    assert found.config.id2label == tuned.config.id2label
    same(tuned.state_dict(), before)


def test_the_ends_are_the_models_themselves_and_dtypes_are_kept():
    base, tuned = tiny_model(), tiny_model(seed=1)
    same(interpolate(base, tuned, 0).state_dict(), base.state_dict())
    same(interpolate(base, tuned, 1.0).state_dict(), tuned.state_dict())
    half = interpolate(base, tuned.to(torch.bfloat16), 0.5)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    same(half.state_dict(), plain([tuned, base], [0.5, 0.5]))


def test_folders_are_loaded(tmp_path):
    folder, tuned = save_good(tmp_path / "vit"), tiny_model(seed=1)
    same(interpolate(str(folder), tuned, 0.25).state_dict(), interpolate(tiny_model(), tuned, 0.25).state_dict())
    same(soup([folder, folder]).state_dict(), tiny_model().state_dict())


def test_soups_are_the_sum_written_out():
    models = [tiny_model(seed=seed) for seed in range(3)]
    same(soup(models).state_dict(), plain(models, [1 / 3] * 3), rtol=2e-7)
    same(soup(models, [0.5, 0.2, 0.3]).state_dict(), plain(models, [0.5, 0.2, 0.3]), rtol=2e-7)


def test_a_greedy_soup_takes_what_does_not_lower_the_score():
    """Scored by the distance of one weight from a target, so that what has to be taken can be computed by hand."""
    models = [tiny_model() for _ in range(5)]
    for model, value in zip(models, (4.0, 1.0, -3.0, -1.0, 9.0), strict=True):
        model.classifier.bias.data.fill_(value)
    asked = []

    def score(model):
        asked.append(model.classifier.bias[0].item())
        return -abs(asked[-1])

    found = greedy_soup(models, score)
    # In the order 1, -1, -3, 4, 9: with -1 the mean is 0; with -3 it is -1, with 4 4/3, with 9 3.
    assert found.taken == (1, 3)
    assert found.score == 0
    assert found.scores == (-4, -1, -3, -1, -9)
    assert asked == pytest.approx([4, 1, -3, -1, 9, 0, -1, 4 / 3, 3], rel=1e-6)
    same(found.model.state_dict(), soup([models[1], models[3]]).state_dict())


def test_integer_buffers_have_to_be_equal():
    models = [tiny_model(), tiny_model(seed=1)]
    for model in models:
        model.register_buffer("steps", torch.tensor(3))
    assert soup(models).steps == 3
    models[1].steps += 1
    with pytest.raises(NotAveragedError, match="steps counts in whole numbers"):
        soup(models)


def test_heads_for_the_same_classes_go_together():
    named, other = tiny_model(), tiny_model(seed=1)
    other.config.id2label = {index: f"LABEL_{index}" for index in range(5)}
    soup([named, other])
    soup([other, named])
    other.config.id2label = {index: f"class {4 - index}" for index in range(5)}
    with pytest.raises(NotAveragedError, match="in another order"):
        soup([named, other])
