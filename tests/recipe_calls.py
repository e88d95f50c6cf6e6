"""Recipes in this process, as their command line runs them: an import of torch less for each call."""

import functools
import runpy
import sys
from pathlib import Path

from hf_nullspace.command_line import run

RECIPES = Path(__file__).parents[1] / "recipes"


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
