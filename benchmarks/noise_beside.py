"""Learning the next noise in another process while the model trains: does it cost the training less than its own time?

    OMP_NUM_THREADS=1 python benchmarks/noise_beside.py          (two free cores; a ViT of vit-cifar10's size)
    python benchmarks/noise_beside.py --device cuda --size 224 --hidden 768 --layers 12 --heads 12 --patch 16

Training steps (two views, forward and backward) and noise steps (clean logits cached) run alone and at the same time,
in turns of --seconds each. Where the machine has room for both, together they are as fast as alone (gain 2); where one
fills it, the gain is 1, and nothing is won. What a noise that is a round old is worth: benchmarks/noise_ways.py. Writes
benchmarks/results/NAME.json.
"""

import argparse
import multiprocessing
import statistics
import time
from typing import Any

import torch
from common import circumstances, keep, model_options, random_vit
from torch.nn.functional import cross_entropy

from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.algorithm1 import l2
from hf_nullspace.noise.probe import probing


def main() -> None:
    args = model_options("noise_beside", __doc__, seconds=15, repeats=3).parse_args()
    context = multiprocessing.get_context("spawn")
    workers = {}
    for kind in ("training", "noise"):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(kind, args, theirs), daemon=True)
        process.start()
        workers[kind] = ours
    for pipe in workers.values():
        pipe.recv()  # it is warm

    def speeds(*kinds: str) -> dict[str, float]:
        for kind in kinds:
            workers[kind].send(args.seconds)
        return {kind: workers[kind].recv() for kind in kinds}

    gains, found = [], []
    for _ in range(args.repeats):
        alone = speeds("training") | speeds("noise")
        both = speeds("training", "noise")
        found.append({"alone": alone, "both": both})
        gains.append(sum(both[kind] / alone[kind] for kind in both))
        print(f"steps per second alone {alone}, together {both}: gain {gains[-1]:.2f}", flush=True)
    for pipe in workers.values():
        pipe.send(0)
    result = {
        "command": "python benchmarks/noise_beside.py",
        "settings": vars(args),
        **circumstances(args.device),
        "gain": statistics.median(gains),
        "turns": found,
    }
    keep(args.name, result)


def work(kind: str, args: argparse.Namespace, pipe: Any) -> None:
    """Steps of one kind for as many seconds as the pipe says, until it says none."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, model = torch.device(args.device), random_vit(args)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = torch.zeros(args.batch, dtype=torch.long, device=device)
    hook = PatchEmbeddingNoise(model)
    noise = 0.1 * torch.randn(1, (args.size // args.patch) ** 2, args.hidden, device=device)

    with probing(model, [], example=images, hook=hook) as asked:
        clean = asked.clean_logits(images)

    def training() -> None:
        with hook.adding(noise, 2):
            logits = model(pixel_values=torch.cat([images, images])).logits
        cross_entropy(logits, torch.cat([labels, labels])).backward()
        model.zero_grad()

    def learning() -> None:
        with probing(model, [], example=images, hook=hook) as probe:
            probe.measure(images, noise.clone().requires_grad_(), l2, clean)

    step = training if kind == "training" else learning
    step()
    pipe.send("warm")
    while seconds := pipe.recv():
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            count += 1
        pipe.send(count / (time.perf_counter() - begin))


if __name__ == "__main__":
    main()
