"""Kills and signals in every phase of a recipe: started again, it ends as if nothing had happened."""

import random

import pytest
from campaign import Recipe

STOPPED = "SIGTERM", "SIGINT"


def stretches(phases):
    """Runs of equal phases: (phase, numbers of its forward passes)."""
    found = []
    for number, phase in enumerate(phases, 1):
        if not found or found[-1][0] != phase:
            found.append((phase, []))
        found[-1][1].append(number)
    return found


def moments(phases):
    """The first, the middle and the last forward pass of every stretch: (what, number)."""
    for place, (phase, numbers) in enumerate(stretches(phases), 1):
        for which in dict.fromkeys((0, len(numbers) // 2, len(numbers) - 1)):
            yield f"{phase}, stretch {place}, forward pass {which + 1} of {len(numbers)}", numbers[which]


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


def strike(campaign, recipe, kind, places, point, signal, more=()):
    """What is wrong after a signal at each of the places (what, number)."""
    wrong = []
    for name, number in places:
        if not campaign.wanted(f"{signal} {kind}", name, recipe):
            continue
        folder = campaign.new_folder()
        ended = campaign.server.run(recipe, folder, more, point=[point, number], action=signal)
        wrong.append(campaign.struck(f"{signal} {kind}", name, recipe, folder, ended, signal))
    return [problem for problem in wrong if problem]


@pytest.mark.slow
def test_killed_at_a_forward_pass(campaign, finetune):
    places = moments(finetune.points["forward"])
    assert strike(campaign, finetune, "at a forward pass", places, "forward", "SIGKILL") == []


@pytest.mark.slow
def test_killed_between_two_files(campaign, finetune):
    places = spread(finetune.points["file"], 40)
    assert strike(campaign, finetune, "between two files", places, "file", "SIGKILL") == []


@pytest.mark.slow
@pytest.mark.parametrize("signal", STOPPED)
def test_stopped_in_every_phase(campaign, finetune, signal):
    places = list(moments(finetune.points["forward"]))[1::3]
    assert strike(campaign, finetune, "at a forward pass", places, "forward", signal) == []


@pytest.mark.slow
@pytest.mark.parametrize("signal", STOPPED)
def test_stopped_between_two_files(campaign, finetune, signal):
    places = spread(finetune.points["file"], 8)
    assert strike(campaign, finetune, "between two files", places, "file", signal) == []


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGKILL", *STOPPED])
def test_with_workers_that_load_images(campaign, finetune, undisturbed, signal):
    """The workers end, too."""
    words = [*finetune.words, "--dataloader_num_workers", "2"]
    recipe = undisturbed(Recipe("finetune", words, finetune.parts, finetune.plain))
    phases = stretches(recipe.points["forward"])
    places = [
        (f"{phase}, stretch {place}, with two workers", numbers[len(numbers) // 2])
        for place, (phase, numbers) in enumerate(phases, 1)
    ]
    chosen = [places[0], places[2], places[-2]]
    assert strike(campaign, recipe, "with DataLoader workers", chosen, "forward", signal) == []


@pytest.mark.slow
def test_killed_by_a_clock(campaign, finetune):
    """Wherever that is. A run that has ended before the clock strikes counts as no fault."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    generator, wrong = random.Random(seed), []
    for number in range(8):
        folder, seconds = campaign.new_folder(), generator.uniform(0.2, 1.0) * finetune.seconds
        ended = campaign.server.run(finetune, folder, point=["clock", seconds], action="SIGKILL")
        if ended.code == 0:
            continue
        name = f"clock {number + 1}, after {seconds:.2f} s"
        wrong.append(campaign.struck("SIGKILL by a clock", name, finetune, folder, ended, "SIGKILL"))
    assert [problem for problem in wrong if problem] == []


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_killed_again_and_again(campaign, finetune, signal):
    """Five starts in one folder, each ended at a forward pass or between two files; the sixth is left alone."""
    folder, killed = campaign.new_folder(), 0
    for point in (["forward", 40], ["file", 60], ["forward", 40], ["file", 40], ["forward", 40]):
        ended = campaign.server.run(finetune, folder, point=point, action=signal)
        killed += ended.code != 0
    assert killed >= 4
    name = f"{killed} times in one run"
    problem = campaign.struck(f"{signal} again and again", name, finetune, folder, ended, signal)
    assert problem is None


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--save_strategy", "no"], ["--control", "false"]], ids=" ".join)
def test_killed_without_checkpoints_or_control(campaign, finetune, undisturbed, options):
    """Noises of the rounds before are there, and nothing to go on from; or there is no control before the training."""
    recipe = undisturbed(Recipe("finetune", [*finetune.words, *options], finetune.parts, finetune.plain))
    places = [(f"{what}, {' '.join(options)}", number) for what, number in moments(recipe.points["forward"])]
    assert strike(campaign, recipe, "at a forward pass", places[4::4], "forward", "SIGKILL") == []
