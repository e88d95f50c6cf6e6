"""The cards in model_cards/ are what their records and configurations give: not edited by hand, not out of date."""

import json
from pathlib import Path

import pytest
import yaml

from recipe_calls import call_recipe

ROOT = Path(__file__).parents[2]
CARDS, RECORDS = ROOT / "model_cards", ROOT / "benchmarks" / "results"
RUNS = sorted(path.parent.name for path in RECORDS.glob("*/release.json"))
PLANNED = ["vit-base-dat-imagenet", "vit-base-imagenet", "vit-small-imagenet"]


def test_rendered_again_they_are_the_same(tmp_path):
    call_recipe("release", "--render", "true", "--cards", tmp_path)
    again = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name for path in CARDS.glob("*.md")} == set(again) == {f"{name}.md" for name in [*RUNS, *PLANNED]}
    stale = [name for name, text in again.items() if (CARDS / name).read_text() != text]
    assert stale == [], "make cards"


@pytest.mark.parametrize("name", RUNS)
def test_they_are_of_the_settings_that_are_shipped(name):
    shipped = yaml.safe_load((ROOT / "recipes" / "configs" / f"{name}.yaml").read_text())
    run = json.loads((RECORDS / name / "run.json").read_text())
    recorded = {key: value for group in run.values() for key, value in group.items()}
    given = {
        key: value for key, value in shipped.items() if key not in ("output_dir", "dataset_name") and value is not None
    }
    assert {key: recorded[key] for key in given} == given


def test_the_digits_say_what_the_documents_say():
    """docs/digits.md has the mean over three seeds, and the differences to the checkpoint per seed, seed 42 first."""

    def column(path, number):
        rows = [line.split("|") for line in path.read_text().splitlines() if line.startswith("| ")]
        return {row[1].strip(): row[number].split(",")[0].split("[")[0].strip() for row in rows if len(row) > number}

    said, shown = column(ROOT / "docs" / "digits.md", 6), column(CARDS / "digits.md", 7)
    for condition in ("clean", "FGSM(eps=8/255)", "generated pixelate 3"):
        assert float(said[condition]) == pytest.approx(float(shown[condition]), abs=0.051)
