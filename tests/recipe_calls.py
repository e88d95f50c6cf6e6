"""Recipes in this process, as their command line runs them: an import of torch less for each call."""

import functools
import runpy
import sys
from pathlib import Path

import pytest

from hf_nullspace.command_line import run
from hf_nullspace.models.preprocessing import make_image_processor

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT_RUN = [
    *("--rounds=1", "--steps_per_round=2", "--global_batch_size=8", "--noise_batch_size=8", "--noise_max_steps=3"),
    *("--noise_pool_images=16", "--held_out_images=8", "--disable_tqdm=true", "--control=false", "--use_cpu=true"),
    *("--dataloader_pin_memory=false", "--save_strategy=no", "--corruptions", "contrast", "--severities", "3"),
]
"""The options of a fine-tuning of two steps."""


@functools.cache
def main_of(name):
    return runpy.run_path(str(RECIPES / f"{name}.py"))["main"]


def call_recipe(name, *words):
    """Run ``recipes/name.py`` with the arguments ``words``; raises SystemExit where its command line would exit."""
    main = main_of(name)
    arguments, sys.argv = sys.argv, [name, *map(str, words)]
    try:
        run(main)
    finally:
        sys.argv = arguments


def saved_model(model, folder, **settings):
    """``folder`` with the model and an image processor for 16 pixels."""
    model.save_pretrained(folder)
    make_image_processor(16, **settings).save_pretrained(folder)
    return folder


def check_refused(capsys, message, name, *words, output):
    """The recipe ends with exit code 2, one line that has ``message``, and without a folder ``output``."""
    with pytest.raises(SystemExit) as stopped:
        call_recipe(name, *words, "--output_dir", output)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said
    assert said.count("\n") == 1
    assert not output.exists()
