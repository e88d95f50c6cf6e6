"""What the benchmarks share: the ViT they measure, what machine and code they measured, and where the numbers go."""

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.core.files import write_json

# Asked when a benchmark starts: the code that is measured, whatever is committed while it runs.
COMMIT = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
).stdout.strip()


def model_options(name: str, description: str | None, **more: int) -> argparse.ArgumentParser:
    """Options for the size of a ViT (that of vit-cifar10 unless told), the device, the result's name, and ``more``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"size": 48, "patch": 8, "hidden": 128, "layers": 6, "heads": 4, "batch": 128}
    for option, default in (sizes | more).items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", default=name, help="of the JSON in benchmarks/results")
    return parser


def random_vit(args: argparse.Namespace, attention: str | None = None) -> ViTForImageClassification:
    """A ViT of the size that :func:`model_options` asked for, on its device, with random weights and 10 classes."""
    config = ViTConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden, image_size=args.size, patch_size=args.patch, num_labels=10,
        attn_implementation=attention,
    )  # fmt: skip
    return ViTForImageClassification(config).to(args.device)


def circumstances(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The commit, the device, the threads and the versions that a number belongs to."""
    cuda = torch.device(device).type == "cuda"
    return {
        "commit": COMMIT,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def settings_of(args: argparse.Namespace, *without: str) -> dict[str, Any]:
    """The options of a run, with the names of files and folders instead of the places where they lie on a machine."""

    def shown(value: Any) -> Any:
        return Path(value).name if isinstance(value, str | Path) else value

    return {name: shown(value) for name, value in vars(args).items() if name not in without}


def keep(name: str, result: dict[str, Any]) -> None:
    """Write ``benchmarks/results/NAME.json``."""
    path = write_json(Path(__file__).parent / "results" / f"{name}.json", result)
    print(f"{path.name} is in {path.parent.name}")
