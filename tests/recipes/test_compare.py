"""recipes/compare.py end to end: a tiny study on digits, killed, stopped and resumed, ends with the same JSON."""

import json
import re
import runpy
import shutil

import pytest
import yaml

from forked import kill_when
from hf_nullspace.robustness.records import from_bits
from recipe_calls import RECIPES, call_recipe
from study.report import complete

TINY = """
dataset_name: digits
horizontal_flip: false
crop_scale: 1.0
hidden_size: 16
num_hidden_layers: 1
num_attention_heads: 2
intermediate_size: 16
base_epochs: 4
base_learning_rate: 0.01
arms:
  plain: {objective: plain}
  nullspace: {objective: nullspace, preset: descent, noise_limit: 0.5}
training: {rounds: 2, steps_per_round: 2, global_batch_size: 16, noise_batch_size: 16, noise_max_steps: 5,
           held_out_images: 32, dataloader_pin_memory: false}
seeds: [0, 1]
learning_rates: [0.001, 0.003]
alphas: [0.5, 1.0]
keep_clean: 50.0
conditions:
  - clean
  - {attack: FGSM, eps: 8/255, limit: 30}
  - {corruption: contrast, severity: 3}
  - {attack: MIM, eps: 8/255, limit: 20, seeds: [0]}
average: [clean, FGSM, cells]
limit: 60
report: "0:200"
selection: "200:300"
selection_limit: 40
resamples: 200
use_cpu: true
"""


def settings(folder, **changed):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | changed, sort_keys=False))
    return "--config", path, "--output_dir", folder / "study"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    call_recipe("compare", *settings(folder))
    return folder / "study"


def content(folder):
    """Results without what the clock and the place decide."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(v) for key, v in value.items() if key not in ("seconds", "output_dir", "commit")}
        return [timeless(entry) for entry in value] if isinstance(value, list) else value

    return timeless(json.loads((folder / "results.json").read_text()))


def test_the_json_holds_everything(whole):
    found = json.loads((whole / "results.json").read_text())
    runs = [("before", None), ("plain", 0), ("nullspace", 0), ("plain", 1), ("nullspace", 1)]
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == runs
    for run in found["runs"]:
        assert {"clean", "FGSM(eps=8/255)", "generated contrast 3"} <= set(run["correct_bits"])
        assert len(run["correct_bits"]) == (3 if run["seed"] == 1 else 4), "MIM on seed 0 and the checkpoint alone"
        clean = from_bits(run["correct_bits"]["clean"], 60)
        seeds = found["table"][run["arm"]]["clean"]["seeds"]
        assert 100 * clean.mean() == pytest.approx(seeds[run["seed"] or 0], abs=1e-3)
    assert complete({k: v for k, v in found.items() if k not in ("table", "differences", "against_before", "cost")}
                    | {"resamples": 200}, resamples=200) == found  # fmt: skip
    rates, alphas, lost = (found["selection"][name] for name in ("chosen", "alphas", "clean_lost"))
    for arm, averages in found["selection"]["averages"].items():
        chosen = f"{rates[arm]:g}" + (f", alpha {alphas[arm]:g}" if alphas[arm] < 1 else "")
        most = max(50.0, min(lost[arm].values()))
        assert averages[chosen] == max(value for name, value in averages.items() if lost[arm][name] <= most)
    assert found["cost"]["plain"]["forward_equivalents"] == 4 * 16 * 2 * 3
    assert found["cost"]["nullspace"]["forward_equivalents"] > found["cost"]["plain"]["forward_equivalents"]
    assert (found["power"]["selection_images"], found["power"]["report_images"]) == (40, 30)
    assert len(found["versions"]) > 3


def test_power_was_written_before_the_report_images_were_looked_at(whole):
    written = (whole / "selection.json").stat().st_mtime_ns
    looked_at = [path.stat().st_mtime_ns for path in whole.glob("runs/**/report/*.json")]
    selected = [path.stat().st_mtime_ns for path in whole.glob("runs/**/selection/*.json")]
    assert len(looked_at) == 5 * 3 + 3
    assert len(selected) == (1 + 2 * 4) * 3
    assert max(selected) <= written <= min(looked_at)
    assert json.loads((whole / "selection.json").read_text())["power"] == content(whole)["power"]


def test_killed_and_resumed_it_ends_with_the_same_json(whole, tmp_path):
    """SIGKILL once a few results are there; then stopped by the clock; then to the end."""

    def measured():
        return len(list((tmp_path / "study").glob("runs/**/selection/*.json")))

    words = settings(tmp_path)
    shutil.copytree(whole / "base", tmp_path / "study" / "base")
    kill_when(lambda: measured() >= 10, "compare", *words, log=tmp_path / "log.txt")
    left = measured()
    assert 10 <= left < 27
    call_recipe("compare", *words, "--max_minutes", "0")
    assert measured() == left
    call_recipe("compare", *words)
    assert content(tmp_path / "study") == content(whole)


def test_one_arm_does_not_look_at_the_report_before_all_have_chosen(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "study")
    for gone in ("runs/nullspace/lr-0.001", "runs/plain/lr-0.001/seed-0/report", "runs/plain/lr-0.003/seed-0/report"):
        shutil.rmtree(tmp_path / "study" / gone, ignore_errors=True)
    call_recipe("compare", *settings(tmp_path), "--only", "plain", "before")
    assert "The selection of other arms is not finished" in capsys.readouterr().out
    assert not list((tmp_path / "study").glob("runs/plain/*/seed-0/report"))


def test_a_dry_run_tells_and_does_nothing(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "runs" / "plain")
    words = settings(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    call_recipe("compare", *words, "--dry_run")
    out = capsys.readouterr().out
    assert "train nullspace, lr 0.003, seed 0: finished" in out
    assert "train plain, lr 0.001, seed 0: 0 of 1 done, 384 passes left" in out
    assert "measure plain, lr 0.001, seed 0 (selection): 0 of 3 done, 240 passes left" in out  # 40 + 40 x 4 + 40
    assert re.search(r"\n\d+ of \d+ tasks left, about \d+ minutes \(by the speed of the finished tasks\)", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_changed_settings_are_errors(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "study")
    arms = yaml.safe_load(TINY)["arms"] | {"nullspace": {"objective": "nullspace", "noise_limit": 0.4}}
    with pytest.raises(SystemExit):
        call_recipe("compare", *settings(tmp_path, arms=arms))
    said = capsys.readouterr().err
    assert "0.5 there, 0.4 now" in said
    assert "--overwrite" in said


def test_changed_images_of_an_arm_are_errors(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "runs" / "plain")  # another arm's images: the runs of this one stay good
    for arm, image_settings, expected in (
        ("nullspace", {"crop_scale": 0.5}, "1.0 there, 0.5 now"),
        ("plain", {"crop_scale": 7}, "crop_scale=7: expected a number in (0, 1]"),
    ):
        arms = yaml.safe_load(TINY)["arms"]
        arms[arm] = arms[arm] | image_settings
        with pytest.raises(SystemExit):
            call_recipe("compare", *settings(tmp_path, arms=arms), f"--only={arm}")
        assert expected in capsys.readouterr().err
    arms["plain"]["crop_scale"] = 0.5
    call_recipe("compare", *settings(tmp_path, arms=arms), "--dry_run")
    assert "train nullspace, lr 0.003, seed 0: finished" in capsys.readouterr().out


def test_tables_and_pictures_again_from_the_json_alone(whole, tmp_path):
    call_recipe("compare", f"--render={whole / 'results.json'}", f"--output_dir={tmp_path}", "--resamples=200")
    for name in ("results.json", "results.md", "cost.png", "conditions.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    text = (whole / "results.md").read_text()
    assert "Paired differences to plain in points" in text
    assert "| nullspace | 2 |" in text
    assert str(whole.parent) not in (whole / "results.json").read_text(), "no path of this machine"


def test_settings_keep_their_text_and_folders_their_last_name(tmp_path):
    without_paths = runpy.run_path(str(RECIPES / "compare.py"))["without_paths"]
    arms = json.dumps({"madry": {"attack_step": "4/255"}} | {f"arm {n}": {"objective": "plain"} for n in range(20)})
    found = without_paths({"arms": arms, "step": "1/255", "model": str(tmp_path), "seeds": [0], "none": None})
    assert found == {"arms": arms, "step": "1/255", "model": tmp_path.name, "seeds": [0], "none": None}
