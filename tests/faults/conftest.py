"""The recipes of the campaign at their smallest, each run once without a fault."""

import json

import pytest
import yaml
from campaign import Campaign, Recipe, Server

FINETUNE = {
    "dataset_name": "digits", "horizontal_flip": False, "crop_scale": 1.0, "max_train_images": 300,
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "base_epochs": 4, "base_learning_rate": 0.01,
    "rounds": 2, "steps_per_round": 3, "global_batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.7,
    "noise_batch_size": 16, "noise_max_steps": 5, "noise_pool_images": 32, "held_out_images": 32,
    "fgsm": ["8/255"], "corruptions": ["contrast"], "severities": [3], "max_eval_images": 40,
    "save_steps": 2, "save_total_limit": 2, "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True,
}  # fmt: skip
"""Six steps, checkpoints after 2, 4 and 6: they fall within rounds and between them."""


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def campaign(server, tmp_path_factory):
    return Campaign(server, tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="session")
def undisturbed(server, tmp_path_factory):
    """Runs a recipe once, and keeps its folder and its points."""

    def run(recipe):
        folder = tmp_path_factory.mktemp(recipe.name)
        ended = server.run(recipe, folder / "run", points=str(folder / "points.json"))
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
def killed(campaign, finetune):
    """The folder of a fine-tuning that was killed in its last step: control and two checkpoints are there."""
    folder = campaign.new_folder()
    last = len(finetune.points["forward"]) - finetune.points["forward"][::-1].index("training")
    ended = campaign.server.run(finetune, folder, point=["forward", last], action="SIGKILL")
    assert ended.code == -9, ended.err
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return folder
