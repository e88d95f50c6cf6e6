"""Attacks that were made on another model: its images, judged by this one."""

import pytest
import torch
import torch.nn.functional as F

from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.robustness.attacks.gradient import FGSM, PGD
from hf_nullspace.robustness.attacks.transfer import Transfer
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.plans import make_attack
from tiny_models import tiny_model

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of another model."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model(seed=1).save_pretrained(folder)
    make_image_processor(16).save_pretrained(folder)
    return folder


def pictures(side=16):
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def test_the_images_are_those_of_the_attack_on_the_source(source):
    pixels, labels = pictures()
    judged, other = (PixelModel(tiny_model(seed=seed), HALF, HALF) for seed in (0, 1))
    attack = PGD(eps=4 / 255, steps=3)
    expected = attack(other, pixels, labels, seeds=range(4))
    found = Transfer(attack, str(source))(judged, pixels, labels, seeds=range(4))
    assert torch.equal(found, expected)
    assert not torch.equal(found, attack(judged, pixels, labels, seeds=range(4)))


def test_a_source_of_another_size_sees_resized_images(source):
    pixels, labels = pictures(side=24)
    other = PixelModel(tiny_model(seed=1), HALF, HALF)
    point = pixels.clone().requires_grad_()
    seen = F.interpolate(point, (16, 16), mode="bilinear", antialias=True).clamp(0, 1)
    F.cross_entropy(other(seen), labels, reduction="sum").backward()
    expected = (pixels + 2 / 255 * point.grad.sign()).clamp(0, 1)
    found = Transfer(FGSM(eps=2 / 255), str(source))(other, pixels, labels)
    torch.testing.assert_close(found, expected)


def test_its_name_has_the_attack_and_the_weights_of_the_source(source, tmp_path):
    attack = make_attack("PGD", {"eps": "2/255", "source": str(source)})
    changed = tmp_path / source.name
    tiny_model(seed=2).save_pretrained(changed)
    make_image_processor(16).save_pretrained(changed)
    assert repr(attack).startswith("Transfer(of='PGD', eps=2/255, step=0.5/255, steps=10, ")
    assert f"source='{source.name} " in repr(attack)
    assert repr(attack) != repr(make_attack("PGD", {"eps": "2/255", "source": str(changed)}))
    assert attack.seeded
    assert attack.cost == PGD().cost


def test_models_with_other_classes_are_refused(source):
    judged = tiny_model()
    judged.config.id2label = dict(enumerate("edcba"))
    with pytest.raises(ValueError, match="other classes than the model, or in another order"):
        Transfer(FGSM(), str(source))(PixelModel(judged, HALF, HALF), *pictures())
