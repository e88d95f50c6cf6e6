"""What a training step with two views costs, against the forward and backward passes of two plain steps.

    python benchmarks/train_step.py                       (a ViT of vit-cifar10's size, random weights, batch 128)
    python benchmarks/train_step.py --device cuda --bf16 --size 224 --hidden 768 --layers 12 --heads 12 --patch 16

Inside of one run of NullspaceTrainer every step is timed as a whole (both views, the noise, the loss, the backward
pass, what the Trainer adds; not the optimizer), and before or after it, in turns, two plain steps' forward and backward
on the same images, and one of both views as a doubled batch. Ratios are taken step by step; the median of ours to two
plain ones should be at most 1.03. On a CPU the clock is the process's CPU time. Writes benchmarks/results/NAME.json.
"""

import statistics
import tempfile
import time
from typing import Any

import torch
from common import circumstances, keep, model_options, random_vit
from torch import Tensor
from torch.nn.functional import cross_entropy

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

    times: list[dict[str, float]]
    clock: Any

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        round_ = self.state.global_step // self.args.steps_per_round  # type: ignore[operator]
        if round_ != self._round:  # the noise is learned before the clock starts
            self.noises = self._learn(model, round_)
            self._round = round_
        images, labels = (inputs[name].to(self.args.device) for name in ("pixel_values", "labels"))
        first: dict[str, float] = {}
        if len(self.times) % 2:  # who comes first changes, and with it who finds the caches as the optimizer left them
            first = self.plain(model, images, labels)
            model.zero_grad()
        begin = self.now()
        loss = super().training_step(model, inputs, num_items_in_batch)
        ours = self.now() - begin
        kept = [parameter.grad.clone() for parameter in model.parameters()]
        self.times.append({"ours": ours, **(first or self.plain(model, images, labels))})
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
        return loss

    def plain(self, model: Any, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Seconds of two forward and backward passes, and of one of both views as a doubled batch."""

        def once(images: Tensor, labels: Tensor) -> None:
            with self.compute_loss_context_manager():
                loss = cross_entropy(model(pixel_values=images).logits, labels)
            self.accelerator.backward(loss)

        begin = self.now()
        once(images, labels)
        once(images, labels)
        two = self.now() - begin
        doubled = torch.cat([images, images]), torch.cat([labels, labels])
        begin = self.now()
        once(*doubled)
        return {"two_plain": two, "doubled_plain": self.now() - begin}

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return float(self.clock())


def main() -> None:
    parser = model_options("train_step", __doc__, steps=40)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--attn", default="sdpa")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            random_vit(args, args.attn),
            NullspaceConfig(
                output_dir=folder, rounds=2, steps_per_round=args.steps // 2,
                global_batch_size=args.batch, noise_batch_size=args.batch, noise_max_steps=2, noise_pool_images=0,
                held_out_images=64, epsilon=1e-4,
                bf16=args.bf16, use_cpu=args.device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=RandomImages(4 * args.batch, args.size),
        )  # fmt: skip
        trainer.times, trainer.clock = [], time.process_time if args.device == "cpu" else time.perf_counter
        trainer.train()
    times = trainer.times[4:]
    ratios = [step["ours"] / step["two_plain"] for step in times]
    ratio, quartiles = statistics.median(ratios), statistics.quantiles(ratios, n=4)
    doubled = statistics.median(step["doubled_plain"] / step["two_plain"] for step in times)
    print(f"our step / two plain forwards and backwards: {ratio:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})")
    print(f"one plain forward and backward of the doubled batch / two: {doubled:.3f}")
    result = {
        "command": "python benchmarks/train_step.py",
        "settings": vars(args),
        "clock": trainer.clock.__name__,
        **circumstances(args.device),
        "steps": len(times),
        "ratio": ratio,
        "quartiles": quartiles,
        "doubled_batch": doubled,
        "milliseconds": {name: 1000 * statistics.median(step[name] for step in times) for name in times[0]},
    }
    keep(args.name, result)


if __name__ == "__main__":
    main()
