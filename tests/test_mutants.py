"""The kept result of `make mutants`: enough mutants, nearly all noticed, and a reason for the rest."""

import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "mutants.json").read_text(encoding="utf-8"))


def test_the_sample_is_large_and_noticed():
    rows = RESULT["results"]
    outcomes = Counter(row["outcome"] for row in rows)
    assert RESULT["outcomes"] == outcomes
    assert RESULT["mutants"] == len(rows) >= 400
    assert RESULT["noticed_percent"] == round(100 * (1 - outcomes["survived"] / len(rows)), 2) >= 95


def test_every_survivor_has_its_reason():
    survivors = [row for row in RESULT["results"] if row["outcome"] == "survived"]
    assert [row for row in survivors if not row["reason"]] == []
    assert RESULT["survived_without_a_reason"] == 0
