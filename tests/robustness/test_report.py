"""Tables and files: the numbers in them are the counts, and files appear whole or not at all."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from hf_nullspace.robustness import plots, published, records, report
from hf_nullspace.robustness.checks import Check
from hf_nullspace.robustness.corruptions import CORRUPTIONS, SEVERITIES
from hf_nullspace.robustness.suite import ConditionResult
from hf_nullspace.robustness.summaries import CIFAR_COLUMNS, IMAGENET_COLUMNS, image_averages, summaries


def result(condition, correct, **protocol):
    return ConditionResult(condition, np.arange(50) < correct, 1.5, 0, protocol or {"attack": condition})


def cells(right, pattern="generated {c} {s}"):
    return [result(pattern.format(c=c, s=s), right(c, s), corruption=c) for c in CORRUPTIONS for s in SEVERITIES]


def colours(path):
    with Image.open(path) as image:
        return image.size, len(image.convert("RGB").getcolors(1_000_000))


@pytest.fixture
def arms():
    return {
        "before": [result("clean", 45), result("FGSM(eps=1/255)", 10)],
        "plain control": [result("clean", 44), result("FGSM(eps=1/255)", 15)],
        "nullspace": [result("clean", 46), result("FGSM(eps=1/255)", 25)],
    }


def test_the_table_shows_scores_and_paired_differences(arms):
    header, _, fgsm, worst = report.table_rows(arms)
    assert header == [
        *("condition", "images", "before", "plain control", "nullspace"),
        *("plain control - before", "nullspace - before", "nullspace - plain control"),
    ]
    assert fgsm[:5] == ["FGSM(eps=1/255)", "50", "20.00", "30.00", "50.00"]
    assert worst[0] == "worst condition"
    assert worst[2:] == ["20.00", "30.00", "50.00", "+10.00", "+30.00", "+20.00"]
    assert fgsm[6].startswith("+30.00 [")
    assert fgsm[7].startswith("+20.00 [")
    lines = report.terminal_table(arms).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert report.markdown(arms).splitlines()[3].count("|") == 9


def test_files_hold_the_counts_and_read_back(arms, tmp_path):
    paths = report.write_report(arms, tmp_path / "new" / "folder", context={"set": "digits"})
    stored = json.loads(paths["json"].read_text())
    assert stored["context"] == {"set": "digits"}
    assert {"torch", "transformers", "python"} <= set(stored["versions"])
    counts = [(r["checkpoint"], r["correct"], r["n"]) for r in stored["results"]]
    assert counts[:2] == [("before", 45, 50), ("before", 10, 50)]
    back = records.result_from_record(stored["results"][1])
    np.testing.assert_array_equal(back.correct, arms["before"][1].correct)
    assert back.condition == "FGSM(eps=1/255)"
    change = next(d for d in stored["differences"] if d["after"] == "nullspace" and d["condition"] == "clean")
    assert change["value"] == pytest.approx(0.02)
    rows = list(csv.DictReader(paths["csv"].read_text().splitlines()))
    assert [int(row["correct"]) for row in rows] == [45, 10, 44, 15, 46, 25]
    names = sorted(path.name for path in paths["json"].parent.iterdir())
    assert names == [f"results.{kind}" for kind in ("csv", "json", "md", "png")]
    (width, _), different = colours(paths["png"])
    assert width > 500
    assert different > 3


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


def test_one_checkpoint_alone_has_intervals(arms):
    text = report.terminal_table({"model": arms["before"]})
    assert "90.00  [78.64, 95.65]" in text
    assert "points" not in text


def test_what_is_missing_or_doubted_is_said(arms, tmp_path):
    checks = {"before": [Check("gradients", False, "zero for 7 of 32 images", "attacks")], "nullspace": []}
    arms["before"][0].protocol.clear()
    missing = {"imagenet-a": "not at ./imagenet-a. Get it from somewhere"}
    text = report.terminal_table(arms, missing=missing, checks=checks)
    lines = text.splitlines()
    assert "(!)" not in lines[2]
    assert "20.00 (!)" in lines[3]
    assert "(!) before: gradients: zero for 7 of 32 images" in text
    assert next(line for line in lines if line.startswith("imagenet-a")).split()[1:] == ["missing"] * 3
    assert "Missing: imagenet-a: not at ./imagenet-a" in text
    paths = report.write_report(arms, tmp_path, missing=missing, checks=checks, published=True)
    stored = json.loads(paths["json"].read_text())
    assert stored["missing"] == missing
    assert stored["checks"]["before"][0]["passed"] is False
    assert stored["averages"]["nullspace"] == {"worst condition": 50.0}
    markdown = paths["md"].read_text()
    assert "Quoted from the paper" in markdown
    assert "| ViT-B + DAT + NS (quoted) | 81.33 |" in markdown


def test_the_missing_cells_of_a_set_are_one_line(arms):
    missing = {f"imagenet-c/fog/{s}": f"not at /data/imagenet-c/fog/{s}" for s in range(1, 6)} | {"imagenet-a": "gone"}
    text = report.terminal_table(arms, missing=missing)
    assert "imagenet-c (5 conditions)" in text
    assert "Missing: imagenet-c (5 conditions): not at /data/imagenet-c/fog/1" in text
    assert "Missing: imagenet-a: gone" in text
    assert report.as_json(arms, {}, missing)["missing"] == missing


def test_averages_are_over_everything_or_not_at_all():
    before, after = cells(lambda c, s: 30 - 2 * s), cells(lambda c, s: 40 - 2 * s)
    found = summaries(after, before)
    assert found["generated corruptions, mean of 75"] == pytest.approx(100 * (40 - 6) / 50)
    assert found["generated corruptions, mCE against the first checkpoint"] == pytest.approx(100 * 16 / 26)
    assert "generated corruptions, mCE against the first checkpoint" not in summaries(before, before)
    faultless = cells(lambda c, s: 50 if c == "fog" else 30)  # no error under fog that could be compared with
    assert "generated corruptions, mCE against the first checkpoint" not in summaries(after, faultless)
    assert "generated corruptions, mean of 75" not in summaries(after[:-1], before[:-1])
    four = [result(name, 25) for name in CIFAR_COLUMNS]
    average = summaries([*four, *after])["average of clean, FGSM 1/255, PGD-10 1/255, cells"]
    assert average == pytest.approx((3 * 50 + 68) / 4)


def test_averages_over_the_same_images_have_intervals():
    four, plus = [[result(name, n) for name in CIFAR_COLUMNS] for n in (25, 30)]
    before, after = [*four, *cells(lambda c, s: 20)], [*plus, *cells(lambda c, s: 20 + s)]
    rows = {row[0]: row for row in report.table_rows({"before": before, "after": after})}
    mean = rows["generated corruptions, mean of 75"]
    assert mean[2:4] == ["40.00", "46.00"]
    assert mean[4].startswith("+6.00 [+")
    average = rows["average of clean, FGSM 1/255, PGD-10 1/255, cells"]
    assert average[4].startswith("+9.00 [+")
    assert image_averages([r.condition for r in before[:-1]]) == {}


def test_the_verdict_is_what_the_intervals_say():
    def measured(clean, fgsm, fog, snow):
        kinds = ({"split": "test"}, {"attack": "FGSM"}, {"corruption": "fog"}, {"corruption": "snow"})
        counts = (clean, fgsm, fog, snow)
        return [result(str(k), n, **kind) for k, (n, kind) in enumerate(zip(counts, kinds, strict=True))]

    runs = {"before": measured(45, 10, 30, 20), "plain": measured(45, 40, 30, 20), "same": measured(44, 25, 30, 26)}
    found = report.verdict(runs | {"robust": measured(44, 25, 30, 26)}, "robust")
    more, less, same = found.split(" is ", 1)[1].split("), ")
    assert more.startswith("more robust than before (average +11.33 [+")  # (-2 + 30 + (0 + 12) / 2) / 3
    assert ", clean -2.00 [" in more
    assert less.startswith("less robust than plain (average -8.67 [-")
    assert (
        same == "no different from same (average +0.00 [+0.00, +0.00], clean +0.00 [+0.00, +0.00]); the average "
        "is over clean, attacks, corruptions."
    )
    assert report.verdict({"robust": runs["plain"]}, "robust") == ""
    assert report.verdict({name: rows[:1] for name, rows in runs.items()}, "same") == ""


def test_the_nine_columns_come_from_the_sets():
    alexnet = published.ALEXNET_ERRORS
    c = cells(lambda c, s: 25, "imagenet-c/{c}/{s}")
    sets = [result(title, 20 + i) for i, title in enumerate(IMAGENET_COLUMNS.values())]
    found = summaries([*c, *sets])
    mce = np.mean([100 * 50 / alexnet[name] for name in CORRUPTIONS])
    assert found["ImageNet-C, mCE (AlexNet)"] == pytest.approx(mce)
    accuracies = [100 * (20 + i) / 50 for i in range(8)]
    assert found["average of nine columns (table 1)"] == pytest.approx((sum(accuracies) + 100 - mce) / 9)
    assert "average of nine columns (table 1)" not in summaries([*c, *sets[:-1]])


def test_pictures_of_severity_and_strength(tmp_path):
    def attacked(eps, right):
        return result(f"FGSM(eps={eps}/255)", right, attack="FGSM", settings={"eps": eps / 255})

    rows = [result("clean", 40), attacked(1, 30), attacked(4, 10), *cells(lambda c, s: 40 - s)]
    paths = report.write_report({"one": rows, "two": rows}, tmp_path)
    assert {path.name for path in paths.values()} >= {"severity.png", "strength.png", "results.png"}
    assert plots.complete_corruptions(rows) == {"generated": list(CORRUPTIONS)}
    published = cells(lambda c, s: 40 - s, "imagenet-c/{c}/{s}")
    assert plots.complete_corruptions(published[:-1]) == {"ImageNet-C": list(CORRUPTIONS)[:-1]}
    assert plots.cell(result("imagenet-c/fog/3: FGSM(eps=1/255)", 1)) is None
    assert plots.plot_severity({"one": published, "two": published}, tmp_path / "published.png") is not None
    assert plots.complete_corruptions(rows[:-1]) == {"generated": list(CORRUPTIONS[:-1])}
    for name in ("severity", "strength"):
        assert colours(paths[name])[1] > 3


def test_many_conditions_make_more_rows_not_a_wider_picture(tmp_path):
    sizes = {}
    for count in (1, 12, 13, 24, 30):
        rows = [result(f"condition {number}", 20 + number % 20) for number in range(count)]
        sizes[count], different = colours(plots.plot_bars({"one": rows, "two": rows}, tmp_path / f"{count}.png"))
        assert different > 3
    assert sizes[12][0] == sizes[24][0] > sizes[13][0]
    assert sizes[12][1] < sizes[13][1] == sizes[24][1]
    assert sizes[30] == sizes[24]  # the first 24, and the title says so
    only_cells = cells(lambda c, s: 40 - s)  # none of them has a bar: the severity plot has them
    assert colours(plots.plot_bars({"one": only_cells}, tmp_path / "cells.png"))[0][1] == sizes[1][1]


def test_two_judgements_of_a_subset_are_two_rows():
    bits = result("", 30).correct
    both = ConditionResult("imagenet-a", bits, 1.0, 0, {}, correct_all=np.roll(bits, 3) & bits)
    rows = report.table_rows({"model": [both]})
    assert [row[:3] for row in rows[1:3]] == [
        ["imagenet-a", "50", "60.00"], ["imagenet-a, among all classes", "50", "54.00"]
    ]  # fmt: skip
