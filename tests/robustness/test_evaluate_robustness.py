"""recipes/evaluate_robustness.py on real digits and small trees of sets: what it writes, resumes, and misses."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from forked import script, start
from hf_nullspace.command_line import run
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.robustness.label_spaces import wnids
from hf_nullspace.robustness.published import ALEXNET_ERRORS
from hf_nullspace.robustness.sets import SETS
from hf_nullspace.robustness.summaries import IMAGENET_COLUMNS

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate_robustness.py"
ACCELERATE = RECIPE.parent / "accelerate"
PLAN = """
limit: 24
conditions:
  - clean
  - {attack: FGSM, eps: 4/255}
  - {attack: FGSM, eps: 16/255}
  - {corruption: contrast, severity: all}
"""


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def call(*words, bars=False):
    """Run the recipe in this process, as its command line does; its exit code."""
    main = runpy.run_path(str(RECIPE))["main"]
    quiet = [] if bars else ["--disable_tqdm"]
    arguments, sys.argv = sys.argv, ["evaluate_robustness", *map(str, words), "--use_cpu", *quiet]
    try:
        run(main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = arguments
    return 0


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
def digits(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    names = [str(d) for d in range(10)]
    return [checkpoint(tmp_path / name, names, seed=seed) for seed, name in enumerate(("before", "after"))]


def test_a_plan_on_ones_own_images_and_again(digits, tmp_path, capsys):
    words = ["--compare", *digits, "--dataset_name", "digits", "--suite", tmp_path / "plan.yaml"]
    words += ["--output_dir", tmp_path / "out", "--published"]
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert "after - before" in said
    assert "Quoted from the paper" in said
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(stored["results"]) == 2 * 8
    for record in stored["results"]:
        assert record["n"] == 24
        assert record["interval"][0] <= record["score"] == record["correct"] / 24 <= record["interval"][1]
        assert "24 of" in record["protocol"]["note"]
        assert set(record["protocol"]["fingerprints"]) == {"model", "images"}
        assert record["protocol"]["versions"]["torch"] == torch.__version__
    assert {d["condition"] for d in stored["differences"]} == {r["condition"] for r in stored["results"]}
    assert len(stored["checks"]["before"]) == 10
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {".lock"} == {
        "records",
        "strength.png",
        "severity.png",
        *(f"results.{k}" for k in ("json", "md", "csv", "png")),
    }

    assert call(*words) == 0
    assert capsys.readouterr().out.count("8 of 8 conditions were finished before") == 2
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["results"] == stored["results"]
    assert call(*words, "--seed", 3, "--per_sample") == 0
    said = capsys.readouterr().out
    assert "were finished before" not in said
    assert "records in" in said
    assert len(list((tmp_path / "out" / "per_sample").glob("*/*.parquet"))) == 16


def imagenets(root):
    """Two images in each of a few classes of three sets; their colour is their class."""
    for name, folders in {
        "imagenet-1k": {wnids()[c]: c for c in (0, 1, 207)},
        "imagenet-a": {wnid: wnids().index(wnid) for wnid in wnids("imagenet-a")[:3]},
        "imagenet-v2": {str(c): c for c in (2, 10)},
    }.items():
        for folder, value in folders.items():
            (root / name / folder).mkdir(parents=True)
            for i in range(2):
                noise = np.random.default_rng(value + i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / name / folder / f"{i}.png")
    return root


def test_missing_sets_are_listed_and_fail(tmp_path, capsys):
    model = checkpoint(tmp_path / "model", wnids())
    root = imagenets(tmp_path / "sets")
    plan = "conditions: [{set: imagenet-1k}, {set: imagenet-1k, attack: MIM}, {set: imagenet-a}, {set: imagenet-v2}, "
    (tmp_path / "plan.yaml").write_text(plan + "{set: imagenet-r}]")
    words = ["--model_name_or_path", model, "--data_root", root, "--suite", tmp_path / "plan.yaml"]
    words += ["--output_dir", tmp_path / "out", "--no_checks", "--allow_partial"]
    assert call(*words) == 1
    said = capsys.readouterr()
    assert "1 conditions are missing" in said.err + said.out
    assert "Missing: imagenet-r: imagenet-r is not at" in said.out
    assert "partial: 6 of 50000 images" in said.out
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {record["condition"]: record for record in stored["results"]}
    assert list(found) == ["imagenet-1k", "imagenet-1k: MIM(eps=1/255, step=0.1/255, steps=10, decay=1)",
                           "imagenet-a", "imagenet-v2"]  # fmt: skip
    assert "score_all_classes" in found["imagenet-a"]
    assert list(stored["missing"]) == ["imagenet-r"]
    assert "nine columns" not in json.dumps(stored["averages"])
    assert call(*words, "--allow_missing") == 0
    assert call(*words, "--allow-missing") == 0


def test_limits_of_one_set_may_differ_and_streams_have_none(tmp_path, capsys):
    model = checkpoint(tmp_path / "model", wnids())
    root = imagenets(tmp_path / "sets")
    plan = "conditions: [{set: imagenet-1k}, {set: imagenet-1k, attack: FGSM, limit: 3}, {set: imagenet-v2, limit: 2}]"
    (tmp_path / "plan.yaml").write_text(plan)
    words = ["--model_name_or_path", model, "--data_root", root, "--suite", tmp_path / "plan.yaml"]
    words += ["--output_dir", tmp_path / "out", "--no_checks", "--allow_partial"]
    assert call(*words) == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [record["n"] for record in stored] == [6, 3, 2]
    assert call(*words, "--streaming") == 2
    assert "a limit takes evenly spaced images, and a stream has no length" in capsys.readouterr().err


def test_a_stream_is_doubted_on_its_first_images(tmp_path):
    model = checkpoint(tmp_path / "model", wnids())
    root = imagenets(tmp_path / "sets")
    (tmp_path / "plan.yaml").write_text("conditions: [{set: imagenet-1k}]")
    words = ["--model_name_or_path", model, "--data_root", root, "--suite", tmp_path / "plan.yaml", "--allow_partial"]
    for out in ("whole", "stream"):
        streaming = ["--streaming"] if out == "stream" else []
        assert call(*words, "--output_dir", tmp_path / out, *streaming) == 0
    whole, stream = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "stream")]
    assert len(stream["checks"]["model"]) == 10
    assert stream["checks"] == whole["checks"]  # six images, in the same order
    assert stream["results"][0]["correct"] == whole["results"][0]["correct"]


def test_what_an_absent_library_would_do_is_missing_from_the_start(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    plan = "limit: 12\nconditions: [clean, {attack: AutoAttack}, {corruption: [fog, defocus_blur], severity: 1}]"
    (tmp_path / "plan.yaml").write_text(plan)
    words = ["--model_name_or_path", digits[0], "--dataset_name", "digits", "--suite", tmp_path / "plan.yaml"]
    assert call(*words, "--output_dir", tmp_path / "out", "--no_checks") == 1
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [record["condition"] for record in stored["results"]] == ["clean", "generated fog 1"]
    attack, blur = stored["missing"].values()
    assert "pip install 'hf-nullspace[attacks]'" in attack
    assert "pip install 'hf-nullspace[corruptions]'" in blur
    assert "2 conditions are missing" in capsys.readouterr().err


def test_one_bar_with_the_time_left_of_the_whole_run(tmp_path, capsys):
    """Two sets, three conditions, one of a set that is not there: the bar's total becomes what was really to do."""
    model = checkpoint(tmp_path / "model", wnids())
    plan = "conditions: [{set: imagenet-1k}, {set: imagenet-r}, {set: imagenet-v2}, {set: imagenet-v2, attack: FGSM}]"
    (tmp_path / "plan.yaml").write_text(plan)
    words = ["--model_name_or_path", model, "--data_root", imagenets(tmp_path / "sets"), "--suite"]
    words += [tmp_path / "plan.yaml", "--output_dir", tmp_path / "out", "--no_checks", "--allow_partial"]
    assert call(*words, "--allow_missing", bars=True) == 0
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    totals = [int(found[1]) for line in errors if (found := re.search(r"/(\d+) \[", line))]
    assert totals[0] > 10_000  # before any set was read, the published sizes
    assert totals[-1] == 6 + 4 + 4 * 4
    assert len({line.partition("|")[0].rstrip(" 0123456789%") for line in errors if "fwd" in line}) >= 4
    assert all("/s]" in line for line in errors if re.search(r"/\d+ \[", line))


def test_a_killed_run_goes_on_where_it_stopped(digits, tmp_path, capsys):
    """SIGKILL, as by a queue or for memory; then the same command: the rest is measured, and equals a whole run."""
    conditions = ", ".join(f"{{attack: PGD, eps: {eps}/255, steps: 12}}" for eps in range(1, 7))
    (tmp_path / "plan.yaml").write_text(f"limit: 20\nconditions: [clean, {conditions}]")
    words = ["--model_name_or_path", digits[0], "--dataset_name", "digits", "--suite", tmp_path / "plan.yaml"]
    words += ["--no_checks", "--batch_size", 4]
    records = tmp_path / "out" / "records"
    command = [*words, "--output_dir", tmp_path / "out", "--use_cpu"]
    child = start(script, "evaluate_robustness", *command, log=tmp_path / "log")
    deadline = time.monotonic() + 100
    while len(list(records.glob("*.json"))) < 2 and child.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    kept = {path.name: path.read_bytes() for path in records.glob("*.json")}
    assert 2 <= len(kept) < 7
    assert call(*words, "--output_dir", tmp_path / "out") == 0
    assert f"{len(kept)} of 7 conditions were finished before: clean" in capsys.readouterr().out
    assert {name: (records / name).read_bytes() for name in kept} == kept
    assert call(*words, "--output_dir", tmp_path / "whole") == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("out", "whole"))
    assert [r["correct_bits"] for r in one] == [r["correct_bits"] for r in two]
    assert len(one) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --model_name_or_path M or --compare"),
        (["--compare", "A", "--model_name_or_path", "A"], "give either"),
        (["--model_name_or_path", "A"], "name them with --dataset_name"),
        (["--model_name_or_path", "A", "--suite", "papers"], "expected quick, standard, paper"),
        (["--model_name_or_path", "A", "--suit", "paper"], "did you mean --suite"),
        (["--model_name_or_path", "A", "--location", "imagenet-a"], "expected NAME=FOLDER"),
        (["--model_name_or_path", "./nowhere", "--suite", "paper"], "nowhere"),
    ],
)
def test_bad_calls_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]


def test_a_model_of_other_classes_is_refused(tmp_path, capsys):
    model = checkpoint(tmp_path / "model", ["cat", "dog"])
    assert call("--model_name_or_path", model, "--dataset_name", "digits", "--output_dir", tmp_path / "out") == 2
    assert "does not know the classes of digits" in capsys.readouterr().err
    words = ["--model_name_or_path", model, "--data_root", imagenets(tmp_path / "sets"), "--allow_partial"]
    (tmp_path / "plan.yaml").write_text("conditions: [{set: imagenet-v2}]")
    assert call(*words, "--suite", tmp_path / "plan.yaml", "--output_dir", tmp_path / "out") == 2
    assert "does not name 1000 of ImageNet's 1,000 classes" in capsys.readouterr().err


def test_nothing_at_all_is_an_error(tmp_path, capsys):
    model = checkpoint(tmp_path / "model", wnids())
    words = ["--model_name_or_path", model, "--data_root", tmp_path / "none", "--suite", "paper", "--allow_missing"]
    assert call(*words, "--output_dir", tmp_path / "out") == 2
    assert "nothing could be measured" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_on_two_processes(digits, tmp_path):
    """accelerate launch, two real processes: the same answers for every image as on one."""
    words = ["--model_name_or_path", digits[0], "--dataset_name", "digits", "--suite", tmp_path / "plan.yaml"]
    words += ["--limit", "23", "--use_cpu", "--disable_tqdm"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE / "cpu_2proc.yaml"]
    command = [*launcher, RECIPE, *words, "--output_dir", tmp_path / "two"]
    subprocess.run(list(map(str, command)), check=True, timeout=300, env=os.environ | ONE_THREAD)
    assert call(*words, "--output_dir", tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two"))
    assert [r["correct_bits"] for r in one] == [r["correct_bits"] for r in two]
    assert {r["n"] for r in two} == {23}


@pytest.mark.slow
def test_the_paper_suite_from_end_to_end(tmp_path, capsys):
    """Every set of table 1 with two images: all 86 conditions, the mCE with AlexNet and the average of nine columns."""
    model = checkpoint(tmp_path / "model", wnids(), size=224)
    root, shift = tmp_path / "sets", iter(range(1000))
    c_folders = [name for name in SETS if name.startswith("imagenet-c/")]
    for name in ["imagenet-1k", "imagenet-a", "imagenet-r", "imagenet-sketch", "stylized-imagenet", *c_folders]:
        (root / name / wnids(SETS[name].space)[3]).mkdir(parents=True)
        for i in range(2):
            noise_image(next(shift)).save(root / name / wnids(SETS[name].space)[3] / f"ILSVRC2012_val_{i}.png")
    (root / "imagenet-v2" / "10").mkdir(parents=True)
    noise_image(5).save(root / "imagenet-v2" / "10" / "a.jpeg")
    (root / "damagenet").mkdir()
    noise_image(6).save(root / "damagenet" / "ILSVRC2012_val_00000007.png")
    (root / "val.txt").write_text("ILSVRC2012_val_00000007.JPEG 334\n")
    words = ["--model_name_or_path", model, "--data_root", root, "--suite", "paper", "--output_dir", tmp_path / "out"]
    assert call(*words, "--allow_partial", "--published", "--no_checks", "--in_memory") == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(stored["results"]) == 86
    assert stored["missing"] == {}
    averages = stored["averages"]["model"]
    scores = {r["condition"]: 100 * r["score"] for r in stored["results"]}
    cells = {c: [100 - scores[f"imagenet-c/{c}/{s}"] for s in range(1, 6)] for c in ALEXNET_ERRORS}
    mce = np.mean([100 * np.mean(cells[c]) / error for c, error in ALEXNET_ERRORS.items()])
    assert averages["ImageNet-C, mCE (AlexNet)"] == pytest.approx(mce)
    columns = [scores[title] for title in IMAGENET_COLUMNS.values()]
    assert averages["average of nine columns (table 1)"] == pytest.approx((sum(columns) + 100 - mce) / 9)
    assert "average of nine columns" in capsys.readouterr().out


def noise_image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (224, 224, 3), dtype=np.uint8))
