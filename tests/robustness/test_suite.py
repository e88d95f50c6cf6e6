"""The evaluation loop: right counts, whatever the batch size, and nothing left behind."""

import datasets
import numpy as np
import pytest
import torch

from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.data.image_stream import ImageStream
from hf_nullspace.robustness import suite
from hf_nullspace.robustness.attacks.base import Attack
from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, PGD
from hf_nullspace.robustness.corruptions import corrupt
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted

CONDITIONS = [Clean(), Corrupted("gaussian_noise", 5), Attacked(FGSM(2 / 255)), Attacked(PGD(2 / 255, steps=3))]


def evaluate(model, images, conditions, *, batch_size=4, **options):
    return suite.evaluate(model, images, conditions, batch_size=batch_size, **{"progress": False} | options)


def by_hand(model, images, condition, seed):
    """One image at a time, in reverse order."""
    correct = []
    for i in reversed(range(len(images))):
        image = images.raw_image(i)
        if isinstance(condition, Corrupted):
            image = corrupt(image, condition.corruption, condition.severity, seed=seed, index=i)
        pixels = images.pixels_from_image(image)[None]
        if isinstance(condition, Attacked):
            label = torch.tensor([images.label(i)])
            pixels = condition.attack(model, pixels, label, seeds=[derive_seed(seed, i)])
        correct.append(bool(model(pixels).argmax() == images.label(i)))
    return correct[::-1]


@pytest.fixture
def half_right(tiny_vit, images):
    """Labels such that the model is right on about half of the images."""
    for i in range(0, len(images), 2):
        pixels = images.pixels_from_image(images.raw_image(i))[None]
        images.labels[i] = int(tiny_vit(pixels).argmax())
    return images


def stream_of(images, **options):
    """The same images, one after the other."""
    rows = datasets.Dataset.from_dict({"image": images.images, "label": images.labels})
    return ImageStream(rows.to_iterable_dataset(), images.preprocessing, **options)


def test_counts_do_not_depend_on_the_batch_size(tiny_vit, half_right):
    runs = [evaluate(tiny_vit, half_right, CONDITIONS, batch_size=b, seed=3) for b in (1, 4, 13, 64)]
    for condition, *results in zip(CONDITIONS, *runs, strict=True):
        expected = by_hand(tiny_vit, half_right, condition, seed=3)
        for result in results:
            assert result.condition == str(condition)
            assert result.n == 13
            assert result.correct.tolist() == expected
    clean, *_, pgd = runs[0]
    assert 6 <= clean.correct.sum() < 13
    assert pgd.correct.sum() < clean.correct.sum()


@pytest.mark.parametrize(
    ("of", "options"),
    [
        (lambda images: images, {"workers": 1}),
        (lambda images: stream_of(images), {"batch_size": 5}),
        (lambda images: images.in_memory(), {"batch_size": 5}),
        (lambda images: images.part(5), {"batch_size": 2}),
        (lambda images: images.part(5).in_memory(), {"batch_size": 2}),
    ],
    ids=["workers", "stream", "memory", "part", "part in memory"],
)
def test_every_way_of_reading_sees_the_same_images(tiny_vit, half_right, of, options):
    images = of(half_right)
    places = slice(None) if isinstance(images, ImageStream) else images.places
    told = []
    for ours, theirs in zip(
        evaluate(tiny_vit, images, CONDITIONS, seed=3, on_result=told.append, **options),
        evaluate(tiny_vit, half_right, CONDITIONS, seed=3),
        strict=True,
    ):
        assert ours.correct.tolist() == theirs.correct[places].tolist()
        assert told.pop(0) is ours


def test_images_are_prepared_once_for_all_models(tiny_vit, make_vit, half_right):
    other = make_vit(3)
    expected = [evaluate(model, half_right, CONDITIONS, seed=3) for model in (tiny_vit, other)]
    prepared = {}
    first = evaluate(tiny_vit, half_right, CONDITIONS, seed=3, prepared=prepared)
    half_right.raw_image = None  # nothing is read again
    for ours, theirs in zip(
        (first, evaluate(other, half_right, CONDITIONS, seed=3, prepared=prepared)), expected, strict=True
    ):
        assert [result.correct.tolist() for result in ours] == [result.correct.tolist() for result in theirs]
    assert set(prepared) == set(CONDITIONS)


def test_every_sample_is_kept_if_asked_for(tiny_vit, half_right):
    (clean,) = evaluate(tiny_vit, half_right, [Clean()], per_sample=True)
    assert set(clean.samples) == {"label", "prediction", "confidence"}
    assert clean.samples["label"].tolist() == half_right.labels
    assert (clean.correct == (clean.samples["prediction"] == clean.samples["label"])).all()
    assert (clean.samples["confidence"] >= 0.1).all()
    assert evaluate(tiny_vit, half_right, [Clean()])[0].samples is None


def test_only_8_bit_pixels_are_kept_in_memory(half_right):
    assert half_right.in_memory().kept[0].dtype == torch.uint8
    between = half_right.pixels_from_image
    half_right.pixels_from_image = lambda image: between(image) * 0.999
    with pytest.raises(ValueError, match="between the 8-bit levels"):
        half_right.in_memory()


def test_a_subset_of_classes_is_judged_both_ways(tiny_vit, images):
    images.subset = [1, 4, 7]
    images.labels[:] = [images.subset[i % 3] for i in range(13)]
    (result,) = evaluate(tiny_vit, images, [Clean()])
    with torch.no_grad():
        logits = [tiny_vit(images.pixels_from_image(image)[None])[0] for image in images.images]
    among = [images.subset[int(row[images.subset].argmax())] for row in logits]
    assert result.correct.tolist() == [a == label for a, label in zip(among, images.labels, strict=True)]
    assert result.correct_all.tolist() == [
        int(row.argmax()) == label for row, label in zip(logits, images.labels, strict=True)
    ]
    assert result.correct.sum() > result.correct_all.sum()


@pytest.mark.parametrize("columns", [None, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_an_attack_on_a_subset_decides_among_the_judges_classes(tiny_vit, images, columns):
    """Among all ten classes CW would leave alone what is wrong there, and right among the subset."""
    tiny_vit.columns = columns
    images.subset = [1, 4, 7]
    pixels = torch.stack([images.pixels_from_image(image) for image in images.images])
    few = PixelModel(tiny_vit.model, tiny_vit.mean, tiny_vit.std, [(columns or range(10))[c] for c in images.subset])
    with torch.no_grad():
        truth = few(pixels).argmax(1)
    images.labels[:] = [images.subset[int(place)] for place in truth]
    (result,) = evaluate(tiny_vit, images, [Attacked(CW(c=100, steps=20))])
    with torch.no_grad():
        expected = few(CW(c=100, steps=20)(few, pixels, truth)).argmax(1) == truth
    assert result.correct.tolist() == expected.tolist()
    assert result.correct.sum() < 13
    assert "3 classes" in result.protocol["attack among"]
    assert "3 classes" in result.protocol["answer among"]
    images.labels[3] = 2
    with pytest.raises(ValueError, match=r"labels \[2\] are not among the set's 3 classes"):
        evaluate(tiny_vit, images, [Attacked(FGSM())])


def test_a_stream_of_another_length_says_so(tiny_vit, images):
    (result,) = evaluate(tiny_vit, stream_of(images, expected=50), [Clean()])
    assert result.protocol["note"] == "partial: 13 of 50 images"
    (result,) = evaluate(tiny_vit, stream_of(images, expected=13), [Clean()])
    assert result.protocol == {}


def test_the_model_is_left_as_it_was(tiny_vit, images, left_as_it_was):
    with left_as_it_was():
        evaluate(tiny_vit, images, CONDITIONS)


class Cheat(Attack):
    """Leaves its threat model: the caller clips to it and judges that."""

    def perturb(self, model, pixels, labels, seeds):
        return pixels + 7

    def settings(self):
        return {}


class Unclipped(Cheat):
    """Leaves it without the clip of ``Attack.__call__``."""

    def __call__(self, model, pixels, labels, *, seeds=None):
        return self.perturb(model, pixels, labels, seeds)


class Far(FGSM):
    """Stays in [0, 1], far outside of its ball."""

    def __call__(self, model, pixels, labels, *, seeds=None):
        return torch.ones_like(pixels)


@pytest.mark.parametrize("attack", [Cheat(), Unclipped()])
def test_an_attack_is_clipped_and_judged_by_the_caller(tiny_vit, images, attack):
    (result,) = evaluate(tiny_vit, images, [Attacked(attack)])
    with torch.no_grad():
        white = int(tiny_vit(torch.ones(1, 3, 16, 16)).argmax())
    assert result.correct.tolist() == [label == white for label in images.labels]


def test_what_is_judged_lies_in_the_ball_of_the_attack(tiny_vit, half_right):
    pixels = torch.stack([half_right.pixels_from_image(image) for image in half_right.images])
    with torch.no_grad():
        near, white = (tiny_vit(x).argmax(1).tolist() for x in ((pixels + 2 / 255).clamp(max=1), 0 * pixels + 1))
    (result,) = evaluate(tiny_vit, half_right, [Attacked(Far(2 / 255))])
    assert result.correct.tolist() == [a == label for a, label in zip(near, half_right.labels, strict=True)]
    assert result.correct.tolist() != [a == label for a, label in zip(white, half_right.labels, strict=True)]


def test_wrong_input_is_an_error(tiny_vit, images):
    with pytest.raises(ValueError, match="generated fog 1"):
        evaluate(tiny_vit, images, [Corrupted("fog", 1), Corrupted("fog", 1)])
    images.labels[12] = 10
    with pytest.raises(ValueError, match="but the model has 10 classes"):
        evaluate(tiny_vit, images, [Clean()])
    nothing = ImageStream(stream_of(images).rows.take(0), images.preprocessing)
    with pytest.raises(ValueError, match="no images"):
        evaluate(tiny_vit, nothing, [Clean()])


def test_nan_logits_are_no_wrong_answer(tiny_vit, images):
    tiny_vit.model.classifier.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite under clean"):
        evaluate(tiny_vit, images, [Clean()])


def test_the_protocol_is_written_down(tiny_vit, images):
    clean, noise, fgsm, _ = evaluate(tiny_vit, images, CONDITIONS, seed=4)
    assert clean.protocol == {}
    assert "CIFAR-10-C's table" in noise.protocol["generated"]
    assert (noise.protocol["corruption"], noise.protocol["severity"]) == ("gaussian_noise", 5)
    assert fgsm.protocol["attack"] == "FGSM"
    assert fgsm.protocol["settings"] == {"eps": 2 / 255}
    assert fgsm.seed == 4
    assert fgsm.correct.dtype == np.bool_


def test_a_bar_of_the_callers_spans_several_calls(tiny_vit, images, capsys):
    bar = Progress()
    bar.expect("another set", 130)
    evaluate(tiny_vit, images, CONDITIONS[:1], progress=bar)
    assert (bar.n, bar.total) == (13, 143)
    bar.expect("another set", 0)
    evaluate(tiny_vit, images, CONDITIONS[2:3], progress=bar)
    assert (bar.n, bar.total) == (13 + 13 * 4, 13 + 13 * 4)
    bar.say("between")
    bar.close()
    said = capsys.readouterr()
    assert "between" in said.out
    assert "?, ?" not in said.err.splitlines()[-1]
