"""The sections of a card by their edges: which columns and rows there are, and how few and many are said."""

import itertools
import re

import pytest
from made_runs import CONDITIONS, SETTINGS, answers, finetuned, results

from hf_nullspace.cards import tables
from hf_nullspace.cards.run_folder import RunFolder
from hf_nullspace.robustness.corruptions import CORRUPTIONS, SEVERITIES
from hf_nullspace.robustness.suite import ConditionResult


def report_of(folder, measured, settings=SETTINGS):
    (report,) = RunFolder(finetuned(folder, measured, settings)).reports
    return report


def test_two_others_are_compared_with_and_of_more_the_first_and_the_control(tmp_path):
    drawn = {name: answers(seed) for seed, name in enumerate(("before", "other", "plain", "third", "nullspace"))}

    def compared(*names):
        return tables.compared(report_of(tmp_path / "-".join(names), results(**{name: drawn[name] for name in names})))

    assert compared("nullspace") == []
    assert compared("before", "nullspace") == ["before"]
    assert compared("before", "plain", "nullspace") == ["before", "plain"]
    assert compared("before", "other", "plain", "third", "nullspace") == ["before", "plain"]
    assert compared("before", "other", "third", "nullspace") == ["before", "third"]


def many(count):
    """Clean images and ``count`` cells of generated corruptions, of one checkpoint and its base."""
    rows = [ConditionResult("clean", answers(0), seconds=1.0, seed=1)]
    for corruption, severity in list(itertools.product(CORRUPTIONS, SEVERITIES))[:count]:
        known = {"corruption": corruption, "severity": severity, "generated": "so"}
        title = f"generated {corruption} {severity}"
        rows.append(ConditionResult(title, answers(len(rows)), seconds=1.0, seed=1, protocol=known))
    return {"before": rows, "nullspace": rows}


@pytest.mark.parametrize(("cells", "folded"), [(39, False), (40, True), (45, True)])
def test_a_table_of_more_than_forty_rows_folds_its_cells(tmp_path, cells, folded):
    rest, second = tables.result_tables(report_of(tmp_path, many(cells)))
    assert bool(second) == folded
    assert rest.count("\n| generated ") == (0 if folded else cells)
    assert second.count("\n| generated ") == (cells if folded else 0)
    assert "| clean | 400 |" in rest


@pytest.mark.parametrize(
    ("conditions", "words"),
    [(1, "the interval contains zero"), (2, "all 2 intervals contain zero"), (3, "all 3 intervals contain zero")],
)
def test_no_difference_is_said_of_one_and_of_several(tmp_path, conditions, words):
    rows = dict.fromkeys(list(CONDITIONS)[:conditions], answers(1))
    (line, *_) = tables.verdict(report_of(tmp_path, results(plain=rows, nullspace=rows)))
    assert line.endswith(f"**no difference was measured**; {words}.")


def test_the_verdict_counts_both_sides_and_the_rest(tmp_path):
    titles = [f"c{index:02}" for index in range(16)]
    hard = {title: answers(index, 0.3) for index, title in enumerate(titles)}
    easy = {title: row | answers(50, 0.3) for title, row in hard.items()}
    for count, more in ((12, ""), (13, " and 1 more")):
        better = hard | {title: easy[title] for title in titles[:count]}
        (line, *_) = tables.verdict(report_of(tmp_path / str(count), results(plain=hard, nullspace=better)))
        assert f"of 16 conditions (points): better in {count} (c00 (+" in line
        end = rf", c11 \(\+[\d.]+\){more}\); in the other {16 - count} no difference was measured"
        assert re.search(end, line)
    (line, *_) = tables.verdict(report_of(tmp_path / "b", results(plain=easy, nullspace=hard)))
    assert "worse in 16 (c00 (-" in line
    assert " and 4 more). About one" in line
    assert "better" not in line


@pytest.mark.parametrize(("given", "precision"), [({}, "float32"), ({"bf16": True}, "bf16"), ({"fp16": True}, "fp16")])
@pytest.mark.parametrize(("crop", "flip", "augmentation"), [(1.0, False, "none"), (1.0, True, "flip"),
                         (0.6, False, "random crop of at least 0.6 of the area"),
                         (0.6, True, "random crop of at least 0.6 of the area and flip")])  # fmt: skip
def test_settings_in_words(tmp_path, given, precision, crop, flip, augmentation):
    settings = SETTINGS | {"training": SETTINGS["training"] | given}
    settings["data"] = SETTINGS["data"] | {"crop_scale": crop, "horizontal_flip": flip}
    text = tables.settings_table(RunFolder(finetuned(tmp_path, results(nullspace=answers(0)), settings)))
    assert f"| precision | {precision} |" in text
    assert f"| augmentation | {augmentation} |" in text
    settings["data"] |= {"augmentation": "augmix+mixup"}
    text = tables.settings_table(RunFolder(finetuned(tmp_path / "more", results(nullspace=answers(0)), settings)))
    more = " and ".join(filter(None, (augmentation.removeprefix("none"), "augmix and mixup")))
    assert f"| augmentation | {more} |" in text


def test_which_alpha_was_chosen_and_which_for_the_others(tmp_path):
    run = RunFolder(finetuned(tmp_path, results(plain=answers(0), nullspace=answers(0))))
    assert "interpolated" not in tables.settings_table(run)
    points = [{"alpha": 0.0}, {"alpha": 0.4}, {"alpha": 1.0}]
    run.interpolation = {"alpha": 0.4, "alphas": points, "count": 143, "images": "digits, held out", "rule": "the best"}
    run.reports[0].context["alpha"] = {"plain": 0.2, "nullspace": 0.4, "nullspace, EMA": 1.0}
    assert (
        "| interpolated with the checkpoint | alpha = 0.4 (0 is the checkpoint, 1 the fine-tuned weights), chosen from "
        "0, 0.4, 1 on 143 images (digits, held out): the best. By the same rule: plain 0.2, nullspace, EMA 1 |"
    ) in tables.settings_table(run)


def test_a_folder_of_weights_alone_has_no_tables(tmp_path):
    for section in (tables.settings_table, tables.cost_table, tables.settings_yaml):
        assert section(RunFolder(tmp_path)) == ""
