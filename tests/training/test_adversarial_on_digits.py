"""Adversarial training on real digits does what the textbooks say: it wins under attack and pays on clean images."""

import copy

import numpy as np
import pytest
from transformers import set_seed

from hf_nullspace.data.image_set import collate
from hf_nullspace.robustness.attacks.gradient import FGSM, PGD
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.suite import Attacked, Clean, evaluate
from hf_nullspace.training.base_model import train_base_model
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.loading import (
    DataArguments,
    ModelArguments,
    evaluation_images,
    load_classifier,
    load_rows,
    training_images,
)
from hf_nullspace.training.trainer import NullspaceTrainer

EPS = {"madry": 16 / 255, "trades": 8 / 255}
"""TRADES is slower to get there: at 16/255, after as many steps, it stood at 61% clean and 5% under PGD."""
STEPS = 300


def config(folder, **given):
    shared = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "seed": 0}
    return NullspaceConfig(output_dir=str(folder), dataloader_pin_memory=False, logging_steps=1000, **shared, **given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(objective, eps) -> accuracy in % on clean images, under FGSM and under PGD, of fine-tunings of one model."""
    folder = tmp_path_factory.mktemp("digits")
    data = DataArguments(horizontal_flip=False, crop_scale=1.0)
    rows = load_rows(data, "train")
    set_seed(0)
    classifier = load_classifier(ModelArguments(), rows, print)
    images = training_images(data, rows, classifier, 0)
    test_images = evaluation_images(load_rows(data, "test"), classifier, None)
    run = config(folder)
    train_base_model(
        classifier, images, folder / "base", run, epochs=20, learning_rate=2e-3, batch_size=64, say=lambda text: None
    )
    found = {}
    for objective in ("plain", "madry", "trades"):
        attack_eps = EPS.get(objective, 8 / 255)
        args = config(
            folder / objective,
            objective=objective,
            rounds=1,
            steps_per_round=STEPS,
            global_batch_size=64,
            learning_rate=1e-3,
            attack_eps=str(attack_eps),
            attack_steps=5,
            attack_step=str(attack_eps / 3),
        )
        model = copy.deepcopy(classifier.model)
        trainer = NullspaceTrainer(
            model, args, train_dataset=images, data_collator=collate, processing_class=classifier.image_processor
        )
        trainer.train()
        pixel_model = PixelModel(trainer.model.eval(), classifier.preprocessing.mean, classifier.preprocessing.std)
        for eps in [EPS[objective]] if objective in EPS else EPS.values():
            conditions = [Clean(), Attacked(FGSM(eps)), Attacked(PGD(eps, steps=20))]
            results = evaluate(pixel_model, test_images, conditions, batch_size=128, progress=False)
            found[objective, eps] = [100 * float(np.mean(result.correct)) for result in results]
    print(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["madry", "trades"])
def test_it_wins_under_attack_and_pays_on_clean_images(trained, objective):
    clean, fgsm, pgd = trained[objective, EPS[objective]]
    plain_clean, plain_fgsm, plain_pgd = trained["plain", EPS[objective]]
    assert pgd > plain_pgd + 30
    assert fgsm > plain_fgsm
    assert pgd <= fgsm < clean < plain_clean
