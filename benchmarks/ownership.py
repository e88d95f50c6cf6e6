"""How often does a fingerprint of null patterns recognise a copy, and how often an innocent model?

    python benchmarks/ownership.py --model M --dataset D --picture docs/images/ownership.png     (8 minutes on one core)
    python benchmarks/ownership.py --model M --dataset D --copies FOLDER FOLDER    (and fine-tuned copies of your own)

The owner's model M is held to copies of itself: stored in half precision, with noise on every weight, fine-tuned here;
and to copies of a thief who knows the method and fills the null directions of the patch projection with noise.
The innocent models are trained here from scratch, with other seeds on the same data, with M's configuration but
--layers layers; each of them is also an owner to whom the others and M are innocent. The score of a model is the median
over several fingerprints; rates count models, at the threshold that ``verify_owner`` has by default.
Writes benchmarks/results/NAME.json.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import circumstances, keep, settings_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_nullspace.core.files import write_whole
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.invisible.ownership import Fingerprint, fingerprint, invariance_score
from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.models.patch_embedding import find_patch_embedding, patch_projection
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.scores import wilson

THRESHOLD = 0.1
WEIGHT_NOISES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)  # of every weight tensor's standard deviation
LEARNING_RATES = (1e-5, 1e-4, 1e-3)
EVASIONS = (0.1, 0.3, 1.0)  # of the patch projection's standard deviation
COPY, EVASION, INNOCENT = "copy", "evasion", "innocent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder: the owner's")
    parser.add_argument("--dataset", required=True, help="Hub id or folder with the splits 'train' and 'test'")
    parser.add_argument("--copies", nargs="*", default=[], help="folders of fine-tuned copies of the model")
    for name, default in [("others", 4), ("layers", 2), ("steps", 300), ("batch", 64), ("finetune_steps", 60),
                          ("train_images", 12800), ("images", 32), ("patterns", 8), ("fingerprints", 3),
                          ("seed", 0)]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--picture", type=Path, help="PNG of all scores")
    parser.add_argument("--name", default="ownership", help="of the JSON; 'none' writes none")
    args = parser.parse_args()
    start = time.perf_counter()

    # Load
    owner = AutoModelForImageClassification.from_pretrained(args.model).eval()
    preprocessing = Preprocessing.from_processor(AutoImageProcessor.from_pretrained(args.model, backend="pil"))
    train = load(args.dataset, "train", args.train_images, preprocessing, args.seed)
    test = load(args.dataset, "test", 1000, preprocessing, args.seed)
    pixels = test[0][: args.images].float() / 255

    # Judge
    rows = []

    def judge(name: str, kind: str, marks: list[Fingerprint], model: nn.Module, whose: str = "M") -> None:
        scores = [invariance_score(pixel_model(model, preprocessing), mark, pixels) for mark in marks]
        right = accuracy(model, preprocessing, *test)
        rows.append({"owner": whose, "suspect": name, "kind": kind, "scores": scores,
                     "score": statistics.median(scores), "accuracy": right})  # fmt: skip
        print(f"{time.perf_counter() - start:5.0f} s  {kind:9s} {whose:3s} {name:32s} score {rows[-1]['score']:.5f} "
              f"[{min(scores):.5f}, {max(scores):.5f}]  accuracy {right:.3f}", flush=True)  # fmt: skip

    marks = make_marks(owner, preprocessing, args)
    for name, suspect in copies(owner, train, preprocessing, args):
        judge(name, COPY, marks, suspect)
    for size in EVASIONS:
        judge(f"null directions filled, {size:g}", EVASION, marks, filled(owner, size, args.seed))
    others = {}
    for seed in range(1, args.others + 1):
        config = copy.deepcopy(owner.config)
        config.num_hidden_layers = args.layers
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(config)
        others[f"seed {seed}"] = trained(model, train, preprocessing, args.steps, args.batch, 1e-3, seed)
        judge(f"seed {seed}", INNOCENT, marks, others[f"seed {seed}"])
    for whose, other in others.items():
        its_marks = make_marks(other, preprocessing, args)
        for name, suspect in {"M": owner, **others}.items():
            judge(name, COPY if name == whose else INNOCENT, its_marks, suspect, whose)

    # Count
    summary = {kind: rate([row for row in rows if row["kind"] == kind and row["suspect"] != row["owner"]])
               for kind in (COPY, EVASION, INNOCENT)}  # fmt: skip
    for kind, found in summary.items():
        print(f"{kind}: {found['recognised']} of {found['models']} at most {THRESHOLD:g} "
              f"[{found['interval']['low']:.1%}, {found['interval']['high']:.1%}], scores {found['lowest']:.2g} to "
              f"{found['highest']:.2g}")  # fmt: skip
    if args.picture:
        plot(rows, args.picture)
    if args.name != "none":
        found = {"threshold": THRESHOLD, "summary": summary, "rows": rows, "seconds": time.perf_counter() - start}
        command = "python benchmarks/ownership.py --model M --dataset D" + " --copies ..." * bool(args.copies)
        settings = settings_of(args, "picture", "copies")
        keep(args.name, json.loads(json.dumps({"command": command, **circumstances(), "settings": settings, **found})))


def load(name: str, split: str, count: int, preprocessing: Preprocessing, seed: int) -> tuple[Tensor, Tensor]:
    """Random images as 8-bit pixels (count, C, H, W) of the model's size, and their labels."""
    rows = load_image_dataset(name, split)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    chosen = rows.select(order)
    images = [(preprocessing.pixels_from_image(row["image"]) * 255).round().byte() for row in chosen]
    return torch.stack(images), torch.tensor(chosen["label"])


def pixel_model(model: nn.Module, preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    return PixelModel(model, preprocessing.mean, preprocessing.std)


def make_marks(model: nn.Module, preprocessing: Preprocessing, args: argparse.Namespace) -> list[Fingerprint]:
    nullspace = PatchNullspace.from_model(model).in_pixels(preprocessing.std)
    generator = torch.Generator().manual_seed(args.seed)
    return [fingerprint(nullspace, preprocessing.size, args.patterns, generator) for _ in range(args.fingerprints)]


def copies(
    owner: nn.Module, train: tuple[Tensor, Tensor], preprocessing: Preprocessing, args: argparse.Namespace
) -> Any:
    """Names and models that all come from the owner's weights."""
    yield "the same file", owner
    yield "stored in bfloat16", copy.deepcopy(owner).bfloat16().float()
    for size in WEIGHT_NOISES:
        yield f"weight noise {size:g}", noisy(owner, size, args.seed)
    for rate in LEARNING_RATES:
        model = copy.deepcopy(owner)
        yield (
            f"fine-tuned here, lr {rate:g}",
            trained(model, train, preprocessing, args.finetune_steps, args.batch, rate, args.seed),
        )
    for folder in args.copies:
        yield f"copy {Path(folder).name}", AutoModelForImageClassification.from_pretrained(folder).eval()


@torch.no_grad()
def noisy(model: nn.Module, size: float, seed: int) -> nn.Module:
    """Every parameter with normal noise of ``size`` times its standard deviation."""
    generator, changed = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for parameter in changed.parameters():
        if parameter.numel() > 1:
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return changed


@torch.no_grad()
def filled(model: nn.Module, size: float, seed: int) -> nn.Module:
    """A thief who knows the method: random weights in the null directions of the patch projection, nowhere else."""
    generator, changed = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    nullspace = PatchNullspace.from_model(model)
    weight = patch_projection(find_patch_embedding(changed)).weight
    random = torch.randn(weight.shape, generator=generator, dtype=torch.float64).flatten(1)
    weight.add_((size * weight.std() * nullspace.project_patches(random).view(weight.shape)).to(weight))
    return changed


def trained(
    model: nn.Module, train: tuple[Tensor, Tensor], preprocessing: Preprocessing, steps: int, batch: int, lr: float,
    seed: int,
) -> nn.Module:  # fmt: skip
    """AdamW with weight decay 0.05, cosine, random flips."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, labels = train
    model.train()
    for _ in range(steps):
        which = torch.randint(len(images), (batch,))
        pixels = images[which].float() / 255
        pixels = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
        loss = cross_entropy(model(pixel_values=preprocessing.normalize(pixels)).logits, labels[which])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, preprocessing: Preprocessing, images: Tensor, labels: Tensor) -> float:
    """On the test images; says whether a suspect is still worth stealing, or an innocent model a real one."""
    right = 0
    for part, wanted in zip(images.split(100), labels.split(100), strict=True):
        pixel_values = preprocessing.normalize(part.float() / 255)
        right += int((model(pixel_values=pixel_values).logits.argmax(1) == wanted).sum())
    return right / len(images)


def rate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    recognised = sum(row["score"] <= THRESHOLD for row in rows)
    return {"models": len(rows), "recognised": recognised, "interval": asdict(wilson(recognised, len(rows))),
            "lowest": min(row["score"] for row in rows), "highest": max(row["score"] for row in rows)}  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One line per suspect of M: the score, and its range over the fingerprints; then all other pairs in one line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [(row["suspect"], row["kind"], [row["score"]], row["scores"]) for row in rows if row["owner"] == "M"]
    pairs = [row for row in rows if row["owner"] != "M" and row["owner"] != row["suspect"]]
    if pairs:
        scores = [row["score"] for row in pairs]
        lines.append((f"{len(pairs)} other pairs of models", INNOCENT, scores, scores))
    figure = Figure(figsize=(7, 0.28 * len(lines) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (_, kind, scores, spread) in enumerate(lines):
        colour = {COPY: "tab:red", EVASION: "tab:orange", INNOCENT: "tab:blue"}[kind]
        axes.plot([max(value, 1e-6) for value in (min(spread), max(spread))], [place, place], color=colour, alpha=0.4)
        axes.plot([max(score, 1e-6) for score in scores], [place] * len(scores), ".", color=colour)
    axes.axvline(THRESHOLD, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(lines)), [f"{name} ({kind})" for name, kind, *_ in lines], fontsize="small")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="score (0: invariant, 1: as sensitive as to the permuted pattern)")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


if __name__ == "__main__":
    main()
