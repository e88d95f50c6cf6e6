"""Does an evaluation's memory stay bounded on a stream of any length? Peak memory over the number of images.

    python benchmarks/stream_memory.py                    (2,000, 8,000 and 32,000 images; three minutes on one core)

Writes that many small JPEG files, streams them through ``suite.evaluate`` under two conditions with a tiny ViT, each
number in a process of its own, and reads the process's peak memory. What may grow is one bool per image and condition
(3.75 million images of ImageNet-C: 3.6 MiB) and the list of files; the slope says what does grow, in bytes per image.
Writes benchmarks/results/stream_memory.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from common import circumstances, keep
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.data.image_stream import ImageStream
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.suite import Clean, Corrupted, evaluate

MEAN = STD = (0.5, 0.5, 0.5)
SIDE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 8_000, 32_000])
    parser.add_argument("--measure", type=Path, help="Internal: evaluate the images of this folder in this process.")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    peaks = {}
    for images in args.images:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), images)
            command = [sys.executable, __file__, "--measure", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["images"] == 2 * images, found
        peaks[images] = found
        print(f"{images:8,} images: peak {found['peak_mib']:.1f} MiB, {found['before_mib']:.1f} MiB before", flush=True)
    growth = {n: found["peak_mib"] - found["before_mib"] for n, found in peaks.items()}
    low, high = min(args.images), max(args.images)
    slope = 2**20 * (growth[high] - growth[low]) / (high - low)
    print(f"{slope:.0f} bytes per image")
    command = f"python benchmarks/stream_memory.py {' '.join(sys.argv[1:])}".strip()
    result = {"command": command, **circumstances(), "conditions": 2, "peaks": peaks}
    keep("stream_memory", result | {"bytes_per_image": round(slope, 1)})


def write_images(folder: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    for place in range(images):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place:06}.jpg")


def measure(folder: Path) -> dict[str, float]:
    """Peak memory of this process after an evaluation of every file of ``folder``, and before it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=SIDE, patch_size=16, num_labels=10)).eval()
    model = PixelModel(vit, MEAN, STD)
    paths = sorted(map(str, folder.iterdir()))
    table = {"image": paths, "label": [place % 10 for place in range(len(paths))]}
    rows = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    conditions = [Clean(), Corrupted("contrast", 3)]

    def stream(count: int) -> ImageStream:
        few = rows.select(range(count)).to_iterable_dataset()
        return ImageStream(few, Preprocessing(MEAN, STD, (SIDE, SIDE), None), name="noise", expected=count)

    evaluate(model, stream(500), conditions, batch_size=64, progress=False)  # what every library allocates once
    before = peak()
    results = evaluate(model, stream(len(paths)), conditions, batch_size=64, progress=False)
    return {"images": sum(result.n for result in results), "before_mib": before, "peak_mib": peak()}


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
