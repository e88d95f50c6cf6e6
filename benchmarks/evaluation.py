"""How much of an evaluation is the model's forward? At least 90% for a set that sits in memory.

    python benchmarks/evaluation.py                       (a ViT of vit-cifar10's size, random weights, 512 images)
    python benchmarks/evaluation.py --device cuda --size 224 --hidden 768 --layers 12 --patch 16 --images 4096

The same forwards (same batches, same device) run bare and inside ``suite.evaluate``, alternating; the ratio of the
medians is the share. For an attack the bare loop is its forwards and backwards. On a CPU without worker processes the
clock is the process's CPU time, which other programs on the machine disturb less; else it is the wall's. Writes
benchmarks/results/NAME.json.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from common import circumstances, keep, model_options, random_vit
from torch.nn.functional import cross_entropy

from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.attacks.gradient import PGD
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.suite import Attacked, Clean, Condition, Corrupted, evaluate

PGD_STEPS = 5


def main() -> None:
    parser = model_options("evaluation", __doc__, images=512, repeats=5, workers=0)
    parser.set_defaults(batch=64)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    vit = random_vit(args).to(torch.bfloat16 if args.bf16 else torch.float32).eval()
    model = PixelModel(vit, (0.5,) * 3, (0.5,) * 3)
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (args.images, args.size, args.size, 3), dtype=np.uint8)
    rows = ArrayRows(arrays, rng.integers(0, 10, args.images))
    side = (args.size, args.size)
    on_demand = ImageSet(rows, Preprocessing((0.5,) * 3, (0.5,) * 3, side, None), name="noise")
    images = on_demand.in_memory()
    ready = torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div(255).to(args.device)

    def forwards() -> None:
        with torch.no_grad():
            for batch in ready.split(args.batch):
                model(batch).argmax(-1)

    def gradient_steps() -> None:
        for batch in ready.split(args.batch):
            for _ in range(PGD_STEPS):
                point = batch.detach().requires_grad_()
                loss = cross_entropy(model(point), torch.zeros(len(batch), dtype=torch.long, device=args.device))
                torch.autograd.grad(loss, point)
        forwards()

    def suite(condition: Condition, images: ImageSet = images) -> Callable[[], object]:
        return lambda: evaluate(
            model, images, [condition], batch_size=args.batch, workers=args.workers, progress=False
        )  # fmt: skip

    vit.requires_grad_(False)
    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "clean": (forwards, suite(Clean())),
        f"PGD, {PGD_STEPS} steps": (gradient_steps, suite(Attacked(PGD(steps=PGD_STEPS)))),
        "clean, images prepared on demand": (forwards, suite(Clean(), on_demand)),
        "generated gaussian_noise": (forwards, suite(Corrupted("gaussian_noise", 3))),
    }
    shares = {}
    clock = time.process_time if args.device == "cpu" and not args.workers else time.perf_counter
    for name, (bare, whole) in cases.items():
        seconds = [(timed(bare, clock), timed(whole, clock)) for _ in range(args.repeats + 1)][1:]
        plain, full = (statistics.median(column) for column in zip(*seconds, strict=True))
        spread = [a / b for a, b in seconds]
        shares[name] = {"share": plain / full, "lowest": min(spread), "highest": max(spread),
                        "images_per_second": args.images / full}  # fmt: skip
        print(f"{name:34s} forward (and backward) {plain:.3f} s of {full:.3f} s: {plain / full:.1%}", flush=True)
    command = f"python benchmarks/evaluation.py {' '.join(sys.argv[1:])}".strip()
    result = {"command": command, "clock": clock.__name__, **circumstances(args.device), "seed": 0}
    keep(args.name, result | {"settings": vars(args), "shares": shares})


def timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
