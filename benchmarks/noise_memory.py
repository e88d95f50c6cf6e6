"""What learning a noise needs in memory: no more than evaluation and one activation graph.

    python benchmarks/noise_memory.py                     (a ViT of vit-cifar10's size, random weights, batch 256)
    python benchmarks/noise_memory.py --device cuda --size 224 --hidden 768 --layers 12 --heads 12 --patch 16

Each way runs in a process of its own. On a CPU the peak of the bytes in tensors comes from torch's profiler, which
records every allocation; on a GPU from torch's allocator. "evaluation": a forward pass without a graph. "one graph": a
forward pass with frozen parameters and a noise that wants a gradient, and its backward pass. "authors": a step of a
plain transcription of Algorithm 1, whose parameters get gradients. "ours": all of follow_boundary. What the model, the
images and the noise take by themselves is in all of them. Writes benchmarks/results/NAME.json.
"""

import argparse
import multiprocessing
from collections.abc import Callable

import torch
from common import circumstances, keep, model_options, random_vit
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_nullspace.models.frozen import frozen
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary

WAYS = ("evaluation", "one graph", "authors", "ours")


def main() -> None:
    parser = model_options("noise_memory", __doc__, pool=512)
    parser.set_defaults(batch=256)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {way: pool.apply(peak_of, (way, args)) for way in WAYS}
    for way, peak in peaks.items():
        print(f"{way:12s} {peak / 2**20:8.1f} MiB")
    shares = {
        "ours_to_evaluation_and_one_graph": peaks["ours"] / (peaks["evaluation"] + peaks["one graph"]),
        "ours_to_authors": peaks["ours"] / peaks["authors"],
    }
    print(", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    result = {
        "command": "python benchmarks/noise_memory.py",
        "settings": vars(args),
        **circumstances(args.device),
        "peak_bytes": peaks,
        **shares,
    }
    keep(args.name, result)


def peak_of(way: str, args: argparse.Namespace) -> int:
    """The peak in bytes of one way, beyond the model and the images."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device, model = torch.device(args.device), random_vit(args).eval()
    batches = [torch.randn(args.batch, 3, args.size, args.size, device=device) for _ in range(2)]
    hook = PatchEmbeddingNoise(model)
    noise = 0.1 * torch.randn(1, (args.size // args.patch) ** 2, args.hidden, device=device)

    def evaluation() -> None:
        with torch.no_grad():
            model(pixel_values=batches[0])

    def distance(clean: Tensor, wanted: Tensor) -> Tensor:
        with hook.adding(wanted):
            return (model(pixel_values=batches[0]).logits - clean).norm(dim=-1).mean()

    def one_graph() -> None:
        wanted = noise.clone().requires_grad_()
        with frozen(model):
            torch.autograd.grad(distance(torch.zeros(args.batch, 10, device=device), wanted), [wanted])

    def authors() -> None:
        with torch.no_grad():
            clean = model(pixel_values=batches[0]).logits
        distance(clean, noise.clone().requires_grad_()).backward()

    def ours() -> None:
        settings = BoundarySettings(epsilon=1e-4, steps=3, pool_images=args.pool)
        follow_boundary(model, iter(batches * 2), settings, seed=0, held_out=batches, hook=hook)

    ways: dict[str, Callable[[], None]] = {
        "evaluation": evaluation, "one graph": one_graph, "authors": authors, "ours": ours,
    }  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ways[way]()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        ways[way]()
    live = peak = 0
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    if not events:
        raise RuntimeError("torch's profiler recorded no allocation")
    return peak


if __name__ == "__main__":
    main()
