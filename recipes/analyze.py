"""See the exact nullspaces of any image classifier with a patch embedding, and what noise changes in its gradient.

    python recipes/analyze.py --model_name_or_path M --output_dir outputs/analysis/M
    python recipes/analyze.py --model_name_or_path M --dataset_name D --split test
    python recipes/analyze.py --table4 192:16 768:32 M --output_dir outputs/table4
    python recipes/analyze.py --signal --model_name_or_path M --dataset_name D --output_dir outputs/signal/M

For one model: the nullspace of its patch embedding (section 2.2), the LayerNorm direction
(docs/layer_norm_direction.md), and how far every attention layer is from the conditions of proposition 1. Writes
analysis.json, patch_embedding.png, proposition_1.png, or table4.json and .png. With --signal: how far the gradients of
noisy and adversarial views are from the clean one (docs/robustness.md); signal.json and .png.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from figures.setting import commit
from figures.signal import LEARNING, draw_batches, measure_signal, plot_signal
from figures.table_4 import plot_table_4, remark, table_4
from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.core.files import only_run_in, write_json
from hf_nullspace.core.settings import check_numbers, check_output_dir
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.linear.attention import constructed_noise, head_changes, layer_conditions, null_direction
from hf_nullspace.linear.layer_norm import NotANullspaceError, check_direction, exact_encoder_nullspace
from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.models.attention import NoAttentionWeightsError, attention_inputs, attention_weights, prefix_tokens
from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.noise.artifact import model_hash
from hf_nullspace.robustness.records import versions
from hf_nullspace.training.loading import ModelArguments, load_classifier


@dataclass
class AnalyzeArguments:
    """What is looked at, and where the results go."""

    _group_title: ClassVar[str] = "Analysis"

    model_name_or_path: str | None = option(None, "Hub id or folder of an image classifier.")
    model_revision: str | None = option(None, "Branch, tag or commit of the model.")
    table4: list[str] | None = option(None, "Instead of one model: models, and D:patch for random weights; or 'paper'.")
    output_dir: str = option("outputs/analysis", "Folder for the JSON and the PNGs.")
    stored_dtype: str | None = option(None, "Precision of the checkpoint (bfloat16, ...), if it was loaded as another.")
    dataset_name: str | None = option(None, "Images to try: Hub id, folder, or 'digits'. Unset: random pixels.")
    split: str | None = option(None, "Split of the data set. Default: test; --signal: train.")
    images: int | None = option(None, "How many images. Default: 8; --signal: 1024, in each of its batches.")
    signal: bool = option(False, "Instead of the nullspaces: compare the gradients of noisy and clean images.")
    epsilons: list[float] = option([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0], "Signal: influences of the noises.")
    norm: float = option(1000.0, "Norm of the noise that tries the LayerNorm direction.")
    seed: int = option(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.table4 is None):
            raise UsageError("name what to look at: either --model_name_or_path M, or --table4 with models or D:patch")
        if self.signal and (self.table4 is not None or self.dataset_name is None):
            raise UsageError("--signal compares gradients of labelled images: expected a model and --dataset_name D")
        ranges = {"images": "int [1, inf)", "norm": "(0, inf)", "seed": "int [0, 4294967295]", "epsilons": "(0, 2]"}
        check_numbers(self, ranges)
        check_output_dir(self.output_dir)
        self.dtype()

    def dtype(self) -> torch.dtype | None:
        """The precision that ``stored_dtype`` names."""
        found = getattr(torch, self.stored_dtype, None) if self.stored_dtype else None
        if self.stored_dtype and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise UsageError(f"stored_dtype={self.stored_dtype!r}: expected float32, float16 or bfloat16")
        return found


def main() -> None:
    (args,) = parse((AnalyzeArguments,), str(__doc__))
    output = Path(args.output_dir)
    with only_run_in(output):
        if args.signal:
            analyze_signal(args, output)
        elif args.table4 is None:
            analyze(args, output)
        else:
            analyze_table_4(args, output)


def analyze(args: AnalyzeArguments, output: Path) -> None:
    """Load, look, keep."""
    # Load
    model = load_model(args.model_name_or_path, args.model_revision, headless=True)
    nullspace = PatchNullspace.from_model(model, stored_dtype=args.dtype())
    pixel_values = load_images(args, model)

    # Look
    patch = patch_report(nullspace, model, pixel_values, args.seed)
    print(describe_patch(patch))
    direction = direction_report(model, pixel_values, args)
    print(describe_direction(direction))
    attention = attention_report(model, pixel_values, args.seed)

    # Keep
    found = {"patch_embedding": patch, "layer_norm_direction": direction, "proposition_1": attention}
    write_json(output / "analysis.json", {"command": asdict(args), **found})
    plot_patch(patch, output / "patch_embedding.png")
    if attention["layers"]:
        plot_attention(attention["layers"], output / "proposition_1.png")
    print(f"analysis.json and the pictures are in {output}")


def analyze_table_4(args: AnalyzeArguments, output: Path) -> None:
    """One row for each model or configuration D:patch, printed as it comes."""
    load = partial(load_model, headless=True)
    rows = table_4(args.table4 or [], load, print, stored_dtype=args.dtype(), seed=args.seed)
    if text := remark(rows):
        print(text)
    write_json(output / "table4.json", {"command": asdict(args), "rows": rows})
    plot_table_4(rows, output / "table4.png")
    print(f"table4.json and table4.png are in {output}")


def analyze_signal(args: AnalyzeArguments, output: Path) -> None:
    """One row for each noisy or adversarial view, printed as it comes."""
    # Load
    rows: Any = load_image_dataset(str(args.dataset_name), args.split or "train")
    classifier = load_classifier(ModelArguments(args.model_name_or_path, args.model_revision), rows, print)
    if classifier.labels.new_head:
        raise UsageError("the model's head is not for these classes; name a model that was trained on them")
    classifier.model.float().to("cuda" if torch.cuda.is_available() else "cpu")
    batches, pool = draw_batches(rows, classifier, args.images or 1024, args.seed)

    # Look
    found = measure_signal(batches, pool, args.epsilons, print)

    # Keep
    head = {
        "command": {name: without_place(value) for name, value in asdict(args).items()},
        "commit": commit(),
        "versions": versions(),
        "model_sha256": model_hash(classifier.model),
        "images": {"split": args.split or "train", "batches": len(batches), "of_a_batch": len(pool)},
        "precision": "float32",
        "learning": LEARNING,
    }
    write_json(output / "signal.json", head | {"rows": found})
    plot_signal(found, output / "signal.png")
    print(f"signal.json and signal.png are in {output}")


# ---- load


def without_place(value: Any) -> Any:
    """A folder of this machine by its last name alone."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def load_images(args: AnalyzeArguments, model: nn.Module) -> Tensor:
    """``pixel_values`` (B, C, H, W) in the model's dtype."""
    preprocessing = Preprocessing.from_processor(load_image_processor(args.model_name_or_path, args.model_revision))
    preprocessing.check_fits(model.config)
    if args.dataset_name is None:
        generator = torch.Generator().manual_seed(args.seed)
        pixels = torch.rand(args.images or 8, preprocessing.channels, *preprocessing.size, generator=generator)
    else:
        rows = load_image_dataset(args.dataset_name, args.split or "test")
        count = min(args.images or 8, len(rows))
        pixels = torch.stack([preprocessing.pixels_from_image(rows[index]["image"]) for index in range(count)])
    return preprocessing.normalize(pixels).to(next(model.parameters()).dtype)


# ---- look


@torch.no_grad()
def patch_report(nullspace: PatchNullspace, model: nn.Module, pixel_values: Tensor, seed: int) -> dict[str, Any]:
    """The spectrum, and what the model answers to invisible and to random patterns as large as the images."""
    report = nullspace.summary()
    if not nullspace.dimension():
        return report | {"check": None}
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(pixel_values.shape, generator=generator, dtype=torch.float64)
    norm = float(torch.linalg.vector_norm(pixel_values.double()))
    clean = model(pixel_values=pixel_values).logits
    changes = {}
    for name, pattern in (("null", nullspace.project(random)), ("random", random)):
        pattern = (pattern * (norm / torch.linalg.vector_norm(pattern))).to(pixel_values.dtype)
        changes[name] = float((model(pixel_values=pixel_values + pattern).logits - clean).abs().max())
    residual = nullspace.residual(nullspace.sample(generator, 100))
    apart = (pixel_values - pixel_values.roll(1, 0)).double()  # two images
    hidden = float(nullspace.project(apart).square().sum() / apart.square().sum()) if len(pixel_values) > 1 else None
    return report | {
        "check": {
            "images": len(pixel_values),
            "residual": residual,
            "invisible_share_of_differences": hidden,
            "logit_change_by_null_pattern": changes["null"],
            "logit_change_by_random_pattern": changes["random"],
            "largest_logit": float(clean.abs().max()),
        }
    }


def direction_report(model: nn.Module, pixel_values: Tensor, args: AnalyzeArguments) -> dict[str, Any]:
    """The LayerNorm direction in float64, judged, and in the model's own precision."""
    own = asdict(check_direction(model, pixel_values, norm=args.norm, seed=args.seed))
    report = {"dtype": str(pixel_values.dtype).removeprefix("torch."), "own_precision": own}
    try:
        found = exact_encoder_nullspace(model, pixel_values, norm=args.norm, seed=args.seed)
    except NotANullspaceError as error:
        return report | {"exact": False, "dimension": 0, "reason": str(error)}
    return report | {"exact": True, "dimension": found.dimension, "float64": asdict(found.check)}


def attention_report(model: nn.Module, pixel_values: Tensor, seed: int) -> dict[str, Any]:
    """Proposition 1's measures of every layer, printed as they come; W and its control are as large as X."""
    try:
        layers = attention_weights(model)
    except NoAttentionWeightsError as error:
        print(f"Proposition 1: not measured: {error}")
        return {"reason": str(error), "layers": []}
    print(f"Proposition 1 ({len(layers)} layers, {prefix_tokens(model)} prefix tokens); zeros would be its conditions:")
    print("  layer  asymmetry          largest angle      collinear  rank of stack    s_min  head change: W   random")
    rows: list[dict[str, Any]] = []
    for index, (weights, inputs) in enumerate(zip(layers, attention_inputs(model, pixel_values), strict=True)):
        found = layer_conditions(weights)
        generator = torch.Generator().manual_seed(seed)
        tokens, size = inputs.shape[1], float(torch.linalg.matrix_norm(inputs.double()).mean())
        constructed = constructed_noise(null_direction(weights), tokens, generator, size)
        random = torch.randn(1, tokens, weights.features, generator=generator, dtype=torch.float64)
        random *= size / torch.linalg.matrix_norm(random)
        row = found.summary() | {
            "noise_norm": size,
            "head_change": head_changes(weights, inputs, constructed).tolist(),
            "head_change_by_random": head_changes(weights, inputs, random).tolist(),
        }
        rows.append(row)
        print(
            f"  {index:5d}  {spread(row['asymmetry'])}  {spread(row['largest_angle'])}  {found.collinearity:9.3f}  "
            f"{found.stack_rank:5d} of {found.features:4d}  {found.smallest_singular_value:.1e}  "
            f"{max(row['head_change']):14.3g} {max(row['head_change_by_random']):8.3g}"
        )
    held = sum(row["conditions_hold"] for row in rows)
    print(f"  {held} of {len(rows)} layers satisfy the conditions (to 1e-6)")
    return {"prefix_tokens": prefix_tokens(model), "layers": rows}


# ---- say


def describe_patch(report: dict[str, Any]) -> str:
    """The patch embedding in a few lines."""
    numbers, values, check = math.prod(report["patch"]), report["singular_values"], report["check"]
    text = (
        f"Patch embedding: {report['features']} features of {numbers} numbers ({' x '.join(map(str, report['patch']))}"
        f", {report['weight_dtype']}); singular values {values[0]:.4g} .. {values[-1]:.4g}\n"
        f"  nullspace dimension {report['dimension']} at the tolerance {report['tolerance']:.3g} "
        f"(a tenth of it: {report['dimension_at_a_tenth']}, ten times: {report['dimension_at_ten_times']})"
    )
    if check is not None:
        text += (
            f"\n  a null pattern as large as the images changes the logits (up to {check['largest_logit']:.3g}) by "
            f"{check['logit_change_by_null_pattern']:.2g}, a random one by "
            f"{check['logit_change_by_random_pattern']:.3g}; residual of null patches {check['residual']:.1e}"
        )
        if (hidden := check["invisible_share_of_differences"]) is not None:
            text += f"\n  of the squared difference between two of the images {hidden:.1%} is invisible"
            text += f" ({report['dimension'] / numbers:.1%} of the dimensions are)"
    return text


def describe_direction(report: dict[str, Any]) -> str:
    """The LayerNorm direction in two lines."""
    if not report["exact"]:
        return f"LayerNorm direction: refuted. {report['reason']}"
    exact, own = report["float64"], report["own_precision"]
    return (
        f"LayerNorm direction: exact, dimension {report['dimension']}. Noise of norm {exact['norm']:g} changes the "
        f"logits by {exact['logit_change']:.1e} in float64,\n  {own['logit_change']:.1e} in {report['dtype']}; "
        f"other noise of that norm by {exact['control_change']:.3g}"
    )


def spread(values: list[float]) -> str:
    """Smallest, mean and largest over the heads."""
    return f"{min(values):.3f} {sum(values) / len(values):.3f} {max(values):.3f}"


# ---- draw


def plot_patch(report: dict[str, Any], path: Path) -> Path:
    """The singular values, and the dimension of the nullspace as a function of the tolerance."""
    figure, ((spectrum, dimension),) = canvas(9, columns=2)
    values, numbers = report["singular_values"], math.prod(report["patch"])
    floor = values[0] * 1e-10  # what float64 cannot tell from 0 is drawn there
    spectrum.plot(range(1, len(values) + 1), [max(value, floor) for value in values], marker=".", linewidth=1)
    spectrum.axhline(report["tolerance"], color="black", linestyle="--", linewidth=1, label="tolerance")
    spectrum.set(xlabel="index", ylabel="singular value", yscale="log", title=f"{report['features']} x {numbers}")
    steps = [floor * (2 * values[0] / floor) ** (step / 400) for step in range(401)]
    counts = [numbers - sum(value > step for value in values) for step in steps]
    dimension.step(steps, counts, where="post")
    label = f"dimension {report['dimension']}"
    dimension.axvline(report["tolerance"], color="black", linestyle="--", linewidth=1, label=label)
    dimension.set(xlabel="tolerance", ylabel="dimension", xscale="log", ylim=(-0.02 * numbers, 1.05 * numbers))
    for axes in (spectrum, dimension):
        axes.legend(fontsize="small")
    return save_png(figure, path)


def plot_attention(layers: list[dict[str, Any]], path: Path) -> Path:
    """Asymmetry and largest angle per layer and head, and what the constructed noise does to the heads."""
    figure, ((asymmetry, angle, change),) = canvas(13.5, columns=3)
    heads = max(len(row["asymmetry"]) for row in layers)
    for axes, name, title, top in (
        (asymmetry, "asymmetry", "condition 1: |M - M'| / |M|", 2.0),
        (angle, "largest_angle", "condition 2: largest angle", math.pi / 2),
    ):
        table = [row[name] + [math.nan] * (heads - len(row[name])) for row in layers]
        image = axes.imshow(table, vmin=0, vmax=top, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axes)
        axes.set(xlabel="head", ylabel="layer", title=title)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    for name, label in (("head_change", "W of the proposition"), ("head_change_by_random", "random W")):
        change.plot([max(row[name]) for row in layers], marker="o", label=label)
    change.set(xlabel="layer", ylabel="largest relative change of a head", yscale="log", title="|W| = |X|")
    change.set_ylim(bottom=min(0.01, change.get_ylim()[0]))
    change.xaxis.get_major_locator().set_params(integer=True)
    change.legend(fontsize="small")
    return save_png(figure, path)


if __name__ == "__main__":
    run(main)
