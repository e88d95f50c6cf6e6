"""The card of a noise or a bank of noises on the Hub: every number is from the noises' own files."""

from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from hf_nullspace.core.files import write_text
from hf_nullspace.core.text import PIPE, cell, code, escape, literal
from hf_nullspace.noise.history import ENDINGS, NO_NOISE
from hf_nullspace.noise.pictures import plot_bank, plot_noise

CARD_NAME, PICTURE, BANK_PICTURE = "README.md", "noise.png", "noises.png"
TAGS = ["nullspace-noise", "hf-nullspace", "vision", "robustness"]


def write_noise_card(
    config: Mapping[str, Any],
    tensor: Tensor,
    folder: Path,
    repo_id: str | None = None,
    model: nn.Module | None = None,
    image_processor: Any = None,
) -> None:
    """Write README.md and its picture for one noise; ``config`` is :meth:`NullspaceNoise.config`.

    With the noise's ``model`` the picture shows its least-squares preimage, in pixels if ``image_processor`` is given.
    """
    drawn = plot_noise(tensor, tuple(config["grid"]), folder / PICTURE, model, image_processor)
    _write(folder, [config], repo_id, f"![The noise]({PICTURE})\n\n{_caption(drawn, image_processor)}", _facts(config))


def write_bank_card(configs: Sequence[Mapping[str, Any]], folder: Path, repo_id: str | None = None) -> None:
    """Write README.md and its picture for a bank; ``configs`` are those of its noises, in order."""
    plot_bank(configs, folder / BANK_PICTURE)
    lines = [
        "| noise | round | after training steps | noise steps | stopped by | influence | images | norm | centred |"
    ]
    lines += ["| --: " * 9 + "|"]
    for index, config in enumerate(configs):
        of = config["provenance"]
        cells = [index, of["round"], of["training_step"], of["steps"], of["stopped"], of["influence"]]
        cells += [of["influence_images"], config["norm"], config["centred_norm"]]
        lines.append(f"| {' | '.join(map(_number, cells))} |")
    picture = f"![Influence and norm of every noise]({BANK_PICTURE})"
    lines += ["", f"{_none(configs)[2:]}."] if _none(configs) else []
    _write(folder, configs, repo_id, picture, "\n".join(lines), bank=True)


def _write(
    folder: Path,
    configs: Sequence[Mapping[str, Any]],
    repo_id: str | None,
    picture: str,
    facts: str,
    bank: bool = False,
) -> None:
    config = configs[0]
    of, (_, patches, features) = config["provenance"], config["shape"]
    base, on_hub = _base_model(of)
    shown = escape(base or "a vision transformer")
    link = f"[{shown}](https://huggingface.co/{quote(str(base))})"
    model = link if on_hub else f"{shown} (a local folder)" if base else "a model"
    loading = f"AutoModelForImageClassification.from_pretrained({literal(base if on_hub else 'path/to/the/model')}"
    with as_file(files("hf_nullspace.noise").joinpath("templates/noise_card.md")) as template:
        card = ModelCard.from_template(
            ModelCardData(library_name="hf-nullspace", base_model=base if on_hub else None, tags=TAGS),
            template_path=str(template),
            bank=bank,
            count=len(configs),
            base=shown,
            model=model + (f", commit {code(of['revision'])}" if of["revision"] else ""),
            patches=patches,
            features=features,
            grid=" x ".join(map(str, config["grid"])),
            picture=picture,
            facts=facts,
            weights=_weights(configs),
            loading=loading + (f", revision={literal(of['revision'])})" if of["revision"] else ")"),
            place=literal(repo_id or "path/to/this/folder"),
            settings=_settings(of),
            library=escape(of["library"] or "hf-nullspace"),
        )
    write_text(folder / CARD_NAME, str(card).rstrip("\n") + "\n")


def _base_model(provenance: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The model's name, and whether it is one on the Hub: then its commit is known. Of a folder, the last part."""
    name = provenance["base_model"]
    if name is None or provenance["revision"] is not None:
        return name, name is not None
    return Path(name).name, False


def _weights(configs: Sequence[Mapping[str, Any]]) -> str:
    """Which weights the noises were learned on: after steps of a fine-tuning they are not the base model's."""
    hashes = {config["provenance"]["model_sha256"] for config in configs}
    tuned = any(config["provenance"]["training_step"] for config in configs)
    text = "Learned in the course of a fine-tuning: not on the base model's weights as they are published. " * tuned
    if len(hashes) > 1:
        return f"{text}Every noise was learned on weights of its own; their SHA-256 are in `config.json`."
    return f"{text}SHA-256 of the weights that it was learned on: {code(hashes.pop() or 'not recorded')}."


def _facts(config: Mapping[str, Any]) -> str:
    of = config["provenance"]
    images = f" on {_number(of['influence_images'])} held-out images" if of["influence_images"] else ""
    rows = {
        "epsilon, the threshold": _number(of["epsilon"]),
        "influence": _number(of["influence"]) + images,
        "norm": _number(config["norm"]),
        "centred norm (without each patch's feature mean)": _number(config["centred_norm"]),
        "gradient steps": f"{_number(of['steps'])}, stopped by: {_number(of['stopped'])}" + _none([config]),
        "round, after training steps": f"{_number(of['round'])}, {_number(of['training_step'])}",
        "seed": _number(of["seed"]),
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _none(configs: Sequence[Mapping[str, Any]]) -> str:
    """A remark on noises that the model hardly reacts to; empty if there are none."""
    ended = [config["provenance"]["stopped"] for config in configs]
    return "".join(
        f"; {word} ({ended.count(word)} of {len(ended)}): {ENDINGS[word]}" for word in NO_NOISE if word in ended
    )


def _caption(drawn: Mapping[str, float], image_processor: Any) -> str:
    if not drawn:
        return "Norm of the noise on every patch. The preimage in pixels needs the model, which was not at hand."
    unit = "in pixels of [0, 1]" if image_processor is not None else "in normalised pixel values"
    return (
        f"Left: the change of an image that comes nearest to the noise (least squares), {unit}; its largest entry is "
        f"{drawn['largest']:.3g}, its range is stretched. What no change of an image can cause is "
        f"{drawn['residual']:.1%} of the noise's norm. Right: norm of the noise on every patch."
    )


def _settings(provenance: Mapping[str, Any]) -> str:
    rows = [f"| {code(name).replace('|', PIPE)} | {_number(value)} |" for name, value in provenance["settings"].items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows]) if rows else "Not recorded."


def _number(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value:.4g}" if isinstance(value, float) else cell(value)
