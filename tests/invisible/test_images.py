"""Watermarks and targeted images as files on disk, judged a second time by NumPy and by transformers alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_nullspace.invisible.images import (
    Judge,
    closeness,
    difference,
    image_of,
    make_invisible,
    marked,
    side_by_side,
    strongest_invisible,
    write_png,
)
from hf_nullspace.linear.patch import NoNullspaceError
from hf_nullspace.models.preprocessing import make_image_processor
from tiny_models import IMAGE, numpy_patches, numpy_projection, tiny_model

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.1)


def picture(seed, size=16):
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values // 2 + 64 * (values > 128).astype(np.uint8))


def judge_of(family="vit", processor=None):
    return Judge.from_model(tiny_model(family), processor or make_image_processor(16, MEAN, STD))


def array(image):
    return np.asarray(image, dtype=np.float64) / 255


def embeddings(model, pixels):
    """theta p + bias for every patch of pixels (16, 16, 3), by NumPy."""
    weight, bias = numpy_projection(model)
    return numpy_patches((pixels - np.array(MEAN)) / np.array(STD)) @ weight.T + bias


def relative(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def answer(model, processor, path):
    with Image.open(path) as image, torch.no_grad():
        return model(**processor(image, return_tensors="pt")).logits[0].softmax(-1).numpy()


def test_the_verdict_on_a_targeted_image_is_true_of_its_file(tmp_path):
    judge = judge_of()
    source, target = picture(0), picture(1)
    found = make_invisible(judge, source, target, iterations=2000)
    paths = write_png(source, tmp_path / "source.png"), write_png(found.image, tmp_path / "result.png")
    verdict = judge.compare(*paths)
    before, after = (answer(judge.model, judge.image_processor, path) for path in paths)
    assert verdict.prediction_source == before.argmax() == after.argmax() == verdict.prediction_result
    assert verdict.match
    assert verdict.confidence_result == pytest.approx(after[before.argmax()], abs=1e-6)
    assert verdict.confidence_change == pytest.approx(abs(after - before)[before.argmax()], abs=1e-6)
    assert verdict.confidence_change < 0.02
    with Image.open(paths[1]) as written:
        assert written.mode == "RGB"
        result = array(written)
    wanted = embeddings(judge.model, array(source))
    assert verdict.embedding_error == pytest.approx(relative(embeddings(judge.model, result), wanted), rel=1e-3)
    # far from the source, near the target, and rounding is all that the model sees
    assert np.abs(result - array(source)).max() > 0.3
    assert verdict.embedding_error < 0.01 < 0.1 < relative(embeddings(judge.model, array(target)), wanted)
    errors = found.embedding_errors
    assert max(errors["projection"], errors["box"]) < 1e-4 < verdict.embedding_error < errors["projection_clipped"]
    assert verdict.embedding_error < 0.8 * errors["nearest_levels"]
    close = closeness(source, target, found.image)
    far = [np.sqrt(np.mean((each - array(target)) ** 2)) for each in (array(source), result)]
    assert [close["rms_source_to_wish"], close["rms_result_to_wish"]] == pytest.approx(far, rel=1e-5)
    assert close["reached"] == pytest.approx(1 - far[1] / far[0], rel=1e-4)
    assert close["reached"] > 0.1


def test_the_projection_is_equation_13_in_pixels():
    """Solved by lstsq in NumPy: with a std that differs by channel, diag(std) B is not orthonormal any more."""
    judge = judge_of()
    source, target = picture(0), picture(1)
    weight, bias = numpy_projection(judge.model)
    basis = np.linalg.svd(weight)[2][24:].T * np.repeat(STD, 16)[:, None]  # null patches as changes of pixels
    start, goal = (numpy_patches(array(each)) for each in (source, target))
    scales, *_ = np.linalg.lstsq(basis, (goal - start).T, rcond=None)
    changed = (start + (basis @ scales).T).clip(0, 1)
    mean, std = np.repeat(MEAN, 16), np.repeat(STD, 16)
    clipped = relative(*((each - mean) / std @ weight.T + bias for each in (changed, start)))
    found = make_invisible(judge, source, target)
    assert found.embedding_errors["projection_clipped"] == pytest.approx(clipped, rel=1e-3)


def test_a_mark_changes_only_the_patches_that_it_touches():
    mark = Image.new("RGBA", (8, 8))
    mark.paste((255, 0, 0, 255), (0, 0, 4, 8))
    source = picture(4)
    wish = marked(source, mark)  # as large as it fits: the left half of the image
    assert np.array_equal(np.asarray(wish)[:, :6], np.broadcast_to((255, 0, 0), (16, 6, 3)))
    assert np.array_equal(np.asarray(wish)[:, 10:], np.asarray(source)[:, 10:])
    result = np.asarray(make_invisible(judge_of(), source, wish).image).astype(int)
    changed = np.abs(result - np.asarray(source)).max((0, 2))
    assert (changed[:8] > 10).all()
    assert (changed[12:] == 0).all()
    assert np.asarray(marked(source, Image.new("RGB", (4, 2), (0, 255, 0))))[4:12].tolist() == [[[0, 255, 0]] * 16] * 8


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_strength_is_searched_where_rounding_changes_the_prediction(share):
    judge = judge_of()
    source, target = picture(0), picture(1)
    full = make_invisible(judge, source, target)
    with torch.no_grad():
        before, after = (
            judge.model(**judge.image_processor(image, return_tensors="pt")).logits[0] for image in (source, full.image)
        )
        first = int(before.argmax())
        gain = (after - before) - (after - before)[first]
        rival = int(gain.argmax())
        assert gain[rival] > 1e-4
        # a model for which source is so near to the boundary that the rounded image is beyond it
        judge.model.classifier.bias[rival] += before[first] - before[rival] - gain[rival] * share
    assert judge.compare(source, full.image).prediction_result == rival
    found = strongest_invisible(judge, source, target, steps=4)
    verdict = judge.compare(source, found.image)
    assert verdict.match
    assert verdict.prediction_result == first
    assert 0 <= found.strength < 1
    beyond = make_invisible(judge, source, target, strength=found.strength + 1 / 16)
    assert not judge.compare(source, beyond.image).match


def test_the_confidence_can_be_held_too():
    judge = judge_of()
    source, target = picture(5), picture(6)
    full = strongest_invisible(judge, source, target)
    assert full.strength == 1
    change = judge.compare(source, full.image).confidence_change
    found = strongest_invisible(judge, source, target, max_confidence_change=change / 2, steps=4)
    assert found.strength < 1
    assert judge.compare(source, found.image).confidence_change <= change / 2
    nothing = make_invisible(judge, source, target, strength=0.0)
    assert np.array_equal(np.asarray(nothing.image), np.asarray(source))


def test_a_processor_that_crops_gets_an_image_that_it_does_not_resize(tmp_path):
    """Shorter edge 20, centre 16, as DeiT's 256 and 224: the file has 20 x 20, its border is free."""
    processor = ViTImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, do_center_crop=True,
        image_mean=MEAN, image_std=STD, do_convert_rgb=True,
    )  # fmt: skip
    judge = judge_of(processor=processor)
    assert judge.written_size == (20, 20)
    source, target = judge.fit(picture(7, size=33)), judge.fit(picture(8, size=20))
    assert source.size == (20, 20)
    path = write_png(make_invisible(judge, source, target).image, tmp_path / "result.png")
    with Image.open(path) as written:
        result = np.asarray(written)
    assert np.array_equal(result[:2], np.asarray(target)[:2])
    verdict = judge.compare(source, path)
    wanted = embeddings(judge.model, array(source)[2:18, 2:18])
    error = relative(embeddings(judge.model, result[2:18, 2:18] / 255), wanted)
    assert verdict.embedding_error == pytest.approx(error, rel=1e-3)
    assert error < 0.02 < 0.1 < relative(embeddings(judge.model, array(target)[2:18, 2:18]), wanted)
    with pytest.raises(ValueError, match="not leave an image of 16 x 16 as it is: it makes 16 x 16 of it, resized"):
        judge.see(picture(7))


def test_a_file_of_another_size_is_not_judged(tmp_path):
    judge = judge_of()
    path = write_png(picture(9, size=32), tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"ViTImageProcessorPil does not leave an image of 32 x 32 .* of 16 x 16"):
        judge.compare(picture(9), path)
    with pytest.raises(ValueError, match=r"wish RGB \(32, 32\): expected \(width, height\) = \(16, 16\)"):
        make_invisible(judge, picture(9), picture(9, size=32))
    with pytest.raises(ValueError, match=r"strength=1.5: expected a share"):
        make_invisible(judge, picture(9), picture(9), strength=1.5)


def test_models_without_a_nullspace_or_in_training_are_refused():
    config = ViTConfig(**IMAGE, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(NoNullspaceError, match="64 features of 48 numbers have no nullspace"):
        Judge.from_model(ViTForImageClassification(config).eval(), make_image_processor(16))
    with pytest.raises(ValueError, match=r"in training mode.*model.eval"):
        Judge.from_model(tiny_model().train(), make_image_processor(16))


def test_the_pictures():
    source, result = picture(0), picture(1)
    expected = (255 + np.asarray(result).astype(int) - np.asarray(source)) / 2
    assert np.abs(np.asarray(difference(source, result)) - expected).max() <= 0.5
    assert np.asarray(image_of(torch.full((1, 2, 3), 0.2))).tolist() == [[51] * 3] * 2


def test_side_by_side_shows_every_panel(tmp_path):
    colours = {"source": (255, 0, 0), "mark": (0, 255, 0), "result": (0, 0, 255)}
    panels = [(name, Image.new("RGB", (9, 9), colour)) for name, colour in colours.items()]
    path = side_by_side(panels, tmp_path / "a.png")
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"))
    middles = [int(np.nonzero((pixels == colour).all(2))[1].mean()) for colour in colours.values()]
    assert middles == sorted(middles)
    assert middles[0] < pixels.shape[1] / 3 < 2 * pixels.shape[1] / 3 < middles[2]
