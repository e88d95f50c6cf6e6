"""The images of a study on disk are the ones that the suite would make."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_nullspace.command_line import UsageError
from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.suite import Clean, Corrupted, evaluate
from study.images import ImageStore

PLAIN = Preprocessing((0.5,) * 3, (0.5,) * 3, (12, 12), (12, 12))


def pictures(count=20, seed=0):
    rng = np.random.default_rng(seed)
    rows = ArrayRows(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), [i % 3 for i in range(count)])
    return ImageSet(rows, PLAIN, name="pictures")


class Mean(torch.nn.Module):
    """Logits that depend on every pixel."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 12 * 12, 3)

    def forward(self, pixel_values):
        return self.layer(pixel_values.flatten(1))


@pytest.mark.parametrize("condition", [Clean(), Corrupted("gaussian_noise", 3), Corrupted("pixelate", 5)])
def test_kept_images_give_the_results_of_the_suite(tmp_path, condition):
    torch.manual_seed(0)
    model, images = PixelModel(Mean(), PLAIN.mean, PLAIN.std), pictures()
    (direct,) = evaluate(model, images, [condition], batch_size=7, seed=5, progress=False)
    kept = ImageStore(tmp_path, images, seed=5).get(tuple(range(20)), condition)
    (ours,) = evaluate(model, kept.in_memory(), [Clean()], batch_size=3, progress=False)
    assert (ours.correct == direct.correct).all()
    assert 0 < ours.correct.sum() < 20


def test_an_image_is_the_same_whatever_the_limit(tmp_path):
    store = ImageStore(tmp_path, pictures(), seed=0)
    whole = store.get(tuple(range(20)), Corrupted("shot_noise", 2))
    some = store.get((3, 9, 19), Corrupted("shot_noise", 2))
    for row, place in enumerate(some.places):
        assert np.array_equal(np.asarray(some.raw_image(row)), np.asarray(whole.raw_image(place)))
        assert some.label(row) == whole.label(place) == place % 3
    assert not np.array_equal(np.asarray(some.raw_image(0)), np.asarray(pictures().raw_image(3)))


def test_they_are_made_once(tmp_path, monkeypatch):
    made, make = [], ImageStore._array

    def noted(self, places, condition):
        made.append(condition)
        return make(self, places, condition)

    monkeypatch.setattr(ImageStore, "_array", noted)
    for _ in range(2):
        ImageStore(tmp_path, pictures(), seed=0).get((0, 1), Corrupted("contrast", 1))
    assert len(made) == 1
    ImageStore(tmp_path, pictures(seed=1), seed=0).get((0, 1), Corrupted("contrast", 1))  # other pictures
    ImageStore(tmp_path, pictures(), seed=1).get((0, 1), Corrupted("contrast", 1))  # other random numbers
    assert len(made) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_what_does_not_fit_is_an_error(tmp_path):
    rows = [{"image": Image.new("RGB", (8, 8 + i)), "label": 0} for i in range(2)]
    with pytest.raises(UsageError, match="Resize the set"):
        ImageStore(tmp_path, ImageSet(rows, PLAIN, name="mixed"), seed=0).get((0, 1), Clean())
    with pytest.raises(UsageError, match="the test split has 20 images"):
        ImageStore(tmp_path, pictures(), seed=0).get((0, 25), Clean())
