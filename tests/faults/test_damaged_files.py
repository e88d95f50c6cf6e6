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


def each_file(campaign, recipe, run, turn, state):
    """What is wrong after each file of the folder ``run`` was damaged, one at a time; the damage takes turns."""
    names = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    wrong = []
    for place, name in enumerate(names):
        damage = list(DAMAGES)[(place + turn) % len(DAMAGES)]
        kind, what = f"damaged file of a {state} run", f"{name}: {damage}"
        if not campaign.wanted(kind, what, recipe):
            continue
        folder = campaign.new_folder(copy_of=run)
        DAMAGES[damage](folder / name)
        wrong.append(campaign.again(kind, what, recipe, folder))
    return [problem for problem in wrong if problem]


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0])
def test_of_a_finished_run(campaign, finetune, turn):
    assert each_file(campaign, finetune, finetune.undisturbed, turn, "finished") == []


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, 3])
def test_of_a_killed_run(campaign, finetune, killed, turn):
    assert each_file(campaign, finetune, killed, turn, "killed") == []
