"""How invisible are watermarked and targeted images? Pairs of images of a data set, judged as 8-bit files.

    python benchmarks/invisible_images.py --model M --dataset D            (100 pairs, about 4 minutes on one core)
    python benchmarks/invisible_images.py --model M --dataset D --pairs 3 --pictures outputs/invisible

For every pair, two images of different classes: the first is made to look like the second (A.8), and gets a mark that
this script draws (A.7). Each is solved at full strength, written, read back and judged: does the prediction stay, how
far does the confidence move, how far the embedding at every stage, and do the explanations agree. Beside it stand the
wish itself, and equation 13 as it is: projected, clipped, rounded. Where the prediction changes, and for the first
--search_pairs pairs until the confidence moves by at most 1e-4 (the paper's number), the strength is searched.
--output FILE keeps the summary and the single values as JSON.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import circumstances, settings_of
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_nullspace.core.files import write_json
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.explain.agreement import Explanations, explain_change
from hf_nullspace.invisible.images import (
    Judge,
    closeness,
    difference,
    image_of,
    make_invisible,
    marked,
    pixels_of,
    side_by_side,
    strongest_invisible,
    write_png,
)
from hf_nullspace.robustness.scores import wilson

COMMAND = "python benchmarks/invisible_images.py --model M --dataset D"
PAPERS_CHANGE = 1e-4  # of the confidence, A.7 and A.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of an image classifier")
    parser.add_argument("--dataset", required=True, help="Hub id or folder")
    parser.add_argument("--split", default="test")
    for name, default in [("pairs", 100), ("search_pairs", 30), ("iterations", 500), ("seed", 0)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pictures", type=Path, help="folder for the files and pictures of every pair")
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results has those of the documents")
    args = parser.parse_args()
    start = time.perf_counter()
    model = AutoModelForImageClassification.from_pretrained(args.model).eval()
    judge = Judge.from_model(model, AutoImageProcessor.from_pretrained(args.model, backend="pil"))
    names = [str(name) for _, name in sorted(model.config.id2label.items())]
    found: dict[str, list[dict[str, Any]]] = {"target": [], "mark": []}
    with tempfile.TemporaryDirectory() as temporary:
        for index, (source, target) in enumerate(pairs(args, judge)):
            for kind, wish in (("target", target), ("mark", marked(source, drawn_mark()))):
                folder = (args.pictures or Path(temporary)) / f"{kind}-{index}"
                found[kind].append(one(judge, source, wish, folder, names, search=index < args.search_pairs, args=args))
    summary = {kind: summarise(rows) for kind, rows in found.items()}
    for kind, numbers in summary.items():
        print(f"{kind}, {args.pairs} pairs")
        for name, value in numbers.items():
            print(f"  {name:52s} {describe(value)}")
    if args.output:
        columns = {kind: single_values(rows) for kind, rows in found.items()}
        keep(args, {"summary": summary, "pairs": columns, "seconds": time.perf_counter() - start,
                    "nullspace_dimension": judge.nullspace.dimension()})  # fmt: skip


def pairs(args: argparse.Namespace, judge: Judge) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Images of different classes, in the judge's written size; every image at most once."""
    rows = load_image_dataset(args.dataset, args.split)
    labels = rows["label"]
    order = iter(np.random.default_rng(args.seed).permutation(len(rows)).tolist())
    waiting: list[int] = []
    for _ in range(args.pairs):
        first = waiting.pop(0) if waiting else next(order)
        while labels[second := next(order)] == labels[first]:
            waiting.append(second)
        yield judge.fit(rows[first]["image"]), judge.fit(rows[second]["image"])


def drawn_mark() -> Image.Image:
    """White letters with a black edge on nothing."""
    mark = Image.new("RGBA", (96, 96))
    font = ImageFont.load_default(size=64)
    ImageDraw.Draw(mark).text(
        (48, 48), "NS", (255, 255, 255, 255), font, "mm", stroke_width=4, stroke_fill=(0, 0, 0, 255)
    )
    return mark


def one(
    judge: Judge, source: Image.Image, wish: Image.Image, folder: Path, names: Sequence[str], *, search: bool,
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of one source and one wish."""
    began = time.perf_counter()
    result = make_invisible(judge, source, wish, iterations=args.iterations)
    seconds = time.perf_counter() - began
    files = write_png(source, folder / "source.png"), write_png(result.image, folder / "result.png")
    write_png(wish, folder / "wish.png")
    verdict = judge.compare(*files)
    explained = explain_change(
        judge, files[0], wish, files[1], methods=("raw", "rollout", "grad_cam", "generic", "lrp")
    )
    strength = 1.0 if verdict.match else strongest_invisible(judge, source, wish, iterations=args.iterations).strength
    row: dict[str, Any] = asdict(verdict) | {
        "wish": asdict(judge.compare(source, wish)),
        "projected_clipped_rounded": asdict(judge.compare(source, projected(judge, source, wish))),
        "embedding_errors": result.embedding_errors,
        "kkt_residual": result.kkt_residual,
        "closeness": closeness(source, wish, result.image),
        "strength_that_keeps_the_prediction": strength,
        "strength_at_the_papers_change": None,
        "explanations": explained.correlations(),
        "seconds": seconds,
    }
    if search:
        strongest = strongest_invisible(
            judge, source, wish, max_confidence_change=PAPERS_CHANGE, iterations=args.iterations
        )
        row["strength_at_the_papers_change"] = strongest.strength
    if args.pictures:
        draw(judge, folder, names, source, wish, result.image, explained)
    return row


def projected(judge: Judge, source: Image.Image, wish: Image.Image) -> Image.Image:
    """Equation 13 and nothing else, as an image: the change is projected, the sum clipped and rounded."""
    pixels = pixels_of(wish)
    start = judge.window(pixels_of(source))[None]
    judge.window(pixels).copy_((start + judge.nullspace.project(judge.window(pixels)[None] - start))[0])
    return image_of(pixels)


def draw(
    judge: Judge, folder: Path, names: Sequence[str], source: Image.Image, wish: Image.Image, result: Image.Image,
    explained: Explanations,
) -> None:  # fmt: skip
    kinds, confidences = explained.predictions, explained.confidences
    titles = [
        f"{what}: {names[kind]} {confidence:.4f}"
        for what, kind, confidence in zip(("source", "result", "wish"), kinds, confidences, strict=False)
    ]
    shown = [(titles[0], source), (titles[2], wish), (titles[1], result)]
    side_by_side([*shown, ("result - source (grey: 0)", difference(source, result))], folder / "side_by_side.png")
    explained.plot(judge, names, folder / "explanations.png")


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares with Wilson's interval; of everything else median, smallest and largest, over the pairs."""

    def matches(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"count": sum(each["match"] for each in verdicts), "of": len(verdicts),
                **asdict(wilson(sum(each["match"] for each in verdicts), len(verdicts)))}  # fmt: skip

    def values(read: Any) -> dict[str, Any]:
        numbers = [number for row in rows if (number := read(row)) is not None]
        if not numbers:
            return {"n": 0}
        return {
            "n": len(numbers),
            "median": statistics.median(numbers),
            "lowest": min(numbers),
            "highest": max(numbers),
        }

    found: dict[str, Any] = {"prediction stays": matches(rows)}
    found["prediction stays, projected, clipped, rounded"] = matches([row["projected_clipped_rounded"] for row in rows])
    found["prediction stays for the wish itself"] = matches([row["wish"] for row in rows])
    found["change of confidence"] = values(lambda row: row["confidence_change"])
    found["... projected, clipped, rounded"] = values(lambda row: row["projected_clipped_rounded"]["confidence_change"])
    found["... of the wish itself"] = values(lambda row: row["wish"]["confidence_change"])
    for stage in rows[0]["embedding_errors"]:
        found[f"embedding error, {stage}"] = values(lambda row, stage=stage: row["embedding_errors"][stage])
    found["embedding error, eight_bit"] = values(lambda row: row["embedding_error"])
    found["embedding error of the wish"] = values(lambda row: row["wish"]["embedding_error"])
    found["way to the wish"] = values(lambda row: row["closeness"]["reached"])
    found["strength that keeps the prediction"] = values(lambda row: row["strength_that_keeps_the_prediction"])
    found["strength at a change of 1e-4"] = values(lambda row: row["strength_at_the_papers_change"])
    for method, compared in rows[0]["explanations"].items():
        for name in compared:
            found[f"r, {method}, {name}"] = values(
                lambda row, method=method, name=name: row["explanations"].get(method, {}).get(name)
            )
    found["seconds per image"] = values(lambda row: row["seconds"])
    return found


def describe(value: dict[str, Any]) -> str:
    if "of" in value:
        return f"{value['count']} of {value['of']} [{value['low']:.1%}, {value['high']:.1%}]"
    if not value["n"]:
        return "not measured"
    return f"{value['median']:.3g} [{value['lowest']:.3g}, {value['highest']:.3g}] n={value['n']}"


def single_values(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The most important numbers of every pair, to four digits."""
    names = ("match", "confidence_source", "confidence_change", "embedding_error", "strength_that_keeps_the_prediction",
             "strength_at_the_papers_change")  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in names}
    columns["way to the wish"] = [row["closeness"]["reached"] for row in rows]
    for method in rows[0]["explanations"]:
        columns[f"r, {method}, result"] = [row["explanations"][method]["result"] for row in rows]
    return {name: [float(f"{each:.4g}") if isinstance(each, float) else each for each in column]
            for name, column in columns.items()}  # fmt: skip


def keep(args: argparse.Namespace, found: dict[str, Any]) -> None:
    command = f"{COMMAND} --pairs {args.pairs} --search_pairs {args.search_pairs} --seed {args.seed}"
    settings = settings_of(args, "pictures", "output")
    result = {"command": command, **circumstances(), "settings": settings, **found}
    print(f"written: {write_json(args.output, result)}")


if __name__ == "__main__":
    main()
