"""What is typed wrong ends in one line that helps: tables of cases, on the command line and in Python.

``bad_input/command_line.txt`` and ``bad_input/python.txt`` have one row per case. The default run takes all of Python,
every tenth of the command lines and those that start with "+"; ``slow`` takes the rest.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from string import Template

import pytest
import torch
from PIL import Image

from bad_input import namespace
from bad_models import save_bad_models, save_good
from recipe_calls import RECIPES, call_recipe
from timm_style import timm_weights

TABLES = Path(__file__).parent / "bad_input"
LONGEST = 20  # seconds
TINY = '{"rounds": 1, "steps_per_round": 1, "global_batch_size": 4, "noise_batch_size": 4, "held_out_images": 4}'
SHORT = (
    "--rounds 1 --steps_per_round 1 --global_batch_size 4 --noise_batch_size 4 --noise_max_steps 2 --held_out_images 4 "
    "--noise_pool_images 4 --use_cpu true --report_to none --disable_tqdm true --output_dir $out"
)
MEASURED = "--max_eval_images 4 --corruptions contrast --severities 3 --control false"
FEW = "--max_eval_images 4"
SMALL = "--image_size 16 --patch_size 8 --hidden_size 8 --num_hidden_layers 1 --intermediate_size 8 --base_epochs 1"
BASE = {
    "finetune": f"--model_name_or_path $vit --dataset_name $images {MEASURED} {SHORT}",
    "small": f"--dataset_name $images {SMALL} --base_batch_size 20 {MEASURED} {SHORT}",
    "evaluate_robustness": "--model_name_or_path $vit --dataset_name $images --suite $yaml/suite.yaml --use_cpu "
    "--disable_tqdm --checks false --limit 4 --output_dir $out",
    "learn_noise": "--model_name_or_path $vit --dataset_name $images --learner boundary --max_steps 1 --batch_size 4 "
    "--held_out_images 4 --pool_images 4 --epsilon 0.5 --use_cpu --output_dir $out",
    "analyze": "--model_name_or_path $vit --images 1 --output_dir $out",
    "reproduce": f"--model_name_or_path $vit --dataset_name $images --seeds 1 --sweep_steps 1 {FEW} {SHORT}",
    "compare": f"--model_name_or_path $vit --dataset_name $images --training '{TINY}' --seeds 0 --average clean "
    """--report 0:4 --arms '{"plain": {"objective": "plain"}}' --resamples 10 --use_cpu --output_dir $out""",
    "watermark": "--model_name_or_path $vit --image $picture --mark $mark --iterations 2 --method rollout "
    "--output_dir $out",
    "explain": "--model_name_or_path $vit --image $picture --method rollout --output_dir $out",
    "release": "--cards $out",
    "convert": "--checkpoint $timm --heads 4 --normalization imagenet --output_dir $out/new",
}
"""The smallest run of every recipe; what a row says comes after it, so it wins."""
YAML = {
    "fine.yaml": "epsilon: 0.02\n",
    "latin1.yaml": "# caf\xe9\nepsilon: 0.02\n".encode("latin-1"),
    "twice.yaml": "epsilon: 0.02\nepsilon: 0.03\n",
    "tabs.yaml": "training:\n\tepsilon: 0.02\n",
    "tag.yaml": "epsilon: !!python/object/apply:os.getcwd []\n",
    "list.yaml": "- epsilon\n",
    "unknown.yaml": "epsilonn: 0.02\n",
    "suite.yaml": "conditions: [clean]\n",
    "suite_all.yaml": "conditions: [clean, {attack: FGSM, eps: 1/255}, {corruption: contrast, severity: 3}]\n",
    "suite_tabs.yaml": "conditions:\n\t- clean\n",
    "suite_tag.yaml": "conditions: !!python/object/apply:os.getcwd []\n",
    "suite_list.yaml": "- clean\n",
    "suite_latin1.yaml": "# caf\xe9\nconditions: [clean]\n".encode("latin-1"),
    "suite_no_list.yaml": "condition: []\n",
    "suite_limits.yaml": "conditions: []\nlimits: 3\n",
    "suite_empty.yaml": "conditions: []\n",
    "suite_twice.yaml": "conditions: [clean, clean]\n",
    "suite_keys_twice.yaml": "limit: 3\nconditions: [clean]\nlimit: 4\n",
    "suite_fraction.yaml": "conditions: [{attack: PGD, steps: 2.5}]\n",
    "suite_no_steps.yaml": "conditions: [{attack: PGD, steps: 0}]\n",
    "suite_no_step.yaml": "conditions: [{attack: PGD, step: 0}]\n",
    "suite_limit.yaml": "conditions: [clean]\nlimit: 0\n",
    "suite_attack_list.yaml": "conditions: [{attack: [PGD]}]\n",
    "suite_corruption.yaml": "conditions: [{corruption: fogg}]\n",
    "suite_severity.yaml": "conditions: [{corruption: fog, severity: 2.5}]\n",
    "suite_set.yaml": "conditions: [{set: imagenett}]\n",
    "suite_word.yaml": "conditions: [cleen]\n",
    "other.json": '{"a": 1}',
}


def rows(table, of):
    """(columns) of every row; "+" and the first of each ``of`` is for the default run, unless it starts a process."""
    lines = (TABLES / table).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    cases = [[part.strip() for part in line.removeprefix("+").split("|")] for line in lines]
    tenth = [index % of == 0 and not case[0].startswith("real ") for index, case in enumerate(cases)]
    quick = [one or line.startswith("+") for one, line in zip(tenth, lines, strict=True)]
    marks = [() if one else pytest.mark.slow for one in quick]
    return [pytest.param(*case, marks=mark, id=" ".join(case[:2])) for case, mark in zip(cases, marks, strict=True)]


def picture(path, seed):
    """A smooth 16 px image, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small.numpy()).resize((16, 16), Image.Resampling.BICUBIC).save(path)
    return path


def class_folders(folder, classes, train=4, test=2):
    for kind, name in enumerate(classes):
        for split, count in (("train", train), ("test", test)):
            for index in range(count):
                picture(folder / split / name / f"{index}.png", 100 * kind + 10 * index + (split == "test"))
    return folder


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Name -> what stands for ``$name`` in a row."""
    root = tmp_path_factory.mktemp("bad_input")
    for name, content in YAML.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no picture, no weights\n")
    save_bad_models(root / "bad")
    for name, split in (("corrupt", "train"), ("corrupt_test", "test")):
        folder = class_folders(root / name, [f"class {i}" for i in range(5)])
        for kind in folder.glob(f"{split}/*"):
            (kind / "0.png").write_bytes(b"no picture")
    whole = picture(root / "picture.png", 1).read_bytes()
    (root / "broken.png").write_bytes(whole[: len(whole) // 2])
    torch.save(timm_weights(), root / "timm.pth")
    return {
        "yaml": root,
        "empty": root / "empty",
        "text": root / "notes.txt",
        "bad": root / "bad",
        "vit": save_good(root / "vit"),
        "images": class_folders(root / "images", [f"class {i}" for i in range(5)]),
        "text_labels": class_folders(root / "text_labels", ["cat", "dog"], train=10),
        "one_class": class_folders(root / "one_class", ["cat"], train=20),
        "corrupt": root / "corrupt",
        "corrupt_test": root / "corrupt_test",
        "picture": root / "picture.png",
        "mark": picture(root / "mark.png", 2),
        "broken": root / "broken.png",
        "timm": root / "timm.pth",
    }


@contextmanager
def at_most(seconds):
    def too_long(number, frame):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def offline(monkeypatch, folder):
    """In a folder of its own and without the Hub."""
    from huggingface_hub import constants

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def in_this_process(recipe, words, capsys):
    try:
        with at_most(LONGEST):
            call_recipe(recipe, *words)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, capsys.readouterr().err


def in_its_own(recipe, words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=10 * LONGEST, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("call", "words", "expected"), rows("command_line.txt", of=10))
def test_on_the_command_line(call, words, expected, places, tmp_path, monkeypatch, capsys):
    offline(monkeypatch, tmp_path)
    names = {name: str(place) for name, place in places.items()} | {"out": str(tmp_path / "out")}
    own = call.startswith("real ")
    name, *first = call.removeprefix("real ").split()
    recipe = "finetune" if name == "small" else name
    text = words.removeprefix("~") if words.startswith("~") else f"{BASE[name]} {words}"
    words = [Template(word).substitute(names) for word in (*first, *shlex.split(text))]
    begin = time.perf_counter()
    code, said = in_its_own(recipe, words) if own else in_this_process(recipe, words, capsys)
    assert time.perf_counter() - begin < (10 * LONGEST if own else LONGEST)
    assert "Traceback" not in said
    if expected == "accepted":
        assert code == 0, said
        return
    wanted = Template(expected).substitute(names)
    if wanted.startswith("exit 1: "):
        assert code == 1
        assert wanted.removeprefix("exit 1: ") in said
        return
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert wanted in errors[0]


@pytest.mark.parametrize(("call", "kind", "words"), rows("python.txt", of=1))
def test_in_python(call, kind, words, places, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    known = namespace(places, tmp_path)
    with at_most(LONGEST):
        if kind == "accepted":
            eval(call, known)
            return
        with pytest.raises(Exception) as raised:
            eval(call, known)
    assert kind in {base.__name__ for base in type(raised.value).__mro__}, repr(raised.value)
    assert words in " ".join(str(raised.value).split())


def test_the_tables_are_long_and_no_row_is_there_twice():
    command_line, python = rows("command_line.txt", of=10), rows("python.txt", of=1)
    assert len(command_line) >= 270
    assert len(python) >= 110
    assert {re.sub("^real ", "", row.values[0]).split()[0] for row in command_line} == BASE.keys()
    for table in (command_line, python):
        assert len({tuple(row.values[:2]) for row in table}) == len(table), "a row stands there twice"
