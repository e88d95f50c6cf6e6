"""What the pictures of noises draw: the numbers in their lines and images, read from the figure that is written."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.noise.pictures import plot_bank, plot_history, plot_noise
from hf_nullspace.noise.pixels import pixel_preimage
from tiny_models import tiny_model

STD = (0.2, 0.25, 0.3)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written, as they are."""
    written, inner = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **given: written.append(self) or inner(self, *args, **given)
    )
    return written


def size_of(path):
    with Image.open(path) as image:
        return image.size


def noise(grid=(4, 4)):
    return torch.randn(1, grid[0] * grid[1], 24, generator=torch.Generator().manual_seed(0))


def test_without_a_model_the_norms_of_the_patches_stand_in_their_grid(tmp_path, figures):
    assert plot_noise(noise((2, 8)), (2, 8), tmp_path / "noise.png") == {}
    assert size_of(tmp_path / "noise.png") == (630, 540)
    norms, scale = figures[0].axes
    shown = norms.images[0].get_array()
    np.testing.assert_allclose(shown, noise((2, 8))[0].norm(dim=1).reshape(2, 8), rtol=1e-6)
    assert norms.images[0].get_clim() == pytest.approx((0.0, shown.max()))
    assert norms.images[0].colorbar.ax is scale
    assert [list(norms.get_xticks()), list(norms.get_yticks())] == [[], []]


@pytest.mark.parametrize("processed", [True, False])
def test_with_its_model_the_preimage_is_drawn_around_grey(tmp_path, figures, processed):
    model = tiny_model()
    processor = make_image_processor(16, (0.5,) * 3, STD) if processed else None
    said = plot_noise(noise(), (4, 4), tmp_path / "noise.png", model, processor)
    assert size_of(tmp_path / "noise.png") == (1260, 540)
    preimage = pixel_preimage(PatchNullspace.from_model(model), noise(), (4, 4))
    change = (preimage.pixels(STD) if processed else preimage.pixel_values())[0]
    assert said == pytest.approx({"largest": float(change.abs().max()), "residual": preimage.residual})
    image, norms, scale = figures[0].axes
    shown = image.images[0].get_array()
    np.testing.assert_allclose(shown, 0.5 + change.permute(1, 2, 0) / (2 * said["largest"]), atol=1e-6)
    assert f"from -{said['largest']:.3g} to {said['largest']:.3g}" in image.get_title()
    assert norms.images[0].colorbar.ax is scale
    assert image.get_position().x1 < norms.get_position().x0 < norms.get_position().x1 < scale.get_position().x0


def test_a_noise_of_zero_is_grey(tmp_path, figures):
    said = plot_noise(torch.zeros(1, 16, 24), (4, 4), tmp_path / "noise.png", tiny_model())
    assert said == {"largest": 0.0, "residual": 0.0}
    assert (figures[0].axes[0].images[0].get_array() == 0.5).all()


def entry(epsilon, influence, norm):
    return {"provenance": {"epsilon": epsilon, "influence": influence}, "norm": norm, "centred_norm": norm / 2}


def test_a_bank_is_drawn_over_its_numbers(tmp_path, figures):
    configs = [entry(0.03, 0.02, 4.0), entry(0.03, None, 5.0), entry(0.01, 0.01, 6.0), entry(None, 0.04, 7.0)]
    plot_bank(configs, tmp_path / "bank.png")
    assert size_of(tmp_path / "bank.png") == (1260, 540)
    influence, norm = figures[0].axes
    points, *limits = influence.lines
    assert [list(points.get_xdata()), list(points.get_ydata())] == [[0, 2, 3], [0.02, 0.01, 0.04]]
    assert [line.get_ydata()[0] for line in limits] == [0.01, 0.03]
    assert [text.get_text() for text in influence.get_legend().get_texts()] == ["epsilon = 0.01", "epsilon = 0.03"]
    assert [list(line.get_ydata()) for line in norm.lines] == [[4, 5, 6, 7], [2, 2.5, 3, 3.5]]
    assert [text.get_text() for text in norm.get_legend().get_texts()] == ["norm", "centred norm"]
    assert influence.get_ylim()[0] == norm.get_ylim()[0] == 0
    plot_bank([entry(None, 0.04, 7.0)], tmp_path / "bank.png")
    assert figures[1].axes[0].get_legend() is None


def a_round(number, points, stride=1):
    trace = {"influence": [0.5 / (k + 1) for k in range(points)], "centred_norm": [3.0 - k for k in range(points)]}
    return {"round": number, "trace_stride": stride, "trace": trace}


@pytest.mark.parametrize("count", [1, 2, 10, 11])
def test_the_course_of_noise_learning(tmp_path, figures, count):
    rounds = [a_round(number, 2 + number, stride=3) for number in range(count)]
    plot_history(rounds, 0.03, tmp_path / "history.png")
    assert size_of(tmp_path / "history.png") == (1350, 540)
    influence, norm = figures[0].axes
    *lines, limit = influence.lines
    assert limit.get_ydata()[0] == 0.03
    named = [text.get_text() for text in influence.get_legend().get_texts()]
    assert named == [*([f"round {number}" for number in range(count)] if count <= 10 else []), "epsilon = 0.03"]
    for number, (line, other) in enumerate(zip(lines, norm.lines, strict=True)):
        assert list(line.get_xdata()) == list(other.get_xdata()) == [3 * k for k in range(2 + number)]
        assert list(line.get_ydata()) == rounds[number]["trace"]["influence"]
        assert list(other.get_ydata()) == rounds[number]["trace"]["centred_norm"]
        assert line.get_marker() == other.get_marker() == ("o" if number == 0 else "None")
        blue = (0.1, 0.3, 0.2 + 0.8 * number / 11)
        assert line.get_color() == other.get_color() == (f"C{number}" if count <= 10 else blue)
    assert influence.get_yscale() == "log"
    assert norm.get_ylim()[0] == 0
    assert norm.get_ylim()[1] > 3.15


def test_without_an_epsilon_and_names_there_is_no_legend(tmp_path, figures):
    nameless = {key: value for key, value in a_round(0, 5).items() if key != "round"}
    plot_history([nameless], None, tmp_path / "history.png")
    assert figures[0].axes[0].get_legend() is None
    assert len(figures[0].axes[0].lines) == 1
