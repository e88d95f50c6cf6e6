"""Make a transformers folder of a timm or EasyRobust checkpoint: model, image processor, how it was made.

    python recipes/convert.py --checkpoint model_best.pth.tar --ema --id2label imagenet --output_dir checkpoints/vit
    python recipes/convert.py --checkpoint vit.safetensors --normalization augreg --crop_pct 0.9 --output_dir vit

Takes .pth, .pth.tar, .bin and .safetensors of a ViT or a distilled DeiT. Sizes are read from the shapes. Mean and std
are those that the file wraps around the model, or have to be given. What transformers cannot express, and any tensor
that would be left over, is an error. Nothing in the file is run. docs/convert.md has the command for EasyRobust's DAT.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
import transformers

from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import sha256
from hf_nullspace.core.settings import check_numbers, check_output_dir
from hf_nullspace.hub.checkpoint_files import read_checkpoint
from hf_nullspace.hub.convert import (
    NORMALIZATIONS,
    normalization,
    read_labels,
    save_converted,
    timm_image_processor,
    to_transformers,
)
from hf_nullspace.hub.timm_vit import read_architecture
from hf_nullspace.models.preprocessing import Preprocessing


@dataclass
class ConvertArguments:
    """Which file, and what it does not say itself."""

    _group_title: ClassVar[str] = "Convert"

    checkpoint: str | None = option(None, "The file: .pth, .pth.tar, .bin or .safetensors.")
    output_dir: str | None = option(None, "A new folder for the transformers checkpoint.")
    ema: bool = option(False, "Take the averaged weights (state_dict_ema, model_ema) of a training checkpoint.")
    architecture: str | None = option(
        None, "timm's name, such as vit_base_patch16_224: checked against the shapes, and says the number of heads."
    )
    heads: int | None = option(None, "Attention heads, which no tensor says. Unset: those of timm's ViT of this width.")
    mean: list[float] = option([], "Mean of each channel, of pixels in [0, 1].")
    std: list[float] = option([], "Standard deviation of each channel.")
    normalization: str | None = option(
        None, f"Instead, by name: {' or '.join(NORMALIZATIONS)} (DeiT and EasyRobust: imagenet)."
    )
    crop_pct: float = option(0.875, "Centre crop after resizing the shorter edge to size / crop_pct; timm's ViTs: 0.9.")
    id2label: str | None = option(None, "'imagenet', or a file: JSON list, JSON id2label, or one name per line.")

    def __post_init__(self) -> None:
        if self.checkpoint is None or self.output_dir is None:
            raise UsageError("name the file and the new folder: --checkpoint FILE --output_dir DIR")
        check_numbers(self, {"heads": "int [1, inf)", "mean": "[0, 1]", "std": "(0, inf)", "crop_pct": "(0, 1]"})
        folder = Path(self.output_dir)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UsageError(f"{folder} is there already and is not an empty folder; name another --output_dir")
        check_output_dir(self.output_dir)


def main() -> None:
    (args,) = parse((ConvertArguments,), str(__doc__))
    path = Path(args.checkpoint)

    # Read
    checkpoint = read_checkpoint(path, averaged=args.ema)
    kind, heads_from = read_architecture(checkpoint.tensors, args.heads, args.architecture)
    mean, std, normalization_from = normalization(checkpoint, args.mean, args.std, args.normalization)
    labels = read_labels(args.id2label)

    # Convert
    model = to_transformers(checkpoint.tensors, kind, labels)
    processor = timm_image_processor(kind.image, mean, std, args.crop_pct)
    preprocessing = Preprocessing.from_processor(processor)
    preprocessing.check_fits(model.config)

    # Save
    record = {
        "checkpoint": path.name,
        "sha256": sha256(path),
        "weights": checkpoint.name,
        "weights_left_in_the_file": list(checkpoint.others),
        "architecture": asdict(kind),
        "heads": heads_from,
        "normalization": normalization_from,
        "mean": list(mean),
        "std": list(std),
        "crop_pct": args.crop_pct,
        "id2label": args.id2label and Path(args.id2label).name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    folder = save_converted(model, processor, record, args.output_dir)

    # Say
    left = f" ({', '.join(checkpoint.others)} left in the file)" if checkpoint.others else ""
    print(
        f"{path.name}: {checkpoint.name}{left}\n"
        f"{type(model).__name__}: width {kind.width}, depth {kind.depth}, {kind.heads} heads ({heads_from}), patch "
        f"{kind.patch}, images of {kind.image} x {kind.image}, {kind.classes} classes"
        f"{'' if kind.qkv_bias else ', no bias of q, k and v'}\n"
        f"Images: shorter edge to {preprocessing.resize}, bicubic, centre crop; mean {list(mean)} and std {list(std)} "
        f"from {normalization_from}\n"
        f"Classes: {args.id2label or 'without names; --id2label gives them, in the order of the logits'}\n"
        f"Saved {folder}: AutoModelForImageClassification.from_pretrained({str(folder)!r})"
    )


if __name__ == "__main__":
    run(main)
