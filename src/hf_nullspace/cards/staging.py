"""The files of a run as they are published: without the paths of the machine that it ran on."""

import json
import os
import shutil
from pathlib import Path

from hf_nullspace.cards.run_folder import portable, portable_text
from hf_nullspace.core.files import write_json, write_text
from hf_nullspace.noise.artifact import CONFIG_NAME, WEIGHTS_NAME, NullspaceNoise


def published_copy(source: Path, target: Path, *, linked: bool = False) -> Path:
    """Copy one file; in JSON, Markdown and CSV, and in the provenance of noises, paths of this machine become names.

    Whatever else may be ``linked`` instead of copied, if nobody writes into ``source`` any more: a link costs nothing,
    and outlives the original's name.

    Raises:
        ValueError: if a JSON file or a noise is damaged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name == CONFIG_NAME and source.with_name(WEIGHTS_NAME).is_file():
        return write_json(target, NullspaceNoise.load(source.with_name(WEIGHTS_NAME)).without_local_path().config())
    if source.name == WEIGHTS_NAME or (source.parent.name == "noises" and source.suffix == ".safetensors"):
        return NullspaceNoise.load(source).without_local_path().save(target)
    if source.suffix == ".json":
        return write_json(target, portable(json.loads(source.read_text(encoding="utf-8"))))
    if source.suffix in (".md", ".csv"):
        return write_text(target, portable_text(source.read_text(encoding="utf-8")))
    return linked_copy(source, target) if linked else Path(shutil.copyfile(source, target))


def linked_copy(source: Path, target: Path) -> Path:
    """A hard link, or a copy on a file system that has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
    return target
