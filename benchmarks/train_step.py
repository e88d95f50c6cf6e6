"""What a training step with two views costs, against the forward and backward passes of two plain steps.

    python benchmarks/train_step.py                       (a ViT of vit-cifar10's size, random weights, batch 128)
    python benchmarks/train_step.py --device cuda --bf16 --size 224 --hidden 768 --layers 12 --heads 12 --patch 16

Inside of one run of NullspaceTrainer every step is timed as a whole (both views in one forward pass, the noise, the
loss, the backward pass, what the Trainer adds; not the optimizer), and then two plain steps' forward and backward on
the same images, and one of both views as a doubled batch. Ratios are taken step by step; the median of ours to two
plain ones should be at most 1.03. On a CPU the clock is the process's CPU time. Writes benchmarks/results/NAME.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace import NullspaceConfig, NullspaceTrainer


class RandomImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Images that are numbers only: decoding is not what is measured."""

    def __init__(self, count: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(10, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


class TimedTrainer(NullspaceTrainer):
    """Times each of its steps, and two plain ones after it; the gradients stay those of its own step."""

    times: list[tuple[float, float, float]]
    clock: Any

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        round_ = self.state.global_step // self.args.steps_per_round  # type: ignore[operator]
        if round_ != self._round:  # the noise is learned before the clock starts
            self.noises = self._learn(model, round_)
            self._round = round_
        begin = self.now()
        loss = super().training_step(model, inputs, num_items_in_batch)
        ours = self.now() - begin
        kept = [parameter.grad.clone() for parameter in model.parameters()]
        images, labels = (inputs[name].to(loss.device) for name in ("pixel_values", "labels"))
        begin = self.now()
        for _ in range(2):
            with self.compute_loss_context_manager():
                plain = cross_entropy(model(pixel_values=images).logits, labels)
            self.accelerator.backward(plain)
        two = self.now() - begin
        begin = self.now()
        with self.compute_loss_context_manager():
            plain = cross_entropy(model(pixel_values=torch.cat([images, images])).logits, torch.cat([labels, labels]))
        self.accelerator.backward(plain)
        self.times.append((ours, two, self.now() - begin))
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
        return loss

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return float(self.clock())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("size", 48), ("patch", 8), ("hidden", 128), ("layers", 6), ("heads", 4), ("batch", 128),
                          ("steps", 40)]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--name", default="train_step")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden, image_size=args.size, patch_size=args.patch, num_labels=10,
        attn_implementation=args.attn,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            ViTForImageClassification(config),
            NullspaceConfig(
                output_dir=folder, rounds=2, preset="boundary", steps_per_round=args.steps // 2,
                global_batch_size=args.batch, noise_batch_size=args.batch, noise_max_steps=2, noise_pool_images=0,
                held_out_images=64, epsilon=1e-4,
                bf16=args.bf16, use_cpu=args.device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=RandomImages(4 * args.batch, args.size),
        )  # fmt: skip
        trainer.times, trainer.clock = [], time.process_time if args.device == "cpu" else time.perf_counter
        trainer.train()
    times = trainer.times[4:]
    ratios = [ours / plain for ours, plain, _ in times]
    ratio, quartiles = statistics.median(ratios), statistics.quantiles(ratios, n=4)
    doubled = statistics.median(double / plain for _, plain, double in times)
    print(f"our step / two plain forwards and backwards: {ratio:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})")
    print(f"one plain forward and backward of the doubled batch / two: {doubled:.3f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": "python benchmarks/train_step.py",
        "settings": vars(args),
        "clock": trainer.clock.__name__,
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": len(times),
        "ratio": ratio,
        "quartiles": quartiles,
        "doubled_batch": doubled,
        "milliseconds": {
            name: 1000 * statistics.median(column)
            for name, column in zip(("ours", "two_plain", "doubled_plain"), zip(*times, strict=True), strict=True)
        },
    }
    path = Path(__file__).parent / "results" / f"{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
