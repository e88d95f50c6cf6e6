"""Settings as a user writes them: numbers in their ranges, fractions like 8/255, names that are nearly right."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_INTERVAL = re.compile(r"(int )?([\[(])(\S+), (\S+)([\])])")


def check_numbers(settings: Any, ranges: Mapping[str, str]) -> None:
    """Check attributes of ``settings`` that are numbers, lists of numbers, or None (which is not checked).

    ``ranges`` gives each an interval, such as "[0, inf)", "(0, 1]" or, for whole numbers, "int [1, inf)". An infinite
    bound is never reached: infinity and NaN are in no interval.

    Raises:
        ValueError: for the first value that is outside, naming it.
    """
    for name, interval in ranges.items():
        match = _INTERVAL.fullmatch(interval)
        if match is None:
            raise TypeError(f"{interval!r} is no interval; expected one like '[0, inf)' or 'int [1, inf)'")
        value = getattr(settings, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and not _inside(number, *match.groups()):
                raise ValueError(f"{name}={value!r}: expected {_words(*match.groups())}")


def check_choices(settings: Any, choices: Mapping[str, Iterable[str]]) -> None:
    """Check attributes of ``settings`` that are one of a few words.

    Raises:
        ValueError: for the first value that is none of its choices, naming it and them.
    """
    for name, words in choices.items():
        if (value := getattr(settings, name)) not in words:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, words))}")


def fraction(value: Any) -> float:
    """The number that ``value`` says: 0.03, "0.03", "8/255" or "0.5/255".

    Raises:
        ValueError: if it is none, with what was expected.
    """
    top, slash, bottom = str(value).partition("/")
    try:
        number = float(top) / float(bottom if slash else 1)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r}: expected a number like 8/255 or 0.03")
    return number


def nearest(name: Any, valid: Iterable[Any], *, most: int = 1, otherwise: str | None = None) -> str:
    """The end of an error about an unknown ``name``: at most ``most`` near ones of ``valid``, or else ``otherwise``.

    Without ``otherwise``, the first of ``valid`` are listed.
    """
    names = [str(each) for each in valid]
    if near := difflib.get_close_matches(str(name), names, n=most):
        return f"; did you mean {' or '.join(near)}?"
    return f"; {otherwise or 'expected one of ' + ', '.join(sorted(names)[:12])}"


def check_output_dir(folder: str | None) -> None:
    """Check the name of a folder that is going to be written to; None is not checked.

    Raises:
        ValueError: if the name is empty.
        NotADirectoryError: if it is a file, or lies under one.
    """
    if folder is None:
        return
    if not folder.strip():
        raise ValueError(f"output_dir={folder!r}: expected the name of a folder")
    for path in (Path(folder), *Path(folder).parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"output_dir={folder!r}: {path} is a file; choose a folder")


def _inside(number: Any, whole: str | None, left: str, least: str, most: str, right: str) -> bool:
    if isinstance(number, bool) or not isinstance(number, Integral if whole else Real):
        return False
    value = float(number)
    above = value >= float(least) if left == "[" else value > float(least)
    below = value <= float(most) if right == "]" else value < float(most)
    return above and below


def _words(whole: str | None, left: str, least: str, most: str, right: str) -> str:
    kind = "a whole number" if whole else "a number"
    if most != "inf":
        return f"{kind} in {left}{least}, {most}{right}"
    return f"at least {least} ({kind})" if left == "[" else f"{kind} above {least}"
