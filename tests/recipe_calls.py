"""Recipes in this process, as their command line runs them: an import of torch less for each call."""

import functools
import runpy
import sys
from pathlib import Path

from hf_nullspace.command_line import run

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
