"""What is known before a training: enough images, and room on the disk."""

import pytest
import torch

from hf_nullspace.core.settings import check_numbers
from hf_nullspace.training.preflight import disk_space_warning
from tiny_training import config


def large_model(numbers):
    """Weights of float32 that take no memory."""
    return torch.nn.Linear(numbers, 1, bias=False, device="meta")


@pytest.mark.parametrize(
    ("given", "trainings", "copies"),
    [
        ({"save_strategy": "no"}, 1, 1),
        ({"save_strategy": "no"}, 2, 2),
        ({"save_strategy": "steps", "save_steps": 1}, 1, 1 + 3 * (4 + 1)),  # 4 steps: as many checkpoints
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}, 1, 1 + 3 * (1 + 1)),
        ({"save_strategy": "steps", "save_steps": 0.5}, 2, 2 * (1 + 3 * (2 + 1))),
        ({"save_strategy": "steps", "save_steps": 1, "save_only_model": True}, 1, 1 + (4 + 1)),
    ],
)
def test_the_room_is_weights_and_moments_for_every_kept_checkpoint_and_the_next(tmp_path, given, trainings, copies):
    args = config(tmp_path / "new" / "folder", **given)  # 4 steps; the folder is not there yet
    warning = disk_space_warning(large_model(10**15), args, trainings)
    assert warning is not None
    assert f"about {copies * 4e6:.2g} GB may be written to {args.output_dir}" in warning
    assert disk_space_warning(large_model(10), args, trainings) is None


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, inf)", [0, 1.5], [-1, float("inf"), float("nan"), "1", 1j], "at least 0 (a number)"),
        ("(0, 1]", [0.1, 1], [0, 1.1], "a number in (0, 1]"),
        ("(0, inf)", [1e-9], [0], "a number above 0"),
        ("int [1, 3]", [1, 3], [0, 4, 1.0, 2.5], "a whole number in [1, 3]"),
    ],
)
def test_numbers_in_an_interval(interval, inside, outside, words):
    class Settings:
        value = None
        values = (1,)

    settings = Settings()
    for value in [None, *inside, inside]:
        settings.value = value
        check_numbers(settings, {"value": interval})
    for value in outside:
        for wrong in (value, [inside[0], value]):
            settings.value = wrong
            with pytest.raises(ValueError, match="value=") as raised:
                check_numbers(settings, {"value": interval})
            assert str(raised.value) == f"value={wrong!r}: expected {words}"
