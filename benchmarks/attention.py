"""Eager attention against torch's fused one on this machine: which is faster, in float32 and in bfloat16?

    OMP_NUM_THREADS=1 python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --size 224 --hidden 768 --layers 12 --heads 12 --patch 16

A forward pass, forward and backward to the input (what attacks and noises need), forward and backward to the parameters
(what training needs), each in turn for every way. On a CPU the clock is the process's CPU time. Writes
benchmarks/results/NAME.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

PASSES = ("forward", "backward_to_input", "backward_to_parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("size", 48), ("patch", 8), ("hidden", 128), ("layers", 6), ("heads", 4), ("batch", 128),
                          ("repeats", 7)]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", default="attention")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    labels = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    def once(model: Any, passes: str, bf16: bool) -> float:
        model.requires_grad_(passes == PASSES[2])
        point = images.clone().requires_grad_(passes == PASSES[1])
        if args.device == "cuda":
            torch.cuda.synchronize()
        begin = clock()
        with torch.set_grad_enabled(passes != PASSES[0]), torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            logits = model(pixel_values=point).logits
        if passes != PASSES[0]:
            cross_entropy(logits.float(), labels).backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - begin
        model.zero_grad()
        return seconds

    models = {}
    for attention in ("sdpa", "eager"):
        config = ViTConfig(
            hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden, image_size=args.size, patch_size=args.patch, num_labels=10,
            attn_implementation=attention,
        )  # fmt: skip
        models[attention] = ViTForImageClassification(config).to(args.device).eval()
    ways = [(attention, bf16, passes) for attention in models for bf16 in (False, True) for passes in PASSES]
    seconds: dict[tuple[str, bool, str], list[float]] = {way: [] for way in ways}
    for repeat in range(args.repeats + 1):
        for way in ways:
            found = once(models[way[0]], way[2], way[1])
            if repeat:
                seconds[way].append(found)
    speeds = {way: args.batch / statistics.median(values) for way, values in seconds.items()}
    for attention in models:
        for bf16 in (False, True):
            shown = ", ".join(f"{passes} {speeds[attention, bf16, passes]:.0f}" for passes in PASSES)
            print(f"{attention:6s} {'bfloat16' if bf16 else 'float32 '} images per second: {shown}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": "python benchmarks/attention.py",
        "settings": vars(args),
        "clock": clock.__name__,
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images_per_second": [
            {"attention": attention, "bf16": bf16, "passes": passes, "speed": round(speeds[attention, bf16, passes], 1)}
            for attention, bf16, passes in ways
        ],
    }
    path = Path(__file__).parent / "results" / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
