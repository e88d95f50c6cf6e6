"""Kills and signals in every phase of a recipe: started again, it ends as if nothing had happened."""

import random

import pytest
from campaign import OTHERS, Recipe

pytestmark = pytest.mark.slow
STOPPED = "SIGTERM", "SIGINT"


def stretches(phases):
    """Runs of equal phases: (phase, numbers of its forward passes)."""
    found = []
    for number, phase in enumerate(phases, 1):
        if not found or found[-1][0] != phase:
            found.append((phase, []))
        found[-1][1].append(number)
    return found


def moments(recipe):
    """The first, the middle and the last forward pass of every stretch: (what, number)."""
    return [
        (f"{phase}, stretch {place}, forward pass {which + 1} of {len(numbers)}", numbers[which])
        for place, (phase, numbers) in enumerate(stretches(recipe.points["forward"]), 1)
        for which in dict.fromkeys((0, len(numbers) // 2, len(numbers) - 1))
    ]


def spread(files, count):
    """``count`` evenly spaced operations on files: (what, number)."""
    places = dict.fromkeys(round(index * (len(files) - 1) / (count - 1)) for index in range(count))
    return [(f"before file operation {place + 1} of {len(files)}: {without_random(files[place])}", place + 1)
            for place in places]  # fmt: skip


def without_random(operation):
    """``os.rename a/.x.json.abc.part`` as ``os.rename a/x.json``."""
    words, _, name = operation.rpartition("/") if "/" in operation else operation.rpartition(" ")
    if name.startswith(".") and name.endswith(".part"):
        name = name[1:].rsplit(".", 2)[0]
    return f"{words}{'/' if '/' in operation else ' '}{name}"


def strike(campaign, recipe, where, places, signal, point="forward"):
    """What is wrong after a signal at each of the places (what, number)."""
    kind = f"{signal} {where}"

    def struck(name, number):
        folder = campaign.new_folder()
        ended = campaign.run(recipe, folder, point=[point, number], action=signal)
        return campaign.struck(kind, name, recipe, folder, ended, signal)

    return campaign.problems(kind, recipe, places, struck)


@pytest.mark.parametrize("recipe", ["finetune", *OTHERS], indirect=True)
def test_killed_at_a_forward_pass(campaign, recipe):
    places = moments(recipe)
    every = 1 if recipe.name == "finetune" else max(len(places) // 10, 1)
    assert strike(campaign, recipe, "at a forward pass", places[::every], "SIGKILL") == []


@pytest.mark.parametrize("signal", STOPPED)
@pytest.mark.parametrize("recipe", ["finetune", *OTHERS], indirect=True)
def test_stopped_in_every_phase(campaign, recipe, signal):
    places = moments(recipe)
    chosen = places[1::3] if recipe.name == "finetune" else places[1 :: max(len(places) // 3, 1)][:3]
    assert strike(campaign, recipe, "at a forward pass", chosen, signal) == []


@pytest.mark.parametrize(
    ("recipe", "signal", "count"),
    [("finetune", "SIGKILL", 40), *((name, "SIGKILL", 12) for name in OTHERS), *(("finetune", s, 8) for s in STOPPED)],
    indirect=["recipe"],
)
def test_ended_between_two_files(campaign, recipe, signal, count):
    places = spread(recipe.points["file"], count)
    assert strike(campaign, recipe, "between two files", places, signal, "file") == []


@pytest.mark.parametrize("signal", ["SIGKILL", *STOPPED])
def test_with_workers_that_load_images(campaign, finetune, undisturbed, signal):
    """The workers end, too."""
    words = [*finetune.words, "--dataloader_num_workers", "2"]
    recipe = undisturbed(Recipe("finetune", words, finetune.parts, finetune.plain))
    places = [
        (f"{phase}, stretch {place}, with two workers", numbers[len(numbers) // 2])
        for place, (phase, numbers) in enumerate(stretches(recipe.points["forward"]), 1)
    ]
    chosen = [places[0], places[2], places[-2]]
    assert strike(campaign, recipe, "with DataLoader workers", chosen, signal) == []


def test_killed_by_a_clock(campaign, finetune):
    """Wherever that is. A run that has ended before the clock strikes counts as no fault."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    generator, wrong = random.Random(seed), []
    for number in range(8):
        folder, seconds = campaign.new_folder(), generator.uniform(0.2, 1.0) * finetune.seconds
        ended = campaign.run(finetune, folder, point=["clock", seconds], action="SIGKILL")
        if ended.code != 0:
            name = f"clock {number + 1}, after {seconds:.2f} s"
            wrong.append(campaign.struck("SIGKILL by a clock", name, finetune, folder, ended, "SIGKILL"))
    assert [problem for problem in wrong if problem] == []


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_killed_again_and_again(campaign, finetune, signal):
    """Five starts in one folder, each ended at a forward pass or between two files; the sixth is left alone."""
    folder, killed = campaign.new_folder(), 0
    for point in (["forward", 40], ["file", 60], ["forward", 40], ["file", 40], ["forward", 40]):
        ended = campaign.run(finetune, folder, point=point, action=signal)
        killed += ended.code != 0
    assert killed >= 4
    name = f"{killed} times in one run"
    assert campaign.struck(f"{signal} again and again", name, finetune, folder, ended, signal) is None


@pytest.mark.parametrize("options", [["--save_strategy", "no"], ["--control", "false"]], ids=" ".join)
def test_killed_without_checkpoints_or_control(campaign, finetune, undisturbed, options):
    """Noises of the rounds before are there, and nothing to go on from; or there is no control before the training."""
    recipe = undisturbed(Recipe("finetune", [*finetune.words, *options], finetune.parts, finetune.plain))
    places = [(f"{what}, {' '.join(options)}", number) for what, number in moments(recipe)]
    assert strike(campaign, recipe, "at a forward pass", places[4::4], "SIGKILL") == []
