"""Small things that several packages share."""

import pytest

from hf_nullspace.core.settings import fraction, nearest
from hf_nullspace.core.text import table


def test_a_table_has_its_rule_and_escapes_what_would_make_a_cell():
    assert table(["name", "value"], [["a|b", "1"], ["c\\|d", "2"]]) == [
        "| name | value |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
        "| c\\|d | 2 |",
    ]
    assert table(["a", "b", "c"], [], "rl")[1] == "| ---: | --- | --- |"


@pytest.mark.parametrize(("text", "number"), [("8/255", 8 / 255), (" 0.03", 0.03), (1, 1.0), ("0.5/255", 0.5 / 255)])
def test_a_fraction_is_its_number(text, number):
    assert fraction(text) == number


@pytest.mark.parametrize("text", ["", "8/0", "8/", "1/2/3", None, "nan", "inf"])
def test_what_is_no_fraction_is_an_error(text):
    with pytest.raises(ValueError, match="expected a number like 8/255"):
        fraction(text)


def test_a_near_name_is_proposed_and_else_the_valid_ones():
    assert nearest("contrats", ["contrast", "fog"]) == "; did you mean contrast?"
    assert nearest("contrats", ["contrast", "contrasts"], most=2) == "; did you mean contrasts or contrast?"
    assert nearest("xyz", ["fog", "contrast"]) == "; expected one of contrast, fog"
    assert nearest("xyz", ["fog"], otherwise="see --help") == "; see --help"
