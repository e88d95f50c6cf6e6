"""The recipes of the campaign at their smallest, each run once without a fault."""

import json
import shutil

import pytest
import yaml
from campaign import ONE_NOISE, Campaign, Recipe

SMALL = {
    "dataset_name": "digits", "horizontal_flip": False, "crop_scale": 1.0, "max_train_images": 300,
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "base_epochs": 4, "base_learning_rate": 0.01, "use_cpu": True,
}  # fmt: skip
FINETUNE = SMALL | {
    "rounds": 2, "steps_per_round": 3, "global_batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.7,
    "noise_batch_size": 16, "noise_max_steps": 5, "noise_pool_images": 32, "held_out_images": 32,
    "fgsm": ["8/255"], "corruptions": ["contrast"], "severities": [3], "max_eval_images": 40,
    "save_steps": 2, "save_total_limit": 2, "disable_tqdm": True, "dataloader_pin_memory": False,
}  # fmt: skip
"""Six steps, checkpoints after 2, 4 and 6: they fall within rounds and between them."""
STUDY = SMALL | {
    "arms": {"plain": {"objective": "plain"}, "nullspace": {"objective": "nullspace", "preset": "descent"}},
    "training": {"rounds": 1, "steps_per_round": 2, "global_batch_size": 16, "noise_batch_size": 16,
                 "noise_max_steps": 3, "held_out_images": 16, "dataloader_pin_memory": False},
    "seeds": [0], "learning_rates": [0.001, 0.003], "conditions": ["clean", {"corruption": "contrast", "severity": 3}],
    "average": ["clean", "cells"], "limit": 40, "report": "0:100", "selection": "100:200", "selection_limit": 20,
    "resamples": 50,
}  # fmt: skip
SUITE = {"conditions": ["clean", {"attack": "FGSM", "eps": "8/255"}, {"corruption": "contrast", "severity": 3}]}


@pytest.fixture(scope="session")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="session")
def undisturbed(campaign, tmp_path_factory):
    """Runs a recipe once, and keeps its folder and its points."""

    def run(recipe):
        folder = tmp_path_factory.mktemp(recipe.name)
        ended = campaign.run(recipe, folder / "run", points=str(folder / "points.json"))
        assert ended.code == 0, ended.err
        recipe.undisturbed, recipe.seconds = folder / "run", ended.seconds
        recipe.points = json.loads((folder / "points.json").read_text())
        return recipe

    return run


@pytest.fixture(scope="session")
def finetune(undisturbed, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(FINETUNE))
    words = ["--config", str(path)]
    tensors = ("**/model.safetensors", "**/nullspace_noise.safetensors", "noises/*.safetensors")
    plain = ("results.json", "**/nullspace_history.json", "**/config.json", "**/preprocessor_config.json")
    return undisturbed(Recipe("finetune", words, tensors, plain))


@pytest.fixture(scope="session")
def model(finetune, tmp_path_factory):
    """A model that the other recipes begin with, in a folder of its own."""
    folder = tmp_path_factory.mktemp("model") / "small-vit"
    shutil.copytree(finetune.undisturbed / "base", folder)
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="session")
def recipe(request, finetune, undisturbed, model, tmp_path_factory):
    """The recipe of this name, which has run once."""
    if request.param == "finetune":
        return finetune
    folder = tmp_path_factory.mktemp("configs")
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
    return undisturbed(Recipe(request.param.partition(" ")[0], *planned[request.param], label=request.param))


@pytest.fixture(scope="session")
def killed(campaign, finetune):
    """The folder of a fine-tuning that was killed in its last step: control and two checkpoints are there."""
    folder = campaign.new_folder()
    last = len(finetune.points["forward"]) - finetune.points["forward"][::-1].index("training")
    ended = campaign.run(finetune, folder, point=["forward", last], action="SIGKILL")
    assert ended.code == -9, ended.err
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return folder


@pytest.fixture
def run_of(finetune, killed):
    """State -> the folder of a fine-tuning in it."""
    return {"new": None, "killed": killed, "finished": finetune.undisturbed}
