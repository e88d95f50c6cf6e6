"""Folders of others, other weights and images under the same name, a stranger's checkpoint, two starts at once."""

import os
import shutil
import signal
import time

import pytest
import torch
from campaign import OTHERS, Recipe
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "what", ["other settings", "files of somebody", "a stranger's checkpoint", "a model", "a bank of noises"]
)
def test_a_folder_of_somebody_else(campaign, finetune, what):
    folder = campaign.new_folder()
    if what == "other settings":
        shutil.copytree(finetune.undisturbed, folder)
        more, theirs = ["--learning_rate", "0.002"], campaign.new_folder()
        assert campaign.run(finetune, theirs, more).code == 0
        problem = campaign.again("foreign folder", what, finetune, folder, more=more, undisturbed=theirs)
    else:
        folder.mkdir()
        theirs = finetune.undisturbed
        if what == "files of somebody":
            (folder / "thesis.txt").write_text("years\n")
        elif what == "a stranger's checkpoint":
            shutil.copytree(theirs / "checkpoint-6", folder / "checkpoint-12")
        elif what == "a model":
            for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
                shutil.copy(theirs / name, folder)
        else:
            shutil.copytree(theirs / "noises", folder / "noises")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        problem = campaign.again("foreign folder", what, finetune, folder, keep_folder=True)
        assert {path: path.read_bytes() for path in before} == before, "a refusal touches nothing"
    assert problem is None


@pytest.mark.parametrize("state", ["killed", "finished"])
@pytest.mark.parametrize("what", ["checkpoint-4", "checkpoint-6", "control/checkpoint-6", "base", "noises"])
def test_a_part_of_another_run(campaign, finetune, run_of, other_seed, state, what):
    """A whole folder of a run with another seed, under a name of this one's, or as a step that it has not reached."""
    folder, name = campaign.new_folder(copy_of=run_of[state]), f"{what} of another seed, {state} run"
    shutil.rmtree(folder / what, ignore_errors=True)
    shutil.copytree(other_seed / what, folder / what)
    without = lambda: shutil.rmtree(folder / what)  # noqa: E731
    assert campaign.again("part of another run", name, finetune, folder, mend=without) is None


@pytest.fixture(scope="module")
def other_seed(campaign, finetune):
    folder = campaign.new_folder()
    more = ["--seed", "7", "--save_total_limit", "9"]
    assert campaign.run(finetune, folder, more).code == 0
    return folder


@pytest.fixture(scope="module")
def own(undisturbed, finetune, tmp_path_factory):
    """A model and a folder of images of one's own, and the fine-tuning that begins with them."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(finetune.undisturbed / "base", folder / "model")
    (folder / "model" / "manifest.json").unlink()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 2)):
        for digit in range(10):
            (folder / "images" / split / str(digit)).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / "images" / split / str(digit) / f"{number}.png")
    words = [*finetune.words, "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "images")]
    return folder, undisturbed(Recipe("finetune", words, finetune.parts, finetune.plain))


def other_weights(folder, by=0.01):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + by}, path, metadata={"format": "pt"})


def other_image(path):
    image = Image.open(path)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)


TRAIN, TEST = "images/train/3/1.png", "images/test/3/1.png"
CHANGES = {
    "other weights": lambda folder: other_weights(folder / "model"),
    "other training image": lambda folder: other_image(folder / TRAIN),
    "other test image": lambda folder: shutil.copy(folder / TEST, folder / "images/test/4/1.png"),
    "one image less": lambda folder: (folder / TRAIN).unlink(),
    "one image moved": lambda folder: (folder / TRAIN).rename(folder / "images/train/4/99.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_something_else_under_the_same_name(campaign, own, tmp_path, change):
    """The finished run is refused; with the old content back, it is found again."""
    place, recipe = own
    folder = campaign.new_folder(copy_of=recipe.undisturbed)
    shutil.copytree(place, tmp_path / "kept")
    CHANGES[change](place)

    def mend():
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "kept", place)

    try:
        assert campaign.again("other content under the same name", change, recipe, folder, mend=mend) is None
    finally:
        mend()


@pytest.mark.parametrize("recipe", OTHERS[:2], indirect=True)
def test_other_weights_under_the_same_name(campaign, recipe, model):
    """An evaluation measures them; a bank of noises refuses them."""
    folder, theirs, path = campaign.new_folder(copy_of=recipe.undisturbed), None, model / "model.safetensors"
    kept = path.read_bytes()
    other_weights(model, by=0.5)
    try:
        if recipe.name == "evaluate_robustness":
            theirs = campaign.new_folder()
            assert campaign.run(recipe, theirs).code == 0
            shutil.copytree(recipe.undisturbed / "records", theirs / "records", dirs_exist_ok=True)  # they stay
        problem = campaign.again("other content under the same name", "other weights", recipe, folder,
                                 mend=lambda: path.write_bytes(kept), undisturbed=theirs)  # fmt: skip
        assert problem is None
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "preprocessor_config.json", "an image"])
def test_what_it_begins_with_is_damaged(campaign, own, tmp_path, damage):
    place, recipe = own
    path = place / (TRAIN if damage == "an image" else f"model/{damage}")
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) // 2])
    mend = lambda: path.write_bytes(kept)  # noqa: E731
    folder = campaign.new_folder()
    try:
        assert campaign.again("damaged input", damage, recipe, folder, mend=mend, named=path.parent) is None
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("recipe", ["finetune", *OTHERS], indirect=True)
def test_two_starts_at_once(campaign, recipe):
    """Both wait or work; nothing is mixed."""
    folder = campaign.new_folder()
    first, second = (campaign.begin(recipe, folder) for _ in range(2))
    ends = [campaign.end(first), campaign.end(second)]
    problem = None
    if sorted(ended.code for ended in ends) not in ([0, 0], [0, 2]):
        problem = f"lost: exit codes {[ended.code for ended in ends]}: {ends[0].err[-300:]} {ends[1].err[-300:]}"
    assert campaign.again("two starts", "at the same time", recipe, folder, problem=problem) is None


@pytest.mark.parametrize("phase", ["base model", "measuring", "noise", "training"])
def test_a_second_start_while_the_first_one_is_at_work(campaign, finetune, phase):
    """With the first one halted, the second is refused with the first one's number."""
    folder = campaign.new_folder()
    number = finetune.points["forward"].index(phase) + 2
    first = campaign.begin(finetune, folder, point=["forward", number], action="SIGSTOP")
    halted(first[0].pid)
    refused = campaign.run(finetune, folder, ["--overwrite", "true"])
    os.kill(first[0].pid, signal.SIGCONT)
    ended = campaign.end(first)
    problem, named = None, f"is in use by process {first[0].pid} on "
    if refused.code != 2 or len(refused.errors) != 1 or named not in refused.errors[0]:
        problem = f"lost: the second start ended with {refused.code}: {refused.err[-500:]}"
    elif ended.code != 0:
        problem = f"lost: the first start ended with {ended.code}: {ended.err[-500:]}"
    name = f"a second one, with the first in the {phase}"
    said = refused.errors[0] if refused.errors else ""
    assert campaign.again("two starts", name, finetune, folder, problem=problem, said=said) is None


def halted(pid):
    until = time.monotonic() + 120
    while True:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            if file.read().rpartition(")")[2].split()[0] == "T":
                return
        assert time.monotonic() < until
        time.sleep(0.1)
