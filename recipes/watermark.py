"""Put a mark on an image, or make it look like another one, so that a model does not notice (A.7 and A.8).

    python recipes/watermark.py --model_name_or_path M --image cat.png --mark logo.png
    python recipes/watermark.py --model_name_or_path M --image cat.png --target dog.png --output_dir outputs/cat-as-dog

M is an image classifier with a nullspace of its patch embedding. The images are first resized to the size that M's
image processor leaves alone. Writes source.png, result.png, side_by_side.png and watermark.json: what the model says of
the two files, how close the result came to the wish, and whether the explanation stays (figures 6 and 7). Where
rounding to 8 bits changes the prediction, the wanted change is scaled down until it stays.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import only_run_in, write_json
from hf_nullspace.core.settings import check_numbers, check_output_dir
from hf_nullspace.explain.agreement import METHODS, Explanations, explain_change
from hf_nullspace.explain.grid import TITLES, correlation_text
from hf_nullspace.invisible.images import (
    Judge,
    closeness,
    difference,
    marked,
    read_image,
    side_by_side,
    strongest_invisible,
    write_png,
)
from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.preprocessing import rgb_image


@dataclass
class WatermarkArguments:
    """Which image, what it should look like, and to whom it should look as before."""

    _group_title: ClassVar[str] = "Watermark"

    model_name_or_path: str | None = option(None, "Hub id or folder of an image classifier.")
    model_revision: str | None = option(None, "Branch, tag or commit of the model.")
    image: str | None = option(None, "The image that is changed.")
    mark: str | None = option(None, "A mark to put on it, transparent where it is not.")
    target: str | None = option(None, "Instead: an image that it should look like.")
    output_dir: str = option("outputs/watermark", "Folder for the PNGs and the JSON.")
    strength: float = option(1.0, "Largest share of the wanted change to try, in (0, 1].")
    max_confidence_change: float = option(
        1.0, "Scale the change down until the confidence moves by no more, too; in [0, 1]."
    )
    iterations: int = option(500, "Steps of the solver, at most.")
    method: list[str] = option(list(METHODS), "How the images are explained: some of " + ", ".join(TITLES))
    explanation_picture: bool = option(False, "Write explanations.png, too.")
    seed: int = option(0, "Seed of the random noises that explanations are compared with.")

    def __post_init__(self) -> None:
        if self.model_name_or_path is None or self.image is None:
            raise UsageError("name the model and the image: --model_name_or_path M --image FILE")
        if (self.mark is None) == (self.target is None):
            raise UsageError("name what is wanted: either --mark FILE or --target FILE")
        ranges = {"strength": "(0, 1]", "max_confidence_change": "[0, 1]", "iterations": "int [1, inf)"}
        check_numbers(self, ranges | {"seed": "int [0, 4294967295]"})
        check_output_dir(self.output_dir)
        for name in self.method:
            if name not in TITLES:
                raise UsageError(f"method {name!r}: expected some of {', '.join(TITLES)}")


def main() -> None:
    (args,) = parse((WatermarkArguments,), str(__doc__))
    with only_run_in(args.output_dir):
        hide(args, Path(args.output_dir))


def hide(args: WatermarkArguments, output: Path) -> None:
    """Load, solve, check the saved file, keep."""
    # Load
    image, other = load_image(args.image), load_image(args.mark or args.target)
    where = args.model_name_or_path, args.model_revision
    model = load_model(*where).eval()
    judge = Judge.from_model(model, load_image_processor(*where))
    labels = [str(model.config.id2label[kind]) for kind in range(model.config.num_labels)]
    source = judge.fit(image)
    wish = judge.fit(other) if args.target else marked(source, other)
    sizes = [f"{Path(args.image).name} is {times(image.size)}"]
    sizes += [f"{Path(args.target).name} is {times(other.size)}"] if args.target else []
    print(f"{', '.join(sizes)}; the image processor leaves {times(source.size)} alone, so that is what is written")

    # Solve
    found = strongest_invisible(
        judge,
        source,
        wish,
        strength=args.strength,
        max_confidence_change=args.max_confidence_change,
        iterations=args.iterations,
    )

    # Write, read back, judge
    paths = write_png(source, output / "source.png"), write_png(found.image, output / "result.png")
    verdict = judge.compare(*paths)
    close = closeness(source, wish, found.image)
    explained = explain_change(judge, paths[0], wish, paths[1], methods=args.method, seed=args.seed)
    report: dict[str, Any] = {
        "command": asdict(args),
        "written_size": list(judge.written_size),
        "strength": found.strength,
        "labels": {name: labels[getattr(verdict, name)] for name in ("prediction_source", "prediction_result")},
        "verdict": asdict(verdict),
        "embedding_errors": found.embedding_errors | {"eight_bit": verdict.embedding_error},
        "kkt_residual": found.kkt_residual,
        "closeness": close,
        "explanations": explained.summary(),
        "nullspace_dimension": judge.nullspace.dimension(),
    }
    write_json(output / "watermark.json", report)
    side_by_side(
        [
            (f"source: {labels[verdict.prediction_source]} {verdict.confidence_source:.4f}", source),
            ("target" if args.target else "source and mark", wish),
            (f"result: {labels[verdict.prediction_result]} {verdict.confidence_result:.4f}", found.image),
            ("result - source (grey: 0)", difference(source, found.image)),
        ],
        output / "side_by_side.png",
    )
    if args.explanation_picture and explained.maps:
        explained.plot(judge, labels, output / "explanations.png")

    # Say
    errors = report["embedding_errors"]
    print(
        f"Prediction {'stays' if verdict.match else 'CHANGES:'} {labels[verdict.prediction_source]}"
        f"{'' if verdict.match else ' -> ' + labels[verdict.prediction_result]}, its confidence changes by "
        f"{verdict.confidence_change:.1e} (of {verdict.confidence_source:.4f}) at strength {found.strength:g}\n"
        f"Relative change of the embeddings: projection {errors['projection']:.1e}, clipped "
        f"{errors['projection_clipped']:.1e}; solved in [0, 1] {errors['box']:.1e}, 8-bit {errors['eight_bit']:.1e} "
        f"(nearest levels {errors['nearest_levels']:.1e})\n"
        f"{100 * close['reached']:.1f}% of the way to the wish (RMS distance {close['rms_source_to_wish']:.3f} -> "
        f"{close['rms_result_to_wish']:.3f})\n"
        f"{describe_explanations(explained)}\n"
        f"watermark.json and the pictures are in {output}"
    )


def load_image(name: str) -> Image.Image:
    """An image file; a mark's transparency is kept."""
    image = read_image(name)
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return image.convert("RGBA") if transparent else rgb_image(image)


def describe_explanations(found: Explanations) -> str:
    """One line per method, and the reason for what is missing."""
    lines = []
    for method, compared in found.correlations().items():
        others = (f"{name.replace('_', ' ')} {correlation_text(value)}" for name, value in compared.items())
        lines.append(f"Explanation by {TITLES[method]} against the source's: {', '.join(others)}")
    if found.not_explained:
        lines.append(f"{'Not by LRP' if lines else 'No explanation'}: {found.not_explained}")
    return "\n".join(lines)


def times(size: tuple[int, int]) -> str:
    """PIL's (width, height) as words."""
    return f"{size[0]} x {size[1]}"


if __name__ == "__main__":
    run(main)
