"""A setting that makes no attack, or none that its name says, is refused where the attack is made."""

import dataclasses
import math

import numpy as np
import pytest

from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD
from hf_nullspace.robustness.attacks.patch_fool import PatchFool
from hf_nullspace.robustness.plans import ATTACKS

SETTINGS = [(kind, field) for kind in ATTACKS.values() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("kind", "field"), SETTINGS, ids=lambda value: getattr(value, "name", None))
def test_no_setting_takes_what_is_no_value_of_its_kind(kind, field):
    """Also those that will be added: every number needs a smallest value."""
    wrong = [math.nan, math.inf, -1, -0.5, "other"]
    wrong += [] if field.default is None else [None]
    wrong += [1] if isinstance(field.default, bool) else [True]
    wrong += [2.5] if "int" in str(field.type) else []
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{kind.__name__}: {field.name}=.*: expected") as refused:
            kind(**{field.name: value})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PGD, {"step": 0}, "step=0: expected a number above 0"),
        (PGD, {"steps": 0}, "steps=0: expected at least 1"),
        (MIM, {"step": 0.0}, "step=0.0: expected a number above 0"),
        (MIM, {"decay": -1}, "decay=-1: expected at least 0"),
        (CW, {"c": 0}, "c=0: expected a number above 0"),
        (CW, {"binary_search_steps": 0}, "binary_search_steps=0: expected at least 1"),
        (PatchFool, {"num_patch": 0}, "num_patch=0: expected at least 1"),
        (PatchFool, {"lr": 0}, "lr=0: expected a number above 0"),
        (FGSM, {"eps": 8}, "eps=8: expected a radius for pixels in \\[0, 1\\], such as 8 / 255"),
        (PatchFool, {"mild": "linf", "eps": 8}, "eps=8: expected a radius"),
        (PGD, {"norm": "l1"}, "norm='l1': expected 'linf' or 'l2'"),
    ],
)
def test_the_message_says_what_came_and_what_was_expected(kind, settings, message):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
        kind(**settings)


def test_what_is_a_number_is_taken():
    assert PGD(eps=np.float32(0.5), steps=np.int64(3)).steps == 3
    assert PGD(eps=0).settings()["step"] == 0, "a radius of 0 is the clean image, and the name says so"
    assert PGD(eps=8, norm="l2").eps == 8
    assert PatchFool(mild="l2", eps=8).eps == 8
