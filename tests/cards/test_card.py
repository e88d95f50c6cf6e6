"""The card of a run: every number against NumPy, what is doubted or missing, no path of a machine, lines that run."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from made_runs import CONDITIONS, SETTINGS, answers, finetuned, results
from PIL import Image

from hf_nullspace.cards.card import model_card, write_card
from hf_nullspace.cards.run_folder import RunFolder, RunFolderError, portable, source
from hf_nullspace.command_line import parse
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.robustness.checks import Check
from hf_nullspace.robustness.report import write_report
from hf_nullspace.robustness.scores import accuracy
from hf_nullspace.robustness.suite import ConditionResult
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.loading import DataArguments, ModelArguments
from tiny_models import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"


def rows_of(card):
    """Cells of every table row, by the first cell."""
    lines = [line for line in str(card).splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


@pytest.fixture
def three(tmp_path):
    """Before, plain and nullspace: nullspace is plain on clean images, better on FGSM, worse on fog."""
    plain = dict(zip(CONDITIONS, (answers(1), answers(2, 0.4), answers(3)), strict=True))
    ours = {"clean": plain["clean"].copy(), "FGSM(eps=2/255)": plain["FGSM(eps=2/255)"] | (answers(4, 0.2))}
    ours["clean"][np.flatnonzero(~plain["clean"])[:2]] = True  # 0.5 points that say nothing
    ours["generated fog 3"] = plain["generated fog 3"] & answers(5, 0.8)
    return results(before=answers(0), plain=plain, nullspace=ours)


def test_the_table_has_the_numbers_of_the_bits(tmp_path, three):
    rows = rows_of(model_card(finetuned(tmp_path / "mine", three)))
    assert rows["condition"] == [
        "images", "before", "plain", "nullspace", "nullspace - before", "nullspace - plain"
    ]  # fmt: skip
    for index, title in enumerate(CONDITIONS):
        n, *cells = rows[title]
        right = [three[name][index].correct for name in ("before", "plain", "nullspace")]
        found = [[float(number) for number in re.findall(r"[+-]?\d+\.\d+", cell)] for cell in cells]
        assert int(n) == 400
        for (value, low, high), correct in zip(found[:3], right, strict=True):
            p, z = correct.mean(), 1.959964  # Wilson
            centre, half = p + z**2 / 800, z * np.sqrt(p * (1 - p) / 400 + z**2 / 4 / 400**2)
            bounds = np.array([centre - half, centre + half]) / (1 + z**2 / 400)
            assert value == pytest.approx(100 * p, abs=0.005)
            assert [low, high] == pytest.approx(100 * bounds, abs=0.01)
        for (value, low, high), other in zip(found[3:], right[:2], strict=True):
            change = right[2].astype(float) - other
            spread = 196 * change.std() / np.sqrt(400)
            assert value == pytest.approx(100 * change.mean(), abs=0.005)
            assert [low, high] == pytest.approx([value - spread, value + spread], abs=0.6)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "fine-tuned from `ORG/base` at revision `c0ffee` on `uoft-cs/cifar10` with nullspace noise. Every 5 steps "
             "a noise on the patch embeddings is learned that the model of that moment hardly sees (mean squared shift "
             "of the probabilities below epsilon = 0.03); every training batch then goes"),
        ({"steps_per_round": None, "epsilon": None}, "noise. At intervals a noise on the patch embeddings is learned "
                                                     "that the model of that moment hardly sees; every"),
        ({"objective": "plain"}, "on `uoft-cs/cifar10` without noise: every batch twice as it is, the control of a"),
        ({"objective": "madry"}, "on `uoft-cs/cifar10` with adversarial images (Madry et al. 2018)."),
        ({"objective": "a new one"}, "on `uoft-cs/cifar10` with the objective `a new one` of hf-nullspace."),
    ],
)  # fmt: skip
def test_what_was_trained_is_said_in_words(more, words, tmp_path):
    settings = SETTINGS | {"training": SETTINGS["training"] | more}
    settings["model"] = SETTINGS["model"] | {"model_revision": "c0ffee"}
    text = str(model_card(finetuned(tmp_path / "mine", results(mine=answers(0)), settings)))
    assert "`ViTForImageClassification` (2 layers, patches of 8 px, 2 classes), fine-tuned from" in text
    assert words in text
    assert "Base model: `ORG/base`. Data: `uoft-cs/cifar10`, split `train`, revision `abc123`." in text


def test_a_model_without_a_known_base(tmp_path):
    (tmp_path / "mine").mkdir()
    assert "`An image classifier`, fine-tuned with hf-nullspace.\n" in str(model_card(tmp_path / "mine"))
    settings = SETTINGS | {"model": {"model_name_or_path": None}}
    text = str(model_card(finetuned(tmp_path / "mine", results(mine=answers(0)), settings)))
    assert "2 classes), trained from random weights and then fine-tuned on `uoft-cs/cifar10` with" in text
    assert "Base model: a model that the run trained itself." in text


def test_averaged_weights_are_a_column_and_not_the_model(tmp_path, three):
    folder = finetuned(tmp_path / "mine", three | {"nullspace, EMA": three["before"]})
    (report,) = RunFolder(folder).reports
    assert (report.subject, report.control) == ("nullspace", "plain")
    assert rows_of(model_card(folder))["condition"][-2:] == ["nullspace - before", "nullspace - plain"]


def evaluated(folder, measured, **more):
    """What ``recipes/evaluate_robustness.py`` leaves."""
    context = {"compare": [f"/srv/me/runs/{name}" for name in measured], "dataset_name": "ORG/set", "split": "test"}
    write_report(measured, folder, context=context, **more)
    return folder


def test_what_is_unreliable_or_missing_is_said_and_in_no_metadata(tmp_path):
    failed = [Check("gradients are not masked", False, "12 right under PGD, 3 under noise", "attacks"),
              Check("eval mode", True, "it is")]  # fmt: skip
    measured = results(base=answers(0), control=answers(1), mine=answers(2))
    missing = {"imagenet-a": "no folder of imagenet-a; pass --location"}
    folder = evaluated(tmp_path / "mine", measured, checks={"mine": failed, "base": []}, missing=missing)
    card = model_card(folder, "ORG/mine")
    rows = rows_of(card)
    assert rows["FGSM(eps=2/255)"][3].endswith("(!)")
    assert not rows["FGSM(eps=2/255)"][1].endswith("(!)")
    assert all(cell.endswith("(!)") for cell in rows["FGSM(eps=2/255)"][4:])
    assert not any(cell.endswith("(!)") for cell in rows["clean"])
    assert rows["imagenet-a"] == ["", "missing", "missing", "missing", "", ""]
    assert "(!) mine: unreliable, the check *gradients are not masked* failed: 12 right under PGD" in str(card)
    assert "Missing: imagenet-a: no folder of imagenet-a" in str(card)
    assert [entry.metric_args["condition"] for entry in card.data.eval_results] == ["clean", "generated fog 3"]
    assert "of 2 conditions" in str(card) or "all 2 intervals" in str(card), "the verdict counts what is reliable"
    all_failed = [Check("eval mode", False, "dropout is on")]
    evaluated(folder, measured, checks={"mine": all_failed})
    card = model_card(folder, "ORG/mine")
    assert card.data.eval_results is None
    assert "model-index" not in str(card)
    assert "no condition could be compared" in str(card)


def test_model_index_and_eval_results_are_what_the_hub_reads(tmp_path, three):
    folder = finetuned(tmp_path / "mine", three)
    card, results_file = write_card(folder, "ORG/mine", license="apache-2.0")
    assert results_file == folder / ".eval_results" / "uoft-cs--cifar10.yaml"
    data = ModelCard.load(card).data
    assert (data.base_model, data.datasets, data.license) == ("ORG/base", ["uoft-cs/cifar10"], "apache-2.0")
    found = {entry.metric_args["condition"]: entry for entry in data.eval_results}
    assert set(found) == set(CONDITIONS)
    for result in three["nullspace"]:
        entry = found[result.condition]
        assert entry.metric_value == pytest.approx(result.correct.mean(), abs=1e-6)
        place = (entry.dataset_type, entry.dataset_split, entry.dataset_revision)
        assert place == ("uoft-cs/cifar10", "test", "abc123")
    (entry,) = parse_eval_result_entries(yaml.safe_load(results_file.read_text()))
    assert (entry.dataset_id, entry.dataset_revision) == ("uoft-cs/cifar10", "abc123")
    assert entry.value == pytest.approx(three["nullspace"][0].correct.mean(), abs=1e-6), "clean images alone"
    local = SETTINGS | {"data": SETTINGS["data"] | {"dataset_name": "/srv/me/cifar10"}}
    kept = folder / ".eval_results" / "mine.yaml"
    kept.write_text("- dataset: {id: a/b, task_id: c}\n  value: 1\n")
    assert write_card(finetuned(folder, three, local)) == [card], "the Hub does not know a local folder"
    assert not results_file.exists()
    assert kept.exists(), "somebody else's file"


def test_accuracies_have_six_digits(tmp_path):
    correct = answers(0, n=399)
    folder = finetuned(tmp_path / "mine", results(nullspace=correct))
    card, results_file = write_card(folder, "ORG/mine")
    (row,) = yaml.safe_load(results_file.read_text())
    entry = ModelCard.load(card).data.eval_results[0]
    assert row["value"] == entry.metric_value == float(f"{correct.mean():.6f}") != correct.mean()
    low, high = entry.metric_args["interval_95"]
    assert [low, high] == [float(f"{x:.6f}") for x in (accuracy(correct).low, accuracy(correct).high)]


def test_every_set_of_an_evaluation_is_named_as_what_it_is(tmp_path):
    """The user's own images, a published set from the Hub with its commit, one from a folder, an attack on a set."""
    protocols = {
        "clean": {"set": "ORG/set, test", "note": "400 of 1000 images, evenly spaced"},
        "imagenet-a": {"set": "imagenet-a", "from": "axiong/imagenet-a, split test, commit 0123abc"},
        "imagenet-a: FGSM(eps=1/255)": {"set": "imagenet-a", "from": "axiong/imagenet-a, split test, commit 0123abc",
                                        "attack": "FGSM", "settings": {"eps": 1 / 255}},
        "imagenet-r": {"set": "imagenet-r", "from": "axiong/imagenet-r, split test, commit not known (offline)"},
        "imagenet-sketch": {"set": "imagenet-sketch"},
    }  # fmt: skip
    measured = [ConditionResult(title, answers(1), 1.0, 0, how) for title, how in protocols.items()]
    folder = evaluated(tmp_path / "mine", {"mine": measured})
    found = {entry.metric_args["condition"]: entry for entry in model_card(folder).data.eval_results}
    places = {title: (e.dataset_type, e.dataset_split, e.dataset_revision) for title, e in found.items()}
    assert places == {
        "clean": ("ORG/set", "test", None),
        "imagenet-a": ("axiong/imagenet-a", "test", "0123abc"),
        "imagenet-a: FGSM(eps=1/255)": ("axiong/imagenet-a", "test", "0123abc"),
        "imagenet-r": ("axiong/imagenet-r", "test", None),
        "imagenet-sketch": ("imagenet-sketch", None, None),
    }
    assert "400 of 1000 images, evenly spaced" in found["clean"].dataset_name
    files = {path.name: yaml.safe_load(path.read_text()) for path in write_card(folder)[1:]}
    assert {name: len(entries) for name, entries in files.items()} == {
        "ORG--set.yaml": 1, "axiong--imagenet-a.yaml": 1, "axiong--imagenet-r.yaml": 1
    }  # fmt: skip
    assert "400 of 1000 images, evenly spaced" in files["ORG--set.yaml"][0]["notes"]
    assert "* clean: the images as they are; set ORG/set, test; note 400 of 1000" in str(model_card(folder))


def test_no_path_of_this_machine_is_in_a_card(tmp_path, three):
    settings = json.loads(json.dumps(SETTINGS).replace("ORG/base", "/srv/me/my models/base"))
    settings["data"]["dataset_name"] = str(tmp_path / "pictures")
    folder = finetuned(tmp_path / "mine", three, settings)
    noise = {"provenance": {"base_model": str(tmp_path / "base"), "epsilon": 0.03, "settings": {}}}
    (folder / "nullspace_noise.json").write_text(json.dumps(noise))
    evaluated(folder / "robustness", results(**{"runs/base": answers(0), "runs/mine": answers(1)}))
    text = "".join(path.read_text() for path in write_card(folder))
    assert "/srv" not in text
    assert str(tmp_path) not in text
    assert "`base` (a local folder)" in text
    assert "base_model" not in text.split("---")[1]
    assert "Images: /path/to/pictures, split test" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/me/my models/base", "/path/to/base"),
        ("/data/c10, split test, first 20", "/path/to/c10, split test, first 20"),
        ("no file '/tmp/a/b.bin'; get it", "no file '/path/to/b.bin'; get it"),
        ("~/runs/mine", "/path/to/mine"),
        ("C:\\Users\\me\\mine", "/path/to/mine"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("FGSM(eps=1/255), imagenet-c/fog/1, google/vit", "FGSM(eps=1/255), imagenet-c/fog/1, google/vit"),
        ("/path/to/base", "/path/to/base"),
    ],
)
def test_paths_become_names(text, expected):
    assert portable({text: [text, 1], "correct_bits": "a+/b/c"}) == {expected: [expected, 1], "correct_bits": "a+/b/c"}


def test_what_counts_as_an_id_of_the_hub(tmp_path, monkeypatch):
    assert source("google/vit-base").hub_id == "google/vit-base"
    for local in ("outputs/mine", "checkpoints/dat", "./mine", "/path/to/mine", "a/b/c", "digits"):
        assert source(local).hub_id is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "vit-base").mkdir(parents=True)
    assert source("google/vit-base").hub_id is None


def test_the_lines_that_show_its_use_run(tmp_path, three, monkeypatch, capsys):
    folder = finetuned(tmp_path / "path" / "to" / "mine", three)
    model = tiny_model("vit")
    model.save_pretrained(folder)
    make_image_processor(16).save_pretrained(folder)
    (block,) = re.findall(r"```python\n(.*?)```", str(model_card(folder)), re.DOTALL)
    assert len(block.splitlines()) == 4
    Image.new("RGB", (50, 40), "red").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert "'label'" in capsys.readouterr().out


def test_its_settings_give_the_run_back(tmp_path, three):
    recipe = runpy.run_path(str(RECIPES / "finetune.py"))["FinetuneArguments"]
    kinds = (recipe, ModelArguments, DataArguments, NullspaceConfig)
    text = """--dataset_name ORG/set --model_name_or_path ORG/base --fgsm 4/255 --rounds 3 --steps_per_round 7
        --epsilon 0.07 --seed 5 --noise_loss squared_l2 --warmup_steps 2 --horizontal_flip false
        --ema_decay 0.9 --ema_from ORG/average"""
    place = ["--output_dir", str(tmp_path / "mine"), "--use_cpu", "true"]

    def settings(words):
        *parts, config = parse(kinds, "", words)
        named = dict(zip(("recipe", "model", "data"), (dict(vars(part)) for part in parts), strict=True))
        return json.loads(json.dumps(named | {"training": config.to_dict()}, default=str))

    first = settings([*text.split(), *place])
    card = str(model_card(finetuned(tmp_path / "mine", three, first)))
    assert "| averaged weights (EMA), in `ema/` | decay 0.9 per step, started from ORG/average |" in card
    (text,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "settings.yaml").write_text(text)
    again = settings(
        ["--config", str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "mine"), "--use_cpu", "true"]
    )
    assert again == first


def test_a_run_without_results_or_settings_has_a_card(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert "Nothing has been measured yet." in str(model_card(folder))
    for content, message in [
        ('{"results": []}', "has no results; measure again"),
        ('{"results": [', r"results\.json is no valid JSON"),
        ('{"results": [{"checkpoint": "a"}]}', "is no report of results"),
    ]:
        (folder / "results.json").write_text(content)
        with pytest.raises(RunFolderError, match=message):
            model_card(folder)


def test_the_cost_is_summed_from_the_history(tmp_path, three):
    folder = finetuned(tmp_path / "mine", three)
    (folder / "cost.json").write_text('{"forward": 3, "forward_equivalents": 12345, "stages": {}}')
    rows = rows_of(model_card(folder))
    assert rows["noise steps"] == ["18 (7 to 11 per noise)"]
    assert rows["images through noise steps"] == [str(18 * 4)]
    assert rows["training images"] == ["at most 80, each in two views"]
    assert rows["noises"] == ["2: 1 reached epsilon, 1 were scaled into epsilon"]
    assert rows["seconds for the noises"] == ["4 (wall clock)"]
    assert rows["all passes as forward passes"] == ["12,345"]
    history = json.loads((folder / "nullspace_history.json").read_text())
    for entry, stopped in zip(history, ("calibrated", "another way"), strict=True):
        entry |= {"stopped": stopped, "noise_steps": 60}
    (folder / "nullspace_history.json").write_text(json.dumps(history))
    rows = rows_of(model_card(folder))
    assert rows["noises"] == ["2: 1 scaled to epsilon on held-out images, 1 another way"]
    assert rows["noise steps"] == ["120 (60 per noise)"]
