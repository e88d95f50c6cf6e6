"""recipes/evaluate_robustness.py on real digits and small trees of sets: what it writes, resumes, and misses."""

import json
import re
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from forked import kill_when
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.robustness.label_spaces import wnids
from hf_nullspace.robustness.sets import SETS
from recipe_calls import call_recipe

PLAN = """
limit: 24
conditions:
  - clean
  - {attack: FGSM, eps: 4/255}
  - {attack: FGSM, eps: 16/255}
  - {corruption: contrast, severity: all}
"""


def call(*words, bars=False):
    """The recipe's exit code."""
    try:
        call_recipe("evaluate_robustness", *words, "--use_cpu", *([] if bars else ["--disable_tqdm"]))
    except SystemExit as stop:
        return stop.code
    return 0


def stored(folder):
    return json.loads((folder / "results.json").read_text())


def checkpoint(folder, labels, size=32, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=size, patch_size=8, id2label=dict(enumerate(labels)))
    config.label2id = {label: i for i, label in enumerate(labels)}
    ViTForImageClassification(config).save_pretrained(folder)
    make_image_processor(size).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def suite(tmp_path):
    """Words that ask for a plan of one's own."""

    def write(plan):
        (tmp_path / "plan.yaml").write_text(plan)
        return ["--suite", tmp_path / "plan.yaml"]

    return write


@pytest.fixture
def digits(tmp_path):
    names = [str(d) for d in range(10)]
    return [checkpoint(tmp_path / name, names, seed=seed) for seed, name in enumerate(("before", "after"))]


@pytest.fixture
def on_sets(tmp_path):
    """Words for a model of ImageNet's classes and two images in each of a few classes of three sets."""
    for name, folders in {
        "imagenet-1k": {wnids()[c]: c for c in (0, 1, 207)},
        "imagenet-a": {wnid: wnids().index(wnid) for wnid in wnids("imagenet-a")[:3]},
        "imagenet-v2": {str(c): c for c in (2, 10)},
    }.items():
        for folder, value in folders.items():
            for i in range(2):
                save_noise(tmp_path / "sets" / name / folder / f"{i}.png", value + i, (40, 50, 3))
    model = checkpoint(tmp_path / "model", wnids())
    return ["--model_name_or_path", model, "--data_root", tmp_path / "sets", "--allow_partial"]


def save_noise(path, seed, shape=(224, 224, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def test_a_plan_on_ones_own_images_and_again(digits, suite, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--compare", *digits, "--dataset_name", "digits", *suite(PLAN), "--output_dir", out, "--published"]
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert "after - before" in said
    assert "Quoted from the paper" in said
    first = stored(out)
    assert len(first["results"]) == 2 * 8
    for record in first["results"]:
        assert record["n"] == 24
        assert record["interval"][0] <= record["score"] == record["correct"] / 24 <= record["interval"][1]
        assert "24 of" in record["protocol"]["note"]
        assert set(record["protocol"]["fingerprints"]) == {"model", "images"}
        assert record["protocol"]["versions"]["torch"] == torch.__version__
    assert {d["condition"] for d in first["differences"]} == {r["condition"] for r in first["results"]}
    assert len(first["checks"]["before"]) == 10
    pictures = {"strength.png", "severity.png", "results.png"}
    names = {path.name for path in out.iterdir()}
    assert names - {".lock"} == pictures | {"records", "results.json", "results.md", "results.csv"}

    assert call(*words) == 0
    assert capsys.readouterr().out.count("8 of 8 conditions were finished before") == 2
    assert stored(out)["results"] == first["results"]
    assert call(*words, "--seed", 3, "--per_sample") == 0
    said = capsys.readouterr().out
    assert "were finished before" not in said
    assert "records in" in said
    assert len(list((out / "per_sample").glob("*/*.parquet"))) == 16


def test_missing_sets_are_listed_and_fail(on_sets, suite, tmp_path, capsys):
    plan = "conditions: [{set: imagenet-1k}, {set: imagenet-1k, attack: MIM}, {set: imagenet-a}, {set: imagenet-v2}, "
    words = [*on_sets, *suite(plan + "{set: imagenet-r}]"), "--output_dir", tmp_path / "out", "--no_checks"]
    assert call(*words) == 1
    said = capsys.readouterr()
    assert "1 conditions are missing" in said.err + said.out
    assert "Missing: imagenet-r: imagenet-r is not at" in said.out
    assert "partial: 6 of 50000 images" in said.out
    found = {record["condition"]: record for record in stored(tmp_path / "out")["results"]}
    assert list(found) == ["imagenet-1k", "imagenet-1k: MIM(eps=1/255, step=0.1/255, steps=10, decay=1)",
                           "imagenet-a", "imagenet-v2"]  # fmt: skip
    assert "score_all_classes" in found["imagenet-a"]
    assert list(stored(tmp_path / "out")["missing"]) == ["imagenet-r"]
    assert "nine columns" not in json.dumps(stored(tmp_path / "out")["averages"])
    assert call(*words, "--allow_missing") == call(*words, "--allow-missing") == 0


def test_limits_of_one_set_may_differ_and_streams_have_none(on_sets, suite, tmp_path, capsys):
    plan = "conditions: [{set: imagenet-1k}, {set: imagenet-1k, attack: FGSM, limit: 3}, {set: imagenet-v2, limit: 2}]"
    words = [*on_sets, *suite(plan), "--output_dir", tmp_path / "out", "--no_checks"]
    words += ["--location", f"imagenet-v2={(tmp_path / 'sets' / 'imagenet-v2').rename(tmp_path / 'v2')}"]
    assert call(*words) == 0
    assert [record["n"] for record in stored(tmp_path / "out")["results"]] == [6, 3, 2]
    assert call(*words, "--streaming") == 2
    assert "a limit takes evenly spaced images, and a stream has no length" in capsys.readouterr().err


def test_a_stream_is_doubted_on_its_first_images(on_sets, suite, tmp_path):
    words = [*on_sets, *suite("conditions: [{set: imagenet-1k}]")]
    assert call(*words, "--output_dir", tmp_path / "whole") == 0
    assert call(*words, "--output_dir", tmp_path / "stream", "--streaming") == 0
    whole, stream = stored(tmp_path / "whole"), stored(tmp_path / "stream")
    assert len(stream["checks"]["model"]) == 10
    assert stream["checks"] == whole["checks"]  # six images, in the same order
    assert stream["results"][0]["correct"] == whole["results"][0]["correct"]


def test_what_an_absent_library_would_do_is_missing_from_the_start(digits, suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    plan = "limit: 12\nconditions: [clean, {attack: AutoAttack}, {corruption: [fog, defocus_blur], severity: 1}]"
    words = ["--model_name_or_path", digits[0], "--dataset_name", "digits", *suite(plan), "--no_checks"]
    assert call(*words, "--output_dir", tmp_path / "out") == 1
    found = stored(tmp_path / "out")
    assert [record["condition"] for record in found["results"]] == ["clean", "generated fog 1"]
    attack, blur = found["missing"].values()
    assert "pip install 'hf-nullspace[attacks]'" in attack
    assert "pip install 'hf-nullspace[corruptions]'" in blur
    assert "2 conditions are missing" in capsys.readouterr().err


def test_one_bar_with_the_time_left_of_the_whole_run(on_sets, suite, tmp_path, capsys):
    """Two sets, three conditions, one of a set that is not there: the bar's total becomes what was really to do."""
    plan = "conditions: [{set: imagenet-1k}, {set: imagenet-r}, {set: imagenet-v2}, {set: imagenet-v2, attack: FGSM}]"
    words = [*on_sets, *suite(plan), "--output_dir", tmp_path / "out", "--no_checks", "--allow_missing"]
    assert call(*words, bars=True) == 0
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    totals = [int(found[1]) for line in errors if (found := re.search(r"/(\d+) \[", line))]
    assert totals[0] > 10_000  # before any set was read, the published sizes
    assert totals[-1] == 6 + 4 + 4 * 4
    assert len({line.partition("|")[0].rstrip(" 0123456789%") for line in errors if "fwd" in line}) >= 4
    assert all("/s]" in line for line in errors if re.search(r"/\d+ \[", line))


def test_a_killed_run_goes_on_where_it_stopped(digits, suite, tmp_path, capsys):
    """SIGKILL, as by a queue or for memory; then the same command: the rest is measured, and equals a whole run."""
    conditions = ", ".join(f"{{attack: PGD, eps: {eps}/255, steps: 12}}" for eps in range(1, 7))
    words = ["--model_name_or_path", digits[0], "--dataset_name", "digits", "--no_checks", "--batch_size", 4]
    words += suite(f"limit: 20\nconditions: [clean, {conditions}]")
    records = tmp_path / "out" / "records"
    command = [*words, "--output_dir", tmp_path / "out", "--use_cpu"]
    kill_when(lambda: len(list(records.glob("*.json"))) >= 2, "evaluate_robustness", *command, log=tmp_path / "log")
    kept = {path.name: path.read_bytes() for path in records.glob("*.json")}
    assert 2 <= len(kept) < 7
    assert call(*words, "--output_dir", tmp_path / "out") == 0
    assert f"{len(kept)} of 7 conditions were finished before: clean" in capsys.readouterr().out
    assert {name: (records / name).read_bytes() for name in kept} == kept
    assert call(*words, "--output_dir", tmp_path / "whole") == 0
    one, two = ([r["correct_bits"] for r in stored(tmp_path / name)["results"]] for name in ("out", "whole"))
    assert one == two
    assert len(one) == 7


def test_nothing_at_all_is_an_error(on_sets, tmp_path, capsys):
    words = [*on_sets, "--data_root", tmp_path / "none", "--suite", "paper", "--allow_missing"]
    assert call(*words, "--output_dir", tmp_path / "out") == 2
    assert "nothing could be measured" in capsys.readouterr().err


@pytest.mark.slow
def test_the_paper_suite_from_end_to_end(tmp_path, capsys):
    """Every set of table 1 with two images: all 86 conditions, the mCE with AlexNet and the average of nine columns."""
    model = checkpoint(tmp_path / "model", wnids(), size=224)
    root, shift = tmp_path / "sets", iter(range(1000))
    c_folders = [name for name in SETS if name.startswith("imagenet-c/")]
    for name in ["imagenet-1k", "imagenet-a", "imagenet-r", "imagenet-sketch", "stylized-imagenet", *c_folders]:
        for i in range(2):
            save_noise(root / name / wnids(SETS[name].space)[3] / f"ILSVRC2012_val_{i}.png", next(shift))
    save_noise(root / "imagenet-v2" / "10" / "a.jpeg", 5)
    save_noise(root / "damagenet" / "ILSVRC2012_val_00000007.png", 6)
    (root / "val.txt").write_text("ILSVRC2012_val_00000007.JPEG 334\n")
    words = ["--model_name_or_path", model, "--data_root", root, "--suite", "paper", "--output_dir", tmp_path / "out"]
    assert call(*words, "--allow_partial", "--published", "--no_checks", "--in_memory") == 0
    found = stored(tmp_path / "out")
    assert len(found["results"]) == 86
    assert found["missing"] == {}
    assert {"ImageNet-C, mCE (AlexNet)", "average of nine columns (table 1)"} <= set(found["averages"]["model"])
    assert "average of nine columns" in capsys.readouterr().out
