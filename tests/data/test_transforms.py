"""torchvision's transforms, drawn from the image's own key: against torchvision itself, mixing against its formula."""

import sys

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from hf_nullspace.command_line import UsageError, parse
from hf_nullspace.data.augmentation import Augmentation, seed_for
from hf_nullspace.data.image_set import ImageSet, collate
from hf_nullspace.data.image_stream import ImageStream
from hf_nullspace.data.transforms import Transforms
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.training.loading import DataArguments
from torchvision_here import why_missing

PREPROCESSING = Preprocessing.from_processor(make_image_processor(16))  # mean and std 0.5
CLASSES = 12


@pytest.fixture(scope="module")
def v2():
    if why := why_missing():
        pytest.skip(why)
    from torchvision.transforms import v2

    return v2


@pytest.fixture(scope="module")
def rows():
    """Twelve images that are not square, each of a class of its own."""
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 20, 3), np.uint8)) for i in range(CLASSES)
    ]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(CLASSES)])})
    return datasets.Dataset.from_dict({"image": pictures, "label": list(range(CLASSES))}, features=features)


def image_set(rows, names, **options):
    transforms = names and Transforms(names)
    options = {"augmentation": Augmentation(), "num_labels": CLASSES, "seed": 1} | options
    return ImageSet(rows, PREPROCESSING, transforms=transforms, **options)


def stream(rows, names, **options):
    transforms = names and Transforms(names)
    shards = rows.to_iterable_dataset(num_shards=4)
    options = {"augmentation": Augmentation(), "num_labels": CLASSES, "seed": 1} | options
    return ImageStream(shards, PREPROCESSING, transforms=transforms, **options)


def loaded(dataset, **options):
    """Images and labels of one pass of a DataLoader."""
    batches = list(DataLoader(dataset, collate_fn=collate, **options))
    return torch.cat([batch["pixel_values"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def test_without_torchvision_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what an import finds where it is not installed
    with pytest.raises(ImportError, match=r"augmentation='augmix' needs .* pip install 'hf-nullspace\[vision\]'"):
        DataArguments(augmentation="augmix")
    with pytest.raises(UsageError, match=r"'hf-nullspace\[vision\]'") as refused:  # one line, before any work
        parse((DataArguments,), "", ["--augmentation", "augmix+mixup"])
    assert "\n" not in str(refused.value)
    assert DataArguments().transforms() is None, "it is needed only where it is asked for"


@pytest.mark.parametrize(("name", "options"), [("augmix", {"all_ops": False}), ("trivialaugment", {})])
@pytest.mark.parametrize("crops", [Augmentation(), None])
def test_one_image_is_what_torchvision_makes_of_it_with_the_same_seed(v2, rows, name, options, crops):
    transform = {"augmix": v2.AugMix, "trivialaugment": v2.TrivialAugmentWide}[name](**options)
    plain = image_set(rows, None, augmentation=crops)
    dataset = image_set(rows, name, augmentation=crops)
    changed = 0
    for epoch in range(3):
        plain.set_epoch(epoch)
        dataset.set_epoch(epoch)
        for index in range(CLASSES):
            before = (255 * (plain[index]["pixel_values"] / 2 + 0.5)).round().to(torch.uint8)
            torch.manual_seed(seed_for(1, "change", "epoch", epoch, index))
            expected = transform(before)
            assert torch.equal(dataset[index]["pixel_values"], (expected / 255 - 0.5) / 0.5)
            assert dataset[index]["labels"] == index
            changed += not torch.equal(before, expected)
    assert changed > 24, "the identity is a rare draw"


def test_several_act_one_after_the_other(v2, rows):
    pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    first = v2.TrivialAugmentWide()((255 * pixels).round().to(torch.uint8))
    expected = v2.AugMix(all_ops=False)(first) / 255
    assert torch.equal(Transforms("trivialaugment+mixup+augmix").change(pixels, 7), expected)


def share_of(mixed, image, partner, name):
    """lambda, the share of ``image`` in ``mixed``; checks that this is the formula of mixup or CutMix."""
    if name == "mixup":
        share = float(((mixed - partner) * (image - partner)).sum() / ((image - partner) ** 2).sum())
        np.testing.assert_allclose(mixed, share * image + (1 - share) * partner, atol=2e-6)
        return share
    foreign = (mixed != image).any(0)
    down, right = np.nonzero(foreign.any(1))[0], np.nonzero(foreign.any(0))[0]
    box = np.zeros_like(foreign)
    if foreign.any():
        box[down[0] : down[-1] + 1, right[0] : right[-1] + 1] = True
    assert np.array_equal(mixed, np.where(box, partner, image))
    return 1 - box.mean()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_is_the_formula_for_image_and_label(v2, rows, name):
    """Each image has a class of its own, so the probabilities name the partner, which is as it is in this epoch."""
    plain, dataset = image_set(rows, None), image_set(rows, name)
    shares, partners = [], []
    for epoch in range(10):
        plain.set_epoch(epoch)
        dataset.set_epoch(epoch)
        for index in range(CLASSES):
            mixed, probabilities = (dataset[index][key].numpy() for key in ("pixel_values", "labels"))
            assert probabilities.sum() == pytest.approx(1, abs=1e-6)
            others = [other for other in np.nonzero(probabilities)[0] if other != index]
            assert len(others) <= 1
            partner = int(others[0]) if others else index
            pair = [plain[place]["pixel_values"].numpy() for place in (index, partner)]
            if partner != index:
                share = share_of(mixed, *pair, name)
                assert probabilities[index] == pytest.approx(share, abs=2e-6)
                shares.append(share)
            partners.append(partner)
    if name == "mixup":  # lambda is uniform: Beta(1, 1). Four standard errors of 110 draws are 0.11
        assert np.mean(shares) == pytest.approx(0.5, abs=0.11)
        assert np.std(shares) == pytest.approx(12**-0.5, abs=0.05)
    counts = np.bincount(partners, minlength=CLASSES)
    assert counts.min() >= 1, "any image of the set: 10 +- 3 times"


def test_of_mixup_and_cutmix_each_image_gets_one(v2, rows):
    both, plain = image_set(rows, "mixup+cutmix"), image_set(rows, None)
    kept = []
    for epoch in range(8):
        both.set_epoch(epoch)
        plain.set_epoch(epoch)
        for index in range(CLASSES):
            same = both[index]["pixel_values"] == plain[index]["pixel_values"]
            kept.append(float(same.all(0).float().mean()))
    assert 20 < (np.array(kept) > 0.02).sum() < 76, "CutMix keeps pixels as they are, mixup none: half of 96"


@pytest.mark.parametrize("names", ["augmix", "trivialaugment", "augmix+mixup+cutmix"])
def test_the_draw_depends_on_seed_epoch_and_image_only(v2, rows, names):
    dataset = image_set(rows, names)
    images, labels = loaded(dataset, batch_size=4)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    backwards = [dataset[index] for index in reversed(range(CLASSES))]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is as before"
    assert torch.equal(torch.stack([item["pixel_values"] for item in backwards]).flip(0), images)
    for options in ({"batch_size": 5}, {"batch_size": 3, "num_workers": 2}):
        again = loaded(image_set(rows, names), **options)
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], labels)
    dataset.set_epoch(1)
    assert not torch.equal(loaded(dataset, batch_size=4)[0], images)
    assert not torch.equal(loaded(image_set(rows, names, seed=2), batch_size=4)[0], images)


def test_noises_see_changed_images_and_no_mixed_ones(v2, rows):
    images, labels = loaded(image_set(rows, "augmix+mixup+cutmix").with_key("noise", 3), batch_size=4)
    assert torch.equal(images, loaded(image_set(rows, "augmix").with_key("noise", 3), batch_size=4)[0])
    assert not torch.equal(images, loaded(image_set(rows, None).with_key("noise", 3), batch_size=4)[0])
    assert labels.tolist() == list(range(CLASSES))
    of_stream = list(stream(rows, "augmix+mixup").with_key("noise", 3))
    assert sorted(item["labels"] for item in of_stream) == list(range(CLASSES))


def test_a_stream_changes_each_image_by_its_file_and_mixes_neighbours(v2, rows):
    changed, plain = stream(rows, "augmix"), stream(rows, None)
    expected, labels = loaded(changed, batch_size=4)
    by_label = dict(zip(labels.tolist(), expected, strict=True))
    for options in ({"batch_size": 3, "num_workers": 2}, {"batch_size": 5}):
        for image, label in zip(*loaded(stream(rows, "augmix", shuffle_buffer=6), **options), strict=True):
            assert torch.equal(image, by_label[int(label)])
    assert not torch.equal(expected, loaded(plain, batch_size=4)[0])

    images, probabilities = (values.numpy() for values in loaded(stream(rows, "mixup"), batch_size=4))
    before = loaded(plain, batch_size=4)[0].numpy()
    assert np.array_equal(probabilities[0], np.eye(CLASSES)[0]), "the first has none before it"
    np.testing.assert_allclose(images[0], before[0], atol=2e-6)
    for index in range(1, CLASSES):
        share = share_of(images[index], before[index], before[index - 1], "mixup")
        expected = share * np.eye(CLASSES)[index] + (1 - share) * np.eye(CLASSES)[index - 1]
        np.testing.assert_allclose(probabilities[index], expected, atol=2e-6)


def test_greyscale_images_change_and_mix(v2, rows):
    grey = Preprocessing((0.5,), (0.5,), (16, 16), (16, 16))
    item = ImageSet(rows, grey, transforms=Transforms("augmix+trivialaugment+mixup"), num_labels=CLASSES)[3]
    assert item["pixel_values"].shape == (1, 16, 16)
    assert item["labels"].shape == (CLASSES,)


def test_mixing_needs_the_number_of_classes(v2, rows):
    with pytest.raises(ValueError, match=r"num_labels=None: mixup makes class probabilities"):
        image_set(rows, "mixup", num_labels=None)
