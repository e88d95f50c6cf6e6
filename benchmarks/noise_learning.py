"""What a round's noise costs: Algorithm 1 as the authors ran it, and ours, on the same model, batches and epsilon.

    python benchmarks/noise_learning.py --model_name_or_path MODEL --dataset_name FOLDER_OR_HUB_ID
    python benchmarks/noise_learning.py                 (digits; a small ViT of vit-cifar10's size, trained first)
    python benchmarks/noise_learning.py --device cuda --bf16 --compile ...

Part 1, a step: (a) a plain transcription (a clean and a noisy forward pass, a backward pass, parameters that require
gradients, float32), our step with fresh batches, and with cached clean logits, in turn on the same batches. Part 2, a
round: (a) from U(-A, A) until a minibatch is inside epsilon, or --max_steps; Algorithm 1 from A = 1, tested on held-out
images; ours. Passes of one image are counted where the model is called; a forward pass is one forward-equivalent, a
backward pass to the noise one, one to the parameters too two. On a CPU the clock is the process's CPU time. Writes
benchmarks/results/NAME.json.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import circumstances, keep, settings_of
from torch import Tensor, nn
from torch.nn.functional import softmax

from hf_nullspace import NullspaceConfig
from hf_nullspace.data.image_set import collate
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise, embedding_shape
from hf_nullspace.noise.algorithm1 import NoiseSettings, l2, learn_noise, start_noise
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.influence import centred_norm
from hf_nullspace.noise.probe import probing
from hf_nullspace.training.base_model import train_base_model
from hf_nullspace.training.cost import Cost, equivalents
from hf_nullspace.training.loading import (
    DataArguments,
    ModelArguments,
    load_classifier,
    load_rows,
    training_images,
)
from hf_nullspace.training.noise_stream import noise_stream


def transcription(model: nn.Module, hook: PatchEmbeddingNoise, batch: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of Algorithm 1's inner loop: influence, and the loss whose gradient is taken."""
    with torch.no_grad():
        clean = model(pixel_values=batch).logits
    with hook.adding(noise):
        noisy = model(pixel_values=batch).logits
    influence = (softmax(noisy, -1) - softmax(clean, -1)).square().sum(-1).mean()
    return influence.detach(), (noisy - clean).norm(dim=-1).mean()


def as_the_authors(
    model: nn.Module, hook: PatchEmbeddingNoise, batches: Iterator[Tensor], start: Tensor, epsilon: float, steps: int
) -> tuple[Tensor, int]:
    """Algorithm 1, lines 3 to 14; the noise and the steps taken."""
    noise = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([noise], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for step in range(steps):
        influence, loss = transcription(model, hook, next(batches), noise)
        if influence < epsilon:
            return noise.detach(), step
        model.zero_grad()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return noise.detach(), steps


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    model, images = model_and_images(args)
    model = model.to(device).eval()
    hook = PatchEmbeddingNoise(model)
    called: Any = torch.compile(model) if args.compile else model

    def stream(round_: int) -> tuple[list[Tensor], Iterator[Tensor]]:
        return noise_stream(
            images, collate, batch_size=args.batch, held_out_images=512, seed=0, round=round_
        )  # fmt: skip

    held_out, batches = stream(0)
    shape = embedding_shape(model, held_out[0], hook.module)
    found: dict[str, Any] = {"step": steps_in_turn(args, called, hook, held_out, batches, shape, device, clock)}

    default = NullspaceConfig(output_dir="unused", use_cpu=device.type == "cpu", noise_batch_size=args.batch)
    ours = default.noise_settings()
    assert isinstance(ours, BoundarySettings)
    fine_tuning = default.steps_per_round * args.batch * 6  # type: ignore[operator]
    descent = NoiseSettings(epsilon=args.epsilon, noise_limit=1.0, max_steps=args.max_steps, on_limit="rescale")
    found["round"] = {"fine_tuning_forward_equivalents": fine_tuning}
    for name in ("authors", "descent, A = 1", "ours"):
        entries = []
        for seed in range(args.seeds):
            cost = Cost()
            cost.start()
            counted = cost.counted(called)
            held_out, batches = stream(seed + 1)
            if name == "authors":  # the batches that the others hold out are kept out here as well
                batches = (batch.to(device) for batch in batches)
            begin = clock()
            reduced = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and name != "authors")
            with reduced:
                if name == "authors":
                    start = start_noise(shape, 3.0, seed).to(device)
                    noise, steps = as_the_authors(counted, hook, batches, start, args.epsilon, args.max_steps)
                elif name == "ours":
                    settings = BoundarySettings(**{**vars(ours), "epsilon": args.epsilon})
                    made, history = follow_boundary(
                        counted, batches, settings, seed=seed, held_out=held_out, hook=hook
                    )  # fmt: skip
                    noise, steps = made[0].tensor, history.steps
                else:
                    one, history = learn_noise(counted, batches, descent, seed=seed, held_out=held_out, hook=hook)
                    noise, steps = one.tensor, history.steps
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = clock() - begin
            cost.sync()
            with probing(model, held_out, hook=hook) as probe:
                reached = probe.held_out_influence(noise.to(device))
            passes = cost.passes()
            entries.append(
                {
                    "steps": steps,
                    "held_out_influence": reached,
                    "centred_norm": float(centred_norm(noise)),
                    **passes,
                    "forward_equivalents": equivalents(passes),
                    "seconds": seconds,
                }
            )
        found["round"][name] = entries
        middle = {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        passes, share = middle["forward_equivalents"], middle["forward_equivalents"] / fine_tuning
        print(
            f"{name:16s} {middle['steps']:5.0f} steps, held-out influence {middle['held_out_influence']:.4f}, "
            f"centred norm {middle['centred_norm']:.1f}, {passes:,.0f} forward-equivalents = {share:.2f} of the "
            f"round's fine-tuning, {middle['seconds']:.1f} s (medians of {args.seeds} rounds)",
            flush=True,
        )
    command = "python benchmarks/noise_learning.py"
    result = {"command": command, "settings": settings_of(args), "clock": clock.__name__, **circumstances(device)}
    keep(args.name, result | found)


def steps_in_turn(
    args: argparse.Namespace,
    model: Any,
    hook: PatchEmbeddingNoise,
    held_out: list[Tensor],
    batches: Iterator[Tensor],
    shape: Any,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Time and passes of one step in each of the three ways, alternating on the same batches."""
    some = [batch.to(device) for batch in itertools.islice(batches, 4)]
    start = start_noise(shape, 0.5, 0).to(device)
    with probing(model, held_out[:1], hook=hook) as asked:
        cached = [asked.clean_logits(batch) for batch in some]

    def authors(which: int, model: nn.Module) -> None:
        noise = start.clone().requires_grad_()
        _, loss = transcription(model, hook, some[which], noise)
        model.zero_grad()
        loss.backward()

    def ours(which: int, model: nn.Module, clean: Tensor | None) -> None:
        noise = start.clone().requires_grad_()
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
        with probing(model, [], example=some[which], hook=hook) as probe, autocast:
            probe.measure(some[which], noise, l2, clean)

    ways: dict[str, Callable[[int, nn.Module], None]] = {
        "authors": authors,
        "ours, fresh batches": lambda which, model: ours(which, model, None),
        "ours, cached clean logits": lambda which, model: ours(which, model, cached[which]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, way in ways.items():
            for which in range(len(some)):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                begin = clock()
                way(which, model)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    seconds[name].append(clock() - begin)
    found = {}
    for name, way in ways.items():
        cost = Cost()
        cost.start()
        way(0, cost.counted(model))
        cost.sync()
        ratios = [a / b for a, b in zip(seconds["authors"], seconds[name], strict=True)]
        found[name] = {
            "forward_equivalents_per_image": equivalents(cost.passes()) / len(some[0]),
            "times_faster": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4),
            "milliseconds": 1000 * statistics.median(seconds[name]),
        }
        print(
            f"{name:28s} {found[name]['forward_equivalents_per_image']:.2f} forward-equivalents per image, "
            f"{found[name]['times_faster']:.2f}x faster than (a)",
            flush=True,
        )
    model.zero_grad()
    return found


def model_and_images(args: argparse.Namespace) -> tuple[Any, Any]:
    """The classifier and its training images, as fine-tuning has them."""
    digits = args.dataset_name == "digits"
    data = DataArguments(
        dataset_name=args.dataset_name, crop_scale=1.0 if digits else 0.6, horizontal_flip=not digits
    )  # fmt: skip
    rows = load_rows(data, data.train_split)
    torch.manual_seed(0)
    size = {"image_size": 48, "hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 512}
    named = ModelArguments(model_name_or_path=args.model_name_or_path, attn_implementation=args.attn, **size)
    classifier = load_classifier(named, rows, print)
    images = training_images(data, rows, classifier, 0)
    if args.model_name_or_path is None:
        with tempfile.TemporaryDirectory() as folder:
            config = NullspaceConfig(output_dir=folder, use_cpu=True, report_to="none")
            base = {"epochs": 10, "learning_rate": 2e-3, "batch_size": 64, "say": print}
            train_base_model(classifier, images, Path(folder) / "base", config, **base)
    return classifier.model, images


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--attn", help="attention implementation; unset: the model's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="ours in bfloat16 autocast; (a) stays float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--epsilon", type=float, default=0.03)
    for name, default in [("batch", 128), ("repeats", 8), ("seeds", 3), ("max_steps", 400)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--name", default="noise_learning")
    return parser.parse_args()


if __name__ == "__main__":
    main()
