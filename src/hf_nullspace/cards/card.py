"""The card of a fine-tuned model, from what its run left in the folder alone: no number in it is typed by hand."""

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml

from hf_nullspace import __version__
from hf_nullspace.cards import tables
from hf_nullspace.cards.eval_results import eval_result_entries, model_index
from hf_nullspace.cards.run_folder import LOCAL, Report, RunFolder
from hf_nullspace.core.files import write_text
from hf_nullspace.core.text import block, code, escape, literal

CARD_NAME = "README.md"
EVAL_RESULTS = ".eval_results"
PLOTS = {
    "results.png": "Accuracy per condition",
    "severity.png": "Accuracy against severity",
    "strength.png": "Accuracy against the strength of the attack",
}
NOISE_PLOT, INTERPOLATION_PLOT = "noise.png", "interpolation.png"
TAGS = ["image-classification", "vision", "robustness", "nullspace-noise", "hf-nullspace"]
_MARK = "# Written by hf-nullspace from results.json; accuracies in [0, 1].\n"


def model_card(
    run: Path, repo_id: str | None = None, *, license: str | None = None, note: str | None = None
) -> ModelCard:
    """The card of the model in the folder ``run``, from the JSON files that are there.

    ``repo_id`` is where it will live (else the card says ``path/to/NAME``), ``note`` a sentence on the run, such as its
    commit and its machine. What the evaluation's checks doubt is marked and in no metadata.

    Raises:
        RunFolderError: if a file of the run is damaged.
    """
    found = RunFolder(Path(run))
    title = repo_id.rpartition("/")[2] if repo_id else found.name
    place, settings = literal(repo_id or f"path/to/{title}"), tables.settings_yaml(found)
    versions = [report.versions["hf-nullspace"] for report in found.reports if "hf-nullspace" in report.versions]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=license,
        base_model=found.base_model.hub_id if found.base_model else None,
        datasets=[found.data.hub_id] if found.data and found.data.hub_id else None,
        metrics=["accuracy"] if found.reports else None,
        tags=TAGS,
        model_name=title,
        eval_results=model_index(found) or None,
    )
    return from_template(
        "model_card.md",
        data,
        run=found,
        title=escape(title),
        model_id=place,
        last_noise=code(f"hf_nullspace.NullspaceNoise.from_pretrained({place})"),
        architecture=architecture(found.config),
        preparation=preparation(found),
        reports=[report_section(found, report) for report in found.reports],
        settings=tables.settings_table(found),
        noise_plot=NOISE_PLOT if (found.path / NOISE_PLOT).is_file() else None,
        interpolation_plot=INTERPOLATION_PLOT if (found.path / INTERPOLATION_PLOT).is_file() else None,
        cost=tables.cost_table(found),
        not_measured=tables.attacks_not_measured(found.reports),
        yaml=block(settings, "yaml") if settings else "",
        again=f"accelerate launch recipes/finetune.py --config settings.yaml --output_dir {quote(f'outputs/{title}')}",
        local=LOCAL if LOCAL in settings else None,
        version=escape([*versions, __version__][0]),
        note=note,
    )


def write_card(
    run: Path, repo_id: str | None = None, *, license: str | None = None, note: str | None = None
) -> list[Path]:
    """Write README.md and, for images that are on the Hub, ``.eval_results/*.yaml`` into ``run``; returns their paths.

    Of ``.eval_results`` it deletes what it wrote before and would not write now. Call it on the main process only.
    """
    run = Path(run)
    card = str(model_card(run, repo_id, license=license, note=note)).rstrip() + "\n"
    wanted = {
        run / EVAL_RESULTS / name: _MARK + yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        for name, entries in eval_result_entries(RunFolder(run)).items()
    }
    for path in sorted((run / EVAL_RESULTS).glob("*.yaml")):
        if path not in wanted and path.read_text(encoding="utf-8").startswith(_MARK):
            path.unlink()
    return [write_text(path, text) for path, text in ({run / CARD_NAME: card} | wanted).items()]


def from_template(name: str, data: ModelCardData, **values: Any) -> ModelCard:
    """A card from ``cards/templates/NAME``, which may call ``code`` and ``escape``."""
    with as_file(files("hf_nullspace.cards").joinpath(f"templates/{name}")) as path:
        return ModelCard.from_template(data, template_path=str(path), code=code, escape=escape, **values)


def architecture(config: Mapping[str, Any]) -> str:
    """The model's class and sizes."""
    counts = {"num_hidden_layers": "layers", "hidden_size": "features", "num_attention_heads": "heads"}
    sides = {"patch_size": "patches", "image_size": "images"}
    sizes = [f"{config[key]} {name}" for key, name in counts.items() if isinstance(config.get(key), int)]
    sizes += [f"{name} of {escape(config[key])} px" for key, name in sides.items() if key in config]
    sizes += [f"{len(config['id2label'])} classes"] if "id2label" in config else []
    kind = code((config.get("architectures") or ["An image classifier"])[0])
    return f"{kind} ({', '.join(sizes)})" if sizes else kind


def preparation(run: RunFolder) -> str:
    """Size and normalisation that the image processor applies."""
    processor = run.read("preprocessor_config.json") or {}
    size, parts = processor.get("size", {}), []
    if {"height", "width"} <= set(size):
        parts.append(f"{escape(size['width'])}x{escape(size['height'])} px")
    if processor.get("do_normalize") and "image_mean" in processor:
        mean, std = (
            f"{values[0]:g}" if len(set(values)) == 1 else "/".join(f"{value:g}" for value in values)
            for values in (processor["image_mean"], processor["image_std"])
        )
        parts.append(f"mean {mean}, std {std}")
    return f" ({', '.join(parts)})" if parts else ""


def report_section(run: RunFolder, report: Report) -> dict[str, Any]:
    """What the template says about one report."""
    table, cells = tables.result_tables(report)
    folder = Path(report.file).parent
    plots = [((folder / name).as_posix(), text) for name, text in PLOTS.items() if (run.path / folder / name).is_file()]
    return {
        "subject": code(report.subject),
        "verdict": tables.verdict(report),
        "table": table,
        "cells": cells,
        "doubts": tables.doubts(report),
        "protocols": tables.protocols(report),
        "checks": report.checks.get(report.subject) or (),
        "versions": [escape(f"{name} {number}") for name, number in report.versions.items()],
        "plots": plots,
    }
