"""Every file that a recipe has written, damaged as power loss or a person does it; then the recipe is started again."""

import pytest


def deleted(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"deleted": deleted, "empty": empty, "half": half, "one bit flipped": flipped}


def each_file(campaign, recipe, run, damage, kind):
    """What is wrong after each file of the folder ``run`` was damaged, one at a time."""
    names = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    wrong = []
    for name in names:
        folder = campaign.new_folder(copy_of=run)
        DAMAGES[damage](folder / name)
        wrong.append(campaign.again(kind, f"{name}: {damage}", recipe, folder))
    return [problem for problem in wrong if problem]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_finished_run(campaign, finetune, damage):
    assert each_file(campaign, finetune, finetune.undisturbed, damage, "damaged file of a finished run") == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_killed_run(campaign, finetune, killed, damage):
    assert each_file(campaign, finetune, killed, damage, "damaged file of a killed run") == []
