"""Eager attention against torch's fused one on this machine: which is faster, in float32 and in bfloat16?

    OMP_NUM_THREADS=1 python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --size 224 --hidden 768 --layers 12 --heads 12 --patch 16

A forward pass, forward and backward to the input (what attacks and noises need), forward and backward to the parameters
(what training needs), each in turn for every way. On a CPU the clock is the process's CPU time. Writes
benchmarks/results/NAME.json.
"""

import statistics
import time
from typing import Any

import torch
from common import circumstances, keep, model_options, random_vit
from torch.nn.functional import cross_entropy

PASSES = ("forward", "backward_to_input", "backward_to_parameters")


def main() -> None:
    args = model_options("attention", __doc__, repeats=7).parse_args()
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

    models = {attention: random_vit(args, attention).eval() for attention in ("sdpa", "eager")}
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
    result = {
        "command": "python benchmarks/attention.py",
        "settings": vars(args),
        "clock": clock.__name__,
        **circumstances(args.device),
        "images_per_second": [
            {"attention": attention, "bf16": bf16, "passes": passes, "speed": round(speeds[attention, bf16, passes], 1)}
            for attention, bf16, passes in ways
        ],
    }
    keep(args.name, result)


if __name__ == "__main__":
    main()
