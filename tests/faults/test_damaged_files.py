"""Every file that a recipe has written, damaged as power loss or a person does it; then the recipe is started again."""

import pytest
from campaign import ONE_NOISE, OTHERS

pytestmark = pytest.mark.slow


def flipped(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": flipped,
}


def each_file(campaign, recipe, run, turn, state):
    """What is wrong after each file of the folder ``run`` was damaged, one at a time; the damage takes turns."""
    names = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    damages = [list(DAMAGES)[(place + turn) % len(DAMAGES)] for place in range(len(names))]
    cases = [(f"{name}: {damage}", (name, damage)) for name, damage in zip(names, damages, strict=True)]
    kind = f"damaged file of a {state} run"

    def damaged(what, case):
        name, damage = case
        folder = campaign.new_folder(copy_of=run)
        DAMAGES[damage](folder / name)
        return campaign.again(kind, what, recipe, folder)

    return campaign.problems(kind, recipe, cases, damaged)


@pytest.mark.parametrize("turn", [1, 3])
def test_of_a_killed_run(campaign, finetune, killed, turn):
    assert each_file(campaign, finetune, killed, turn, "killed") == []


TURNS = [("finetune", 0), ("compare", 0)]
TURNS += [(name, turn) for name in (*OTHERS, ONE_NOISE) if name != "compare" for turn in range(4)]


@pytest.mark.parametrize(("recipe", "turn"), TURNS, indirect=["recipe"])
def test_of_a_finished_run(campaign, recipe, turn):
    assert each_file(campaign, recipe, recipe.undisturbed, turn, "finished") == []
