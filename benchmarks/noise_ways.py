"""Ways to fewer and cheaper noise steps, tried on one model: how large a noise of influence epsilon, at what cost.

    python benchmarks/noise_ways.py --model_name_or_path MODEL --dataset_name FOLDER_OR_HUB_ID
    python benchmarks/noise_ways.py                     (digits; a small ViT of vit-cifar10's size, trained first)

All noises end at the influence epsilon on the same 512 held-out images, so the centred norm says how well a way did and
the forward-equivalents (all of a round: pool, steps, scaling) what it took. "later" is the model after one round of
plain fine-tuning (40 steps): what a noise that was learned before is worth there. Writes results/NAME.json.
"""

import argparse
import copy
import itertools
import statistics
from typing import Any

import torch
from common import circumstances, keep, settings_of
from noise_learning import model_and_images
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_nullspace.data.image_set import collate
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.algorithm1 import NoiseSettings, learn_noise
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.calibration import calibrate
from hf_nullspace.noise.probe import probing
from hf_nullspace.training.cost import Cost, equivalents
from hf_nullspace.training.noise_stream import noise_stream

BASE = {"steps": 60, "learning_rate": 0.4, "pool_images": 1024}
WAYS: dict[str, dict[str, Any]] = {
    "a random direction": {"steps": 0},
    "boundary, 60 steps of 128": {},
    "fresh batches, clean logits every step": {"pool_images": 0},
    "pool of 512": {"pool_images": 512},
    "pool of 2,048": {"pool_images": 2048},
    "30 steps": {"steps": 30},
    "120 steps": {"steps": 120},
    "learning rate 0.2": {"learning_rate": 0.2},
    "learning rate 0.8": {"learning_rate": 0.8},
    "batches of 64": {"batch": 64},
    "batches of 32": {"batch": 32},
    "120 steps of 64": {"batch": 64, "steps": 120},
    "2 at once": {"count": 2},
    "4 at once": {"count": 4},
    "tokens bounded by A = 1": {"noise_limit": 1.0},
    "tokens not bounded": {"noise_limit": 1000.0},
    "squared distance": {"loss": "squared_l2"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--attn", help="attention implementation; unset: the model's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--epsilon", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="noise_ways")
    args = parser.parse_args()
    device = torch.device(args.device)
    model, images = model_and_images(args)
    model = model.to(device).eval()
    hook = PatchEmbeddingNoise(model)
    held_out, _ = noise_stream(images, collate, batch_size=128, held_out_images=512, seed=0, round=0)
    found: dict[str, Any] = {}

    def stream(batch: int, seed: int) -> Any:  # of other images than the held-out ones, augmented as in training
        return noise_stream(images, collate, batch_size=batch, held_out_images=512, seed=0, round=seed)[1]

    def follow(way: dict[str, Any], seed: int, start: Tensor | None = None, on: Any = model, at: Any = hook) -> Any:
        settings = BoundarySettings(
            **{"epsilon": args.epsilon, **BASE, **{k: v for k, v in way.items() if k != "batch"}}
        )
        cost = Cost()
        cost.start()
        batches = stream(way.get("batch", 128), seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            noises, history = follow_boundary(
                cost.counted(on), batches, settings, seed=seed, held_out=held_out, hook=at, start=start
            )  # fmt: skip
        cost.sync()
        return noises, history, equivalents(cost.passes())

    def note(name: str, entries: list[dict[str, float]]) -> None:
        found[name] = entries
        shown = ", ".join(f"{key} {statistics.median(entry[key] for entry in entries):.4g}" for key in entries[0])
        print(f"{name:42s} {shown}", flush=True)

    def of(noises: Any, history: Any, spent: int) -> dict[str, float]:
        return {
            "centred_norm": statistics.mean(noise.centred_norm for noise in noises),
            "influence": history.held_out_influence,
            "forward_equivalents": spent,
            "longest_token": max(float(noise.tensor.norm(dim=-1).max()) for noise in noises),
        }

    # On one model
    seeds = range(1, args.seeds + 1)
    for name, way in WAYS.items():
        note(name, [of(*follow(way, seed)) for seed in seeds])
    for limit in (0.5, 1.0):
        entries = []
        for seed in seeds:
            cost = Cost()
            cost.start()
            settings = NoiseSettings(epsilon=args.epsilon, noise_limit=limit, max_steps=300, on_limit="rescale")
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                one, history = learn_noise(
                    cost.counted(model), stream(128, seed), settings, seed=seed, held_out=held_out, hook=hook
                )  # fmt: skip
            cost.sync()
            entries.append(of([one], history, equivalents(cost.passes())) | {"steps": history.steps})
        note(f"Algorithm 1 from A = {limit}", entries)

    # A round later
    later = after_a_round(model, images, device, args.bf16)
    its_hook = PatchEmbeddingNoise(later)
    earlier = [follow({}, seed)[0][0] for seed in seeds]
    note("later: a new noise", [of(*follow({}, seed, None, later, its_hook)) for seed in seeds])
    warm = [follow({"steps": 30}, seed, one.tensor, later, its_hook) for seed, one in zip(seeds, earlier, strict=True)]
    note("later: 30 steps from the earlier noise", [of(*entry) for entry in warm])
    cost = Cost()
    cost.start()
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        scaled = calibrate(
            cost.counted(later), [noise.tensor for noise in earlier], args.epsilon, held_out, hook=its_hook, largest=2.0
        )  # fmt: skip
        with probing(later, held_out, hook=its_hook) as probe:
            stale = [probe.held_out_influence(noise.tensor.to(device)) for noise in earlier]
    cost.sync()
    each = equivalents(cost.passes()) / len(scaled)
    note(
        "later: the earlier noise, scaled",
        [
            {"centred_norm": one.factor * noise.centred_norm, "influence": one.influence, "forward_equivalents": each}
            for one, noise in zip(scaled, earlier, strict=True)
        ],
    )
    note("later: the earlier noise, as it was", [{"influence": influence} for influence in stale])

    # Convex combinations (A.5)
    bank = torch.cat([noise.tensor for noise in earlier]).to(device)
    drawn = torch.distributions.Dirichlet(torch.ones(len(bank))).sample((64,)).to(device)  # type: ignore[no-untyped-call]
    mixtures = torch.einsum("km,mnd->knd", drawn, bank)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    with autocast, torch.no_grad(), probing(model, held_out, hook=hook) as probe:
        influences = [probe.held_out_influence(one[None], 1) for one in mixtures]
    shares = {
        "within_epsilon": sum(influence <= args.epsilon for influence in influences) / len(influences),
        "influence": statistics.median(influences),
        "centred_norm": float(mixtures.flatten(1).norm(dim=1).median()),
    }
    note(f"convex combinations of {len(bank)}", [shares])

    keep(
        args.name,
        {
            "command": "python benchmarks/noise_ways.py",
            "settings": settings_of(args) | {"base": BASE},
            **circumstances(device),
            "ways": found,
        },
    )


def after_a_round(model: Any, images: Any, device: torch.device, bf16: bool) -> Any:
    """The model after 40 plain steps of 128 images at learning rate 1e-4."""
    later = copy.deepcopy(model)
    later.get_input_embeddings()._forward_hooks.clear()
    optimizer = torch.optim.AdamW(later.parameters(), lr=1e-4, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(images, 128, shuffle=True, generator=generator, collate_fn=collate)
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), 40):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = later(pixel_values=batch["pixel_values"].to(device)).logits
        optimizer.zero_grad()
        cross_entropy(logits.float(), batch["labels"].to(device)).backward()
        optimizer.step()
    return later.eval()


if __name__ == "__main__":
    main()
