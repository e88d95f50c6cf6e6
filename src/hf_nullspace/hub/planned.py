"""The card of a model that a shipped configuration would make: what it will be, and that it is not there yet."""

import re
from itertools import takewhile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_nullspace.cards.card import TAGS, from_template
from hf_nullspace.cards.run_folder import source


def planned_card(config: Path) -> ModelCard:
    """From ``recipes/configs/NAME.yaml``: its settings, and the claims of its header, which are quoted.

    Raises:
        ValueError: if the header lacks a part.
    """
    text = config.read_text(encoding="utf-8")
    about, claims = header(text)
    if missing := [part for part in ("command", "hardware", "time", "expected") if part not in claims]:
        raise ValueError(f"the header of {config} has no {', '.join(missing)}")
    settings = yaml.safe_load(text)
    base, data = source(settings["model_name_or_path"]), source(settings["dataset_name"])
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base.hub_id,
        datasets=[data.hub_id] if data.hub_id else None,
        tags=TAGS,
    )
    return from_template(
        "planned_card.md",
        metadata,
        title=config.stem,
        about=about,
        base=base,
        dataset=data,
        claims=claims,
        yaml=yaml.safe_dump(settings, sort_keys=False, width=110).strip(),
    )


def header(text: str) -> tuple[str, dict[str, str]]:
    """The comment at the top of a configuration: its first sentences, and its parts (command, hardware, ...)."""
    parts = {"": ""}
    part = ""
    for line in takewhile(lambda line: line.startswith("#"), text.splitlines()):
        if match := re.fullmatch(r"#\s+([a-z]+)\s{2,}(\S.*)", line):
            part, parts[match[1]] = match[1], match[2]
        else:
            parts[part] = f"{parts[part]} {line[1:].strip()}".strip()
    return parts.pop(""), parts
