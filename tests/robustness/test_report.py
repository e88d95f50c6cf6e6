"""Tables and files: the numbers in them are the counts, and files appear whole or not at all."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from hf_nullspace.robustness import report
from hf_nullspace.robustness.suite import ConditionResult


def result(condition, correct, n=50, seed=0):
    bits = np.zeros(n, dtype=bool)
    bits[:correct] = True
    return ConditionResult(condition, bits, 1.5, seed, {"attack": condition})


@pytest.fixture
def arms():
    return {
        "before": [result("clean", 45), result("FGSM(eps=1/255)", 10)],
        "plain control": [result("clean", 44), result("FGSM(eps=1/255)", 15)],
        "nullspace": [result("clean", 46), result("FGSM(eps=1/255)", 25)],
    }


def test_the_table_shows_scores_and_paired_differences(arms):
    header, _, fgsm = report.table_rows(arms)
    assert header == [
        *("condition", "images", "before", "plain control", "nullspace"),
        *("plain control - before", "nullspace - before", "nullspace - plain control"),
    ]
    assert fgsm[:5] == ["FGSM(eps=1/255)", "50", "20.00", "30.00", "50.00"]
    assert fgsm[6].startswith("+30.00 [")
    assert fgsm[7].startswith("+20.00 [")
    lines = report.terminal_table(arms).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert report.markdown_table(arms).splitlines()[3].count("|") == 9


def test_files_hold_the_counts_and_read_back(arms, tmp_path):
    paths = report.write_report(arms, tmp_path / "new" / "folder", context={"set": "digits"})
    stored = json.loads(paths["json"].read_text())
    assert stored["context"] == {"set": "digits"}
    assert {"torch", "transformers", "python"} <= set(stored["versions"])
    assert [(r["checkpoint"], r["correct"], r["n"]) for r in stored["results"]][:2] == [
        ("before", 45, 50),
        ("before", 10, 50),
    ]
    back = report.result_from_record(stored["results"][1])
    np.testing.assert_array_equal(back.correct, arms["before"][1].correct)
    assert back.condition == "FGSM(eps=1/255)"
    change = next(d for d in stored["differences"] if d["after"] == "nullspace" and d["condition"] == "clean")
    assert change["value"] == pytest.approx(0.02)
    rows = list(csv.DictReader(paths["csv"].read_text().splitlines()))
    assert [int(row["correct"]) for row in rows] == [45, 10, 44, 15, 46, 25]
    assert sorted(p.name for p in paths["json"].parent.iterdir()) == [
        f"results.{k}" for k in ("csv", "json", "md", "png")
    ]
    with Image.open(paths["png"]) as image:
        assert image.width > 500
        assert len(image.convert("RGB").getcolors(1_000_000)) > 3


def test_a_damaged_record_is_an_error(arms):
    record = report.record(arms["before"][0])
    with pytest.raises(ValueError, match="damaged record of 'clean'"):
        report.result_from_record(record | {"correct": 44})


def test_checkpoints_measured_differently_are_not_compared(arms):
    arms["nullspace"][1] = result("FGSM(eps=2/255)", 25)
    with pytest.raises(ValueError, match="nullspace was measured under other conditions than before"):
        report.terminal_table(arms)
    with pytest.raises(ValueError, match="no results"):
        report.terminal_table({"before": []})


def test_an_output_path_under_a_file_is_named(arms, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file/results"):
        report.write_report(arms, tmp_path / "file" / "results")


def test_one_checkpoint_alone(arms):
    text = report.terminal_table({"model": arms["before"]})
    assert "90.00" in text
    assert "points" not in text
