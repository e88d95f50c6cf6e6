"""The signal: gradients of views against plain torch in float64, the recipe from end to end, and the page's numbers."""

import itertools
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from figures.signal import BATCHES, FGSM, GRADIENT, HEAD, LEARNED, MEASURES, RADII, RANDOM, CleanBatch, cell, line_of
from hf_nullspace.core import text
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.training.objectives import View
from recipe_calls import call_recipe, check_refused, saved_model
from tiny_models import normal, tiny_model

ROOT = Path(__file__).parents[3]
COUNT = 66  # more than go through the model at once


@pytest.fixture(scope="module")
def batch():
    model = tiny_model().double()
    preprocessing = Preprocessing.from_processor(make_image_processor(16))
    pixels = torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(COUNT) % 5
    return CleanBatch(model, PatchEmbeddingNoise(model), preprocessing, preprocessing.normalize(pixels), labels, seed=3)


@contextmanager
def added(model, noise):
    """The same noise by a hook of torch."""
    handle = model.vit.embeddings.patch_embeddings.register_forward_hook(lambda module, args, output: output + noise)
    yield
    handle.remove()


def plain(batch, noise=0.0, images=None):
    """Gradient of all parameters as one vector, and probabilities, in one pass."""
    with added(batch.model, noise):
        logits = batch.model(pixel_values=batch.images if images is None else images).logits
    gradient = torch.autograd.grad(cross_entropy(logits, batch.labels), list(batch.model.parameters()))
    return torch.cat([each.flatten() for each in gradient]).numpy(), logits.detach().softmax(-1).numpy()


def expected(batch, noise, towards):
    (clean, before), (noisy, after) = plain(batch), plain(batch, noise)

    def cosine(one, two):
        return one @ two / np.linalg.norm(one) / np.linalg.norm(two)

    shift = np.linalg.norm(after - before, axis=1)
    inner = (noise - noise.mean(-1, keepdim=True)).flatten(1).numpy()
    return {
        "influence": np.mean(shift**2),
        "mean_shift": np.mean(shift),
        "centred_norm": np.mean(np.linalg.norm(inner, axis=1)),
        "cosine": cosine(clean, noisy),
        "relative_difference": np.linalg.norm(noisy - clean) / np.linalg.norm(clean),
        "attack_cosine": cosine(noisy, towards),
    }


@pytest.mark.parametrize("many", [1, COUNT])
def test_a_view_is_measured_as_plain_torch_does(batch, many):
    noise = 0.5 * normal(many, 16, 24)
    towards = [normal(*each.shape, seed=1) for each in batch.model.parameters()]
    found = batch.measure(View(batch.images, noise), towards)
    wanted = expected(batch, noise, torch.cat([each.flatten() for each in towards]).numpy())
    assert found == pytest.approx(wanted, rel=1e-9)
    assert wanted["relative_difference"] > 0.1
    still = batch.measure(View(batch.images), towards)
    assert still["cosine"] == pytest.approx(1)
    assert still["relative_difference"] == still["influence"] == 0
    assert still["centred_norm"] is None


def test_noises_have_the_influence_that_was_asked_for(batch):
    each = batch.embedding_gradients
    for index in (0, COUNT - 1):
        noise = torch.zeros(1, 16, 24, dtype=torch.float64, requires_grad=True)
        with added(batch.model, noise):
            logits = batch.model(pixel_values=batch.images[index : index + 1]).logits
        (gradient,) = torch.autograd.grad(cross_entropy(logits, batch.labels[index : index + 1]), [noise])
        torch.testing.assert_close(each[index : index + 1], gradient / gradient.norm())
    for view in (batch.random(0.01), batch.along_gradient(0.01)):
        assert batch.measure(view, batch.clean[0])["influence"] == pytest.approx(0.01, rel=0.03)
    higher = cross_entropy(batch.gradient(batch.along_gradient(0.01))[1], batch.labels)
    assert higher > cross_entropy(batch.clean[1], batch.labels)


def test_attacked_pixels_stay_within_the_radius(batch):
    view = batch.fgsm(2 / 255)
    before, after = (batch.preprocessing.denormalize(images) for images in (batch.images, view.images))
    assert 0 < (after - before).abs().max() < 2.001 / 255
    gradient, logits = batch.gradient(view)
    wanted, probabilities = plain(batch, images=view.images)
    np.testing.assert_allclose(torch.cat([each.flatten() for each in gradient]), wanted, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(logits.softmax(-1), probabilities, rtol=1e-8)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, and forty images of its five classes."""
    root = tmp_path_factory.mktemp("signal")
    noise = np.random.default_rng(0).integers(256, size=(40, 16, 16, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        folder = root / "images" / "train" / f"class {index % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return saved_model(tiny_model(), root / "vit"), root / "images"


def test_the_recipe_measures_every_view(places, tmp_path, capsys):
    model, images = places
    options = ["--signal", "--model_name_or_path", model, "--dataset_name", images, "--output_dir", tmp_path]
    call_recipe("analyze", *options, "--images", 10, "--epsilons", 0.05)
    said = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "signal.json").read_text())
    views = [row["view"] for row in found["rows"]]
    assert [views.count(view) for view in (LEARNED, RANDOM, GRADIENT, FGSM)] == [1, 1, 1, len(RADII)]
    assert all(len(row[name]) == BATCHES for row in found["rows"][:-1] for name in MEASURES)
    assert all(line_of(row) in said for row in found["rows"])
    assert found["command"]["model_name_or_path"] == "vit"  # no folder of this machine
    with Image.open(tmp_path / "signal.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_too_few_images_are_refused(places, tmp_path, capsys):
    model, images = places
    words = ["--signal", "--model_name_or_path", model, "--dataset_name", images, "--images", 11]
    check_refused(capsys, "are 44; the split has 40. Lower --images", "analyze", *words, output=tmp_path / "out")


def test_the_page_has_the_rows_of_the_json():
    measured = json.loads((ROOT / "benchmarks" / "results" / "signal-cifar10.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8").splitlines()
    head, rule = text.table(HEAD, [])
    start = page.index(head) + 1
    assert page[start] == rule
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), page[start + 1 :]))
    assert set(rows) <= {line_of(row) for row in measured}
    assert len(rows) > 6


def test_means_stand_with_their_range():
    assert cell([0.1, 0.3], ".2f") == "0.20 [0.10, 0.30]"
    assert cell([0.101, 0.102], ".2f") == "0.10"
    assert cell([None, None], ".2f") == cell(None, ".2f") == ""
