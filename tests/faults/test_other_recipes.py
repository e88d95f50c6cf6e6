"""The same faults for a bank of noises, an evaluation and a study."""

import shutil

import pytest
import yaml
from campaign import Recipe
from safetensors.torch import load_file, save_file
from test_damaged_files import each_file
from test_disk import failed
from test_kills import moments, spread, strike

STUDY = {
    "dataset_name": "digits", "horizontal_flip": False, "crop_scale": 1.0, "max_train_images": 300,
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "base_epochs": 4, "base_learning_rate": 0.01,
    "arms": {"plain": {"objective": "plain"}, "nullspace": {"objective": "nullspace", "preset": "descent"}},
    "training": {"rounds": 1, "steps_per_round": 2, "global_batch_size": 16, "noise_batch_size": 16,
                 "noise_max_steps": 3, "held_out_images": 16, "dataloader_pin_memory": False},
    "seeds": [0], "learning_rates": [0.001, 0.003], "conditions": ["clean", {"corruption": "contrast", "severity": 3}],
    "average": ["clean", "cells"], "limit": 40, "report": "0:100", "selection": "100:200", "selection_limit": 20,
    "resamples": 50, "use_cpu": True,
}  # fmt: skip
SUITE = {"conditions": ["clean", {"attack": "FGSM", "eps": "8/255"}, {"corruption": "contrast", "severity": 3}]}
RECIPES = ("learn_noise", "evaluate_robustness", "compare")
ONE_NOISE = "learn_noise --count 1"


@pytest.fixture(scope="session")
def model(finetune, tmp_path_factory):
    """A model that the three recipes begin with, in a folder of its own."""
    folder = tmp_path_factory.mktemp("model") / "small-vit"
    shutil.copytree(finetune.undisturbed / "base", folder)
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="session")
def recipes(undisturbed, model, tmp_path_factory):
    """Name -> the recipe, which has run once; made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("configs"), {}
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    begins = ["--model_name_or_path", str(model), "--dataset_name", "digits", "--use_cpu", "true"]
    noise = ["--count", "3", "--max_steps", "5", "--batch_size", "16", "--held_out_images", "32", "--epsilon", "0.05",
             "--learner", "descent", "--horizontal_flip", "false", "--crop_scale", "1.0"]  # fmt: skip
    suite = ["--suite", str(folder / "suite.yaml"), "--limit", "40", "--disable_tqdm", "true"]
    planned = {
        "learn_noise": (begins + noise, ("*.safetensors",), ("history.json",)),
        ONE_NOISE: ([*begins, *noise, "--count", "1"], ("*.safetensors",), ("history.json", "config.json")),
        "evaluate_robustness": (begins + suite, (), ("results.json", "records/*.json")),
        "compare": (["--config", str(folder / "study.yaml")], ("**/model.safetensors",), ("results.json",)),
    }

    def of(name):
        if name not in made:
            made[name] = undisturbed(Recipe(name.partition(" ")[0], *planned[name], label=name))
        return made[name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_a_forward_pass(campaign, recipes, name):
    recipe = recipes(name)
    places = list(moments(recipe.points["forward"]))
    places = places[:: max(len(places) // 10, 1)]
    assert strike(campaign, recipe, "at a forward pass", places, "forward", "SIGKILL") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_killed_between_two_files(campaign, recipes, name):
    recipe = recipes(name)
    places = spread(recipe.points["file"], 12)
    assert strike(campaign, recipe, "between two files", places, "file", "SIGKILL") == []


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", RECIPES)
def test_stopped(campaign, recipes, name, signal):
    recipe = recipes(name)
    places = list(moments(recipe.points["forward"]))
    places = places[1 :: max(len(places) // 3, 1)][:3]
    assert strike(campaign, recipe, "at a forward pass", places, "forward", signal) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "turn"),
    [(name, turn) for name in (*RECIPES, ONE_NOISE) for turn in ([0] if name == "compare" else range(4))],
)
def test_damaged_files(campaign, recipes, name, turn):
    recipe = recipes(name)
    assert each_file(campaign, recipe, recipe.undisturbed, turn, "finished") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_full_from_a_file_on(campaign, recipes, name):
    recipe, wrong = recipes(name), []
    for what, number in spread(recipe.points["file"][4:], 6):
        if not campaign.wanted("full disk", what.replace("before", "from"), recipe):
            continue
        folder = campaign.new_folder()
        ended = campaign.server.run(recipe, folder, point=["file", number + 4], action="full")
        if ended.code == 0:  # nothing was written after this point
            continue
        wrong.append(failed(campaign, "full disk", what.replace("before", "from"), recipe, folder, ended))
    assert [problem for problem in wrong if problem] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_starts_at_once(campaign, recipes, name):
    recipe, folder = recipes(name), campaign.new_folder()
    first, second = (campaign.server.begin(recipe, folder) for _ in range(2))
    ends = [campaign.server.end(first), campaign.server.end(second)]
    problem = None
    if sorted(ended.code for ended in ends) not in ([0, 0], [0, 2]):
        problem = f"lost: exit codes {[ended.code for ended in ends]}: {ends[0].err[-300:]} {ends[1].err[-300:]}"
    assert campaign.again("two starts", "at the same time", recipe, folder, problem=problem) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES[:2])
def test_other_weights_under_the_same_name(campaign, recipes, model, name):
    """An evaluation measures them; a bank of noises refuses them."""
    recipe, folder, theirs = recipes(name), campaign.new_folder(), campaign.new_folder()
    shutil.copytree(recipe.undisturbed, folder)
    path = model / "model.safetensors"
    kept = path.read_bytes()
    weights = load_file(path)
    changed = next(iter(weights))
    save_file(weights | {changed: weights[changed] + 0.5}, path, metadata={"format": "pt"})
    try:
        undisturbed = None
        if name == "evaluate_robustness":
            assert campaign.server.run(recipe, theirs).code == 0
            undisturbed = theirs
            shutil.copytree(recipe.undisturbed / "records", theirs / "records", dirs_exist_ok=True)  # they stay
        problem = campaign.again("other content under the same name", "other weights", recipe, folder,
                                 mend=lambda: path.write_bytes(kept), undisturbed=undisturbed)  # fmt: skip
        assert problem is None
    finally:
        path.write_bytes(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_file_where_the_folder_has_to_be(campaign, recipes, name):
    recipe, folder = recipes(name), campaign.new_folder()
    folder.write_text("not a folder\n")
    assert campaign.again("file instead of a folder", name, recipe, folder, mend=folder.unlink) is None
