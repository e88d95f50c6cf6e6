"""Where a ViT or DeiT looks: saliency maps of images as overlays, one row per image and one column per method.

    python recipes/explain.py --model_name_or_path M --image cat.png
    python recipes/explain.py --model_name_or_path M --image source.png result.png target.png --method lrp rollout

With several images every map is compared with that of the first: r is their correlation, 1 where the explanation stays
(docs/saliency.md). Writes explain.png and explain.json (the maps).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import only_run_in, write_json
from hf_nullspace.core.settings import check_output_dir, nearest
from hf_nullspace.explain.grid import BATCH, TITLES, all_maps, correlation_text, correlations_with_first, plot_grid
from hf_nullspace.explain.maps import check_has_cls
from hf_nullspace.invisible.images import read_image
from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.preprocessing import Preprocessing


@dataclass
class ExplainArguments:
    """What is explained, how, and where the results go."""

    _group_title: ClassVar[str] = "Explanation"

    model_name_or_path: str | None = option(None, "Hub id or folder of a ViT or DeiT.")
    model_revision: str | None = option(None, "Branch, tag or commit of the model.")
    image: list[str] | None = option(None, "Image files; the others are compared with the first.")
    method: list[str] = option(list(TITLES), "Some of " + ", ".join(TITLES))
    target_class: str | None = option(None, "Class to explain, by name or number. Unset: the prediction of each image.")
    output_dir: str = option("outputs/explain", "Folder for the PNG and the JSON.")

    def __post_init__(self) -> None:
        if self.model_name_or_path is None or not self.image:
            raise UsageError("name the model and the images: --model_name_or_path M --image FILE ...")
        for name in self.method:
            if name not in TITLES:
                raise UsageError(f"method {name!r}: expected some of {', '.join(TITLES)}")
        check_output_dir(self.output_dir)


def main() -> None:
    (args,) = parse((ExplainArguments,), str(__doc__))
    with only_run_in(args.output_dir):
        explain(args, Path(args.output_dir))


def explain(args: ExplainArguments, output: Path) -> None:
    """Load, look, keep."""
    # Load
    where = args.model_name_or_path, args.model_revision
    model, preprocessing = load_model(*where).eval(), Preprocessing.from_processor(load_image_processor(*where))
    check_has_cls(model)
    preprocessing.check_fits(model.config)
    labels: dict[int, str] = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
    target = class_number(args.target_class, labels)
    pixels = torch.stack([preprocessing.pixels_from_image(read_image(name)) for name in args.image])
    pixel_values = preprocessing.normalize(pixels).to(model.dtype)

    # Look
    confidences, predictions = probabilities(model, pixel_values).max(1)
    targets = predictions if target is None else torch.full_like(predictions, target)
    maps = all_maps(model, pixel_values, list(dict.fromkeys(args.method)), targets)

    # Keep
    rows = [
        {
            "image": name,
            "prediction": labels[int(predictions[index])],
            "confidence": float(confidences[index]),
            "explained_class": labels[int(targets[index])],
            "correlation_with_first": compared,
            "maps": {method: one[index].tolist() for method, one in maps.items()},
        }
        for index, (name, compared) in enumerate(zip(args.image, correlations_with_first(maps), strict=True))
    ]
    write_json(output / "explain.json", {"command": asdict(args), "images": rows})
    plot_grid(pixels, [f"{row['prediction']} {row['confidence']:.3f}" for row in rows], maps, output / "explain.png")
    for row in rows:
        print(describe(row, compared=row is not rows[0]))
    print(f"explain.json and explain.png are in {output}")


def class_number(name: str | None, id2label: dict[int, str]) -> int | None:
    """The class that a name or a number on the command line means."""
    if name is None:
        return None
    by_name = {label: number for number, label in id2label.items()}
    if name in by_name:
        return by_name[name]
    if name.isdecimal() and int(name) in id2label:
        return int(name)
    hint = nearest(name, by_name, most=3)
    raise UsageError(f"target_class={name!r}: the model has the classes 0 to {len(id2label) - 1}{hint}")


@torch.no_grad()
def probabilities(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """(B, K)."""
    return torch.cat([model(pixel_values=part).logits.float().softmax(-1) for part in pixel_values.split(BATCH)])


def describe(row: dict[str, Any], compared: bool) -> str:
    """One image in one line."""
    text = f"{row['image']}: {row['prediction']} ({row['confidence']:.3f}), explained as {row['explained_class']}"
    if compared:
        found = [f"{name} {correlation_text(value)}" for name, value in row["correlation_with_first"].items()]
        text += "; against the first: " + ", ".join(found)
    return text


if __name__ == "__main__":
    run(main)
