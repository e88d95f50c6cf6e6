"""The small ViT that recipes train first: a training that was stopped goes on to the same weights."""

import pytest
import torch
from transformers import TrainingArguments

from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.training.base_model import train_base_model
from hf_nullspace.training.loading import Classifier
from tiny_models import tiny_model
from tiny_training import assert_differs, assert_same, parameters_of, pictures

IMAGES, EPOCHS = 20, 3


class Failing(ImageSet):
    """Fails when so many images were read."""

    left = -1

    def __getitem__(self, index):
        if self.left == 0:
            raise InterruptedError("stopped")
        self.left -= 1
        return super().__getitem__(index)


def train(folder, left=-1, seed=0, said=None):
    torch.manual_seed(seed)
    images = pictures(IMAGES, kind=Failing)
    images.left = left
    model = tiny_model()
    classifier = Classifier(model, make_image_processor(16), images.preprocessing, None)
    args = TrainingArguments(str(folder), use_cpu=True, seed=seed, disable_tqdm=True, report_to="none")
    options = {"epochs": EPOCHS, "learning_rate": 1e-2, "batch_size": 5}
    said = [] if said is None else said
    train_base_model(classifier, images, folder / "base", args, **options, say=said.append)
    return parameters_of(model)


def test_a_stopped_training_goes_on_from_its_last_epoch(tmp_path):
    whole, said = train(tmp_path / "whole"), []
    with pytest.raises(InterruptedError):
        train(tmp_path / "run", left=2 * IMAGES + 7)
    assert not (tmp_path / "run" / "base").exists()
    assert_same(train(tmp_path / "run", left=IMAGES, said=said), whole)
    assert said == ["Training a small ViT for 3 epochs, on from checkpoint-8"]
    assert {path.name for path in (tmp_path / "run" / "base").glob("*-*")} == set(), "no checkpoint stays"
    assert_same(train(tmp_path / "run", left=0), whole)


def test_of_other_settings_it_begins_anew(tmp_path):
    with pytest.raises(InterruptedError):
        train(tmp_path / "run", left=IMAGES + 7)
    said = []
    assert_differs(train(tmp_path / "run", seed=1, said=said), train(tmp_path / "whole"))
    assert said == ["Training a small ViT for 3 epochs"]
