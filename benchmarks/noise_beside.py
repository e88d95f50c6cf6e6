"""Learning the next noise in another process while the model trains: does it cost the training less than its own time?

    OMP_NUM_THREADS=1 python benchmarks/noise_beside.py          (two free cores; a ViT of vit-cifar10's size)
    python benchmarks/noise_beside.py --device cuda --size 224 --hidden 768 --layers 12 --heads 12 --patch 16

Training steps (two views, forward and backward) and noise steps (clean logits cached) run alone and at the same time,
in turns of --seconds each. Where the machine has room for both, together they are as fast as alone (gain 2); where one
fills it, the gain is 1, and nothing is won. What a noise that is a round old is worth: benchmarks/noise_ways.py. Writes
benchmarks/results/NAME.json.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.models.patch_embedding import NoiseMode, PatchEmbeddingNoise
from hf_nullspace.noise.probe import Probe, frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("size", 48), ("patch", 8), ("hidden", 128), ("layers", 6), ("heads", 4), ("batch", 128),
                          ("seconds", 15), ("repeats", 3)]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", default="noise_beside")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    workers = {}
    for kind in ("training", "noise"):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(kind, vars(args), theirs), daemon=True)
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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": "python benchmarks/noise_beside.py",
        "settings": vars(args),
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "gain": statistics.median(gains),
        "turns": found,
    }
    path = Path(__file__).parent / "results" / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def work(kind: str, args: dict[str, Any], pipe: Any) -> None:
    """Steps of one kind for as many seconds as the pipe says, until it says none."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=args["hidden"], num_hidden_layers=args["layers"], num_attention_heads=args["heads"],
        intermediate_size=4 * args["hidden"], image_size=args["size"], patch_size=args["patch"], num_labels=10,
    )  # fmt: skip
    device = torch.device(args["device"])
    model = ViTForImageClassification(config).to(device)
    images = torch.randn(args["batch"], 3, args["size"], args["size"], device=device)
    labels = torch.zeros(args["batch"], dtype=torch.long, device=device)
    hook = PatchEmbeddingNoise(model)
    noise = 0.1 * torch.randn(1, (args["size"] // args["patch"]) ** 2, args["hidden"], device=device)
    probe = Probe(model, hook, [images], None, images[:1])

    def training() -> None:
        with hook.adding(noise, NoiseMode.SECOND_HALF):
            logits = model(pixel_values=torch.cat([images, images])).logits
        cross_entropy(logits, torch.cat([labels, labels])).backward()
        model.zero_grad()

    def learning() -> None:
        with frozen(model):
            probe.measure(images, noise.clone().requires_grad_(), squared=False, clean=probe.clean[0])

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
