"""Text from files in cards and tables: an independent Markdown parser sees text where text was meant."""

import ast
import itertools
import json

import pytest
import torch
from made_runs import HISTORY, SETTINGS, answers
from markdown_it import MarkdownIt

from hf_nullspace.cards.card import model_card
from hf_nullspace.core.text import block, cell, code, escape, literal
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise
from hf_nullspace.noise.bank import NoiseBank
from hf_nullspace.robustness.checks import Check
from hf_nullspace.robustness.report import as_json, markdown
from hf_nullspace.robustness.suite import ConditionResult

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert(1)</script>",
    "x\n\n# A heading\n\n* an item\n\n---\n",
    "```\n</details>\n<img src=x onerror=alert(1)>\n```",
    '"); import os; os.system("id"); ("',
    "'; rm -rf ~; echo '",
    "[click](javascript:alert(1)) ![p](http://a/b) [a]: http://a <http://a>",
    "a | b | c",
    "\\`` `code` **bold** __init__ _it_ ~~no~~ &lt;b&gt; \\<b> \\",
    "# h",
    "> quote",
    "- item",
    "1. item",
    "===",
    "[a]: http://a",
    "~~~",
    "\u202eevil\x1b[2J",
]
MIXED = "\n".join(HOSTILE)
ORDINARY = [
    "FGSM(eps=1/255)", "PGD(eps=8/255, step=2/255, steps=10, norm='linf', random_start=True)", "generated fog 3",
    "imagenet-c/fog/1", "+1.25 [-0.50, 3.00]", "-1.25 [-3.00, 0.50]", "95.00 [94.10, 95.90] (!)", "(!)", "a < b",
    "1e-05",
    "pixels in [0, 1]", "pip install 'hf-nullspace[attacks]'", "2.13.0+cpu", "~/images", "1.5", "", "lr_scheduler_type",
]  # fmt: skip


def structure(text):
    """The kinds of blocks and spans, and the content of HTML and code, in order."""
    tokens = PARSER.parse(text.split("\n---\n", 1)[-1])
    return [token for each in tokens for token in [each, *(each.children or ())]]


def kinds(text):
    """Neighbouring texts are one; a link shows where it goes."""
    found = [
        (token.type, token.attrGet("href") if token.type == "link_open" else token.tag if token.type != "text" else "")
        for token in structure(text)
        if token.type != "text" or token.content
    ]
    return [kind for kind, _ in itertools.groupby(found)]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_escaped_is_text(text):
    plain = "word"
    for template in ("{}", "before {} after", "* {}\n* second", "# {}", "**{}** and", "*{}* and"):
        assert kinds(template.format(escape(text))) == kinds(template.format(plain)), template
        assert kinds(template.format(code(text))) == kinds(template.format(code(plain))), template
    table = "| a | b |\n| --- | --- |\n| {} | 1 |"
    assert kinds(table.format(cell(text))) == kinds(table.format(plain))
    (fence,) = PARSER.parse(block(text, "yaml"))
    assert (fence.type, fence.info, fence.content.strip("\n")) == ("fence", "yaml", text.strip("\n"))
    assert ast.literal_eval(literal(text)) == text
    assert not {"\u202e", "\x1b", "\n"} & set(escape(text) + code(text))


@pytest.mark.parametrize("text", ORDINARY)
def test_what_is_ordinary_stays_as_it_is(text):
    assert escape(text) == cell(text) == text


def spoilt(value, text):
    """A JSON value with ``text`` for every word MARK in it."""
    return json.loads(json.dumps(value).replace("MARK", json.dumps(text)[1:-1]))


def run_with(text, folder):
    """A run's folder whose files have ``text`` wherever they hold words."""
    protocol = {"MARK": "MARK", "attack": "MARK", "settings": {"MARK": "MARK"}, "note": "MARK"}
    rows = {
        name: [
            ConditionResult(condition, answers(seed), seconds=1.0, seed=0, protocol=spoilt(protocol, text))
            for seed, condition in enumerate(spoilt(["MARK", "corruption MARK"], text))
        ]
        for name in spoilt(["before", "MARK", "nullspace"], text)
    }
    settings = SETTINGS | {
        "model": {"model_name_or_path": "a b MARK", "model_revision": "MARK", "image_size": 32},
        "data": SETTINGS["data"]
        | {"dataset_name": "a b MARK", "dataset_revision": "MARK", "train_split": "MARK"}
        | {"dataset_config": "/data/mine"},
        "training": SETTINGS["training"] | {"optim": "MARK", "lr_scheduler_type": "MARK", "steps_per_round": "MARK"},
    }
    noise = {"learner": "boundary", "loss": "MARK", "epsilon": 0.03, "steps": 3, "learning_rate": 0.1, "count": 1}
    missing, checks = spoilt({"MARK": "MARK"}, text), {"before": [Check(text, False, text)]}
    context = spoilt({"images": "MARK", "settings": settings}, text)
    files = {
        "results": as_json(rows, context, missing, checks),
        "run": settings,
        "config": {"architectures": ["MARK"], "patch_size": "MARK", "image_size": "MARK", "id2label": {"0": "a"}},
        "nullspace_history": [entry | {"stopped": "MARK"} for entry in HISTORY],
        "preprocessor_config": {"size": {"height": "MARK", "width": "MARK"}},
        "nullspace_noise": {"provenance": {"revision": "MARK", "settings": noise | {"pool_images": 3}}},
    }
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(spoilt(content, text)))
    (folder / "results.md").write_text(markdown(rows, missing=missing, checks=checks))
    return folder


@pytest.mark.parametrize("text", [MIXED, "# h", "1. item", "a | b"])
def test_a_card_keeps_its_form_whatever_the_files_say(text, tmp_path):
    runs = [run_with(word, tmp_path / str(index) / "mine") for index, word in enumerate(("a b", text))]
    usual, card = (str(model_card(run)) for run in runs)
    assert kinds(card) == kinds(usual)
    results = [(run / "results.md").read_text() for run in runs]
    assert kinds(results[1]) == kinds(results[0])


@pytest.mark.parametrize("text", [MIXED, "# h"])
def test_the_code_of_a_card_is_the_code_that_was_meant(text, tmp_path):
    def made(word, folder, bank=False):
        known = {"base_model": word, "revision": word, "model_sha256": word, "stopped": word, "library": word}
        provenance = NoiseProvenance(**known, settings={word: word, "b": [word]})
        noise = NullspaceNoise(torch.ones(1, 4, 3), (2, 2), provenance)
        (NoiseBank((noise, noise)) if bank else noise).save_pretrained(tmp_path / folder, repo_id=f"lab/{word}")
        return (tmp_path / folder / "README.md").read_text()

    for bank in (False, True):
        usual, card = made("a b", f"usual{bank}", bank), made(text, f"hostile{bank}", bank)
        assert [kind for kind in kinds(card) if kind[0] != "link_open"] == [
            kind for kind in kinds(usual) if kind[0] != "link_open"
        ]
        assert all(kind[1].startswith("https://huggingface.co/") for kind in kinds(card) if kind[0] == "link_open")
        (use,) = [token.content for token in structure(card) if token.type == "fence"]
        (same,) = [token.content for token in structure(usual) if token.type == "fence"]
        strings = {node.value for node in ast.walk(ast.parse(use)) if isinstance(node, ast.Constant)}
        assert {text, f"lab/{text}"} <= strings
        names = [[node.id for node in ast.walk(ast.parse(each)) if isinstance(node, ast.Name)] for each in (use, same)]
        assert names[0] == names[1]
    finished = run_with("a b", tmp_path / "mine")
    (use, *_) = [t.content for t in structure(str(model_card(finished, f"lab/{text}"))) if t.type == "fence"]
    (model,) = [node.value for node in ast.walk(ast.parse(use)) if isinstance(node, ast.keyword)]
    assert ast.literal_eval(model) == f"lab/{text}"
