"""Text of reports, and Markdown: tables, and text from files that makes no heading, link, HTML or code."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

PIPE = "\\|"
"""How a cell of a table holds one."""
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # they reorder, or ring
_MARKS = re.compile(r"[\\`*]|(?<![^\W_])_|_(?![^\W_])|~(?=~)|\](?=[(\[:])")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_START = re.compile(r"#{1,6}(?=\s|$)|>|[-+](?=\s|$)|[=-]+$|\[(?=[^\]]*\]:)")
_NUMBERED = re.compile(r"(\d{1,9})([.)])(?=\s|$)")


def escape(value: Any) -> str:
    """One line of ordinary text; what has no meaning in Markdown stays as it is."""
    text = _TAG.sub("&lt;", _MARKS.sub(r"\\\g<0>", _line(value)))
    if _START.match(text):
        return "\\" + text
    return _NUMBERED.sub(r"\1\\\2", text, count=1) if _NUMBERED.match(text) else text


def cell(value: Any) -> str:
    """The same for a cell of a table."""
    return escape(value).replace("|", PIPE)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> list[str]:
    """The lines of a table; its cells are Markdown already, but for "|", which is escaped here.

    ``align`` has one letter per column, "l" or "r" (numbers); the last one holds for the columns that follow. Without
    it the first column is left and the others right.
    """
    align = (align or "lr").ljust(len(head), (align or "lr")[-1])
    rule = ["---" if letter == "l" else "---:" for letter in align[: len(head)]]
    cells = [[re.sub(r"(?<!\\)\|", r"\|", each) for each in row] for row in (head, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def short(title: str) -> str:
    """A condition or an attack without its settings but the first: "PGD eps=1/255" of "PGD(eps=1/255, steps=10)"."""
    name, _, settings = title.partition("(")
    return f"{name} {settings.split(',')[0].rstrip(')')}".strip() if settings else title


def with_interval(value: float, low: float, high: float) -> str:
    """A difference with its interval, all in points."""
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def code(value: Any) -> str:
    """The text as code, between as many backticks as it needs."""
    text = _line(value) or " "
    ticks = "`" * (1 + _longest(text))
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def block(value: Any, language: str = "") -> str:
    """The text as a block of code; it may have several lines."""
    text = str(value).strip("\n")
    fence = "`" * max(3, 1 + _longest(text))
    return f"{fence}{language}\n{text}\n{fence}"


def literal(value: Any) -> str:
    """The text as a string of Python, in double quotes."""
    return json.dumps(str(value), ensure_ascii=False)


def _line(value: Any) -> str:
    return _UNSEEN.sub("", _BREAKS.sub(" ", str(value))).strip()


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
