"""Adversarial training on real digits does what the textbooks say: it wins under attack and pays on clean images."""

import json

import pytest

from recipe_calls import call_recipe

SETTINGS = {
    "dataset_name": "digits",
    "horizontal_flip": "false",
    "crop_scale": 1.0,
    "base_epochs": 20,
    "base_learning_rate": 2e-3,
    "base_batch_size": 64,
    "rounds": 1,
    "steps_per_round": 300,
    "global_batch_size": 64,
    "learning_rate": 1e-3,
    "attack_steps": 5,
    "save_strategy": "no",
    "use_cpu": "true",
    "disable_tqdm": "true",
    "dataloader_pin_memory": "false",
    "seed": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "eps"), [("madry", 16), ("trades", 8)])  # TRADES is slower to get there
def test_it_wins_under_attack_and_pays_on_clean_images(tmp_path, objective, eps):
    attack = {"attack_eps": f"{eps}/255", "attack_step": f"{eps / 3}/255", "fgsm": f"{eps}/255"}
    words = [f"--{name}={value}" for name, value in (SETTINGS | attack | {"objective": objective}).items()]
    call_recipe("finetune", *words, "--corruptions", "contrast", "--severities", "3", f"--output_dir={tmp_path}")
    records = json.loads((tmp_path / "results.json").read_text())["results"]
    share = {(r["checkpoint"], r["condition"].partition("(")[0]): r["correct"] / r["n"] for r in records}
    print(share)
    assert share[objective, "FGSM"] > share["plain", "FGSM"] + 0.2
    assert share[objective, "FGSM"] < share[objective, "clean"] < share["plain", "clean"]
