"""The box-constrained solver against SciPy's, its optimality conditions, and a model that should see nothing."""

import numpy as np
import pytest
import scipy.optimize
import torch

from hf_nullspace.linear.box import nearest_in_box, nearest_invisible_image
from hf_nullspace.linear.patch import PatchNullspace
from tiny_models import uniform

STD = (0.27, 0.26, 0.1)


def row_basis(std=(1.0, 1.0, 1.0)):
    weight = torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return PatchNullspace.from_weight(weight).in_pixels(std).row_basis


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), STD])
def test_scipy_finds_the_same_nearest_patches(std):
    rows, source, target = row_basis(std), uniform(8, 12, seed=2), uniform(8, 12, seed=3)
    source[:4] = source[:4].round()  # pixels that are black or white, as in real images
    found = nearest_in_box(rows, source, target, iterations=20000, tolerance=1e-10)
    assert found.kkt_residual.max() <= 1e-10
    assert found.patches.min() >= 0
    assert found.patches.max() <= 1
    clipped = ((found.patches == 0) | (found.patches == 1)).sum()
    assert clipped > 8, "the box has to matter for the test to mean anything"
    for patch, start, wish in zip(found.patches.numpy(), source.numpy(), target.numpy(), strict=True):
        answer = scipy.optimize.minimize(
            lambda x, wish=wish: ((x - wish) @ (x - wish) / 2, x - wish),
            start,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * 12,
            constraints={"type": "eq", "fun": lambda x, start=start: rows.numpy() @ (x - start),
                         "jac": lambda x: rows.numpy()},
            options={"ftol": 1e-14, "maxiter": 1000},
        )  # fmt: skip
        assert answer.success
        objective = (patch - wish) @ (patch - wish) / 2
        assert objective == pytest.approx(answer.fun, rel=1e-6)
        np.testing.assert_allclose(patch, answer.x, atol=1e-4)


def test_without_the_box_it_is_the_projection():
    rows, source, target = row_basis(), *(0.5 + 0.01 * uniform(2, 5, 12, seed=6))
    found = nearest_in_box(rows, source, target)
    expected = target + (source - target) @ rows.T @ rows
    torch.testing.assert_close(found.patches, expected, rtol=0, atol=1e-6)
    assert found.iterations <= 3


def steps_of_fista(rows, source, target, tolerance):
    """Steps until the dual gradient is small, by the textbook's method with its momentum dropped downhill."""
    wanted, momentum = rows @ source, 1.0
    multipliers = ahead = np.zeros_like(wanted)
    for step in range(1, 10000):
        gradient = wanted - rows @ np.clip(target + ahead @ rows, 0, 1)
        if np.linalg.norm(gradient) <= tolerance * max(1.0, np.linalg.norm(wanted)):
            return step
        if gradient @ (ahead + gradient - multipliers) < 0:
            momentum = 1.0
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, multipliers, momentum = (
            ahead + gradient + (momentum - 1) / after * (ahead + gradient - multipliers),
            ahead + gradient,
            after,
        )
    raise AssertionError("no convergence")


@pytest.mark.parametrize("size", [1.0, 0.1])
def test_the_steps_are_those_of_the_method(size):
    """One by one, at a tolerance far above rounding; of small patches the residual is absolute."""
    rows = torch.linalg.qr(torch.randn(48, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0].T
    source, target = size * uniform(3, 48, seed=14).round(), uniform(3, 48, seed=15)
    source[:, :16] = 0.5 * size
    counts = []
    for one, wish in zip(source, target, strict=True):
        found = nearest_in_box(rows, one[None], wish[None], tolerance=1e-6)
        counts.append(found.iterations)
        assert counts[-1] == steps_of_fista(rows.numpy(), one.numpy(), wish.numpy(), 1e-6)
        error = float(torch.linalg.vector_norm(rows @ (found.patches[0] - one)))
        scale = max(1.0, float(torch.linalg.vector_norm(rows @ one)))
        assert found.kkt_residual.item() == pytest.approx(error / scale, rel=1e-6)
        short = nearest_in_box(rows, one[None], wish[None], tolerance=1e-6, iterations=4)
        assert short.iterations == 4
        assert short.kkt_residual > 1e-6
    together = nearest_in_box(rows, source, target, tolerance=1e-6)
    assert together.iterations == max(counts)
    assert min(counts) > 4


def test_patches_do_not_depend_on_their_neighbours():
    rows, source, target = row_basis(), uniform(6, 12, seed=8), uniform(6, 12, seed=9)
    together = nearest_in_box(rows, source, target)
    for index in range(6):
        alone = nearest_in_box(rows, source[index : index + 1], target[index : index + 1])
        torch.testing.assert_close(alone.patches[0], together.patches[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 2), (2, 4)])
def test_a_border_of_no_whole_patch_stays(height, width):
    weight = torch.randn(6, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nullspace = PatchNullspace.from_weight(weight).in_pixels(STD)
    source, target = uniform(1, 3, 11, 9, seed=12), uniform(1, 3, 11, 9, seed=13)
    pixels, solution = nearest_invisible_image(nullspace, source, target, iterations=50)
    rows, columns = 11 - 11 % height, 9 - 9 % width
    assert torch.equal(pixels[:, :, rows:], source[:, :, rows:])
    assert torch.equal(pixels[..., columns:], source[..., columns:])
    changed = (pixels != source)[0].any(0)
    assert changed[:rows, :columns].float().mean() > 0.9
    assert len(solution.patches) == (rows // height) * (columns // width)
    strict = nearest_invisible_image(nullspace, source, target, iterations=20000, tolerance=1e-9)[1]
    assert strict.kkt_residual.max() <= 1e-9
    assert strict.iterations > solution.iterations


def test_without_a_nullspace_the_source_comes_back():
    rows = torch.eye(12, dtype=torch.float64)
    source = uniform(3, 12)
    found = nearest_in_box(rows, source, uniform(3, 12, seed=1))
    torch.testing.assert_close(found.patches, source, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("beyond", "fits"), [(0.9e-6, True), (1.1e-6, False)])
def test_a_source_may_leave_the_box_by_a_millionth(beyond, fits):
    for value in (-beyond, 1 + beyond):
        source = torch.full((1, 12), 0.5, dtype=torch.float64)
        source[0, 3] = value
        if fits:
            found = nearest_in_box(row_basis(), source, source)
            assert 0 <= found.patches.min() <= found.patches.max() <= 1
        else:
            with pytest.raises(ValueError, match="start from pixels of a real image"):
                nearest_in_box(row_basis(), source, source)


def test_no_patches_have_no_solution_to_look_for():
    assert nearest_in_box(row_basis(), torch.zeros(0, 12), torch.zeros(0, 12)).patches.shape == (0, 12)
