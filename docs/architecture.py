"""Draw the way of a batch through the code: one training step, one evaluation, one release, as they really run.

    python docs/architecture.py            writes docs/images/way_of_*.svg
    python docs/architecture.py --check    exit code 1 if a picture is not what the code does now

Every picture is a tree of calls, recorded while a tiny model runs: who calls whom in this package, in order, each pair
once. Small helpers (``core``, properties, what stands deeper than a reader wants to look) are left out.
"""

import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PACKAGE = ROOT / "src" / "hf_nullspace"
LEFT_OUT = (
    "core.files",
    "core.processes",
    "core.text",
    "core.s",
    "core.canvas",
    "training.cost",
    "models.frozen",
    "robustness.progress",
)
SMALL = {
    "unwrap",
    "config_of",
    "centre",
    "bank_file_name",
    "completed",
    "as_bools",
    "wilson",
    "readable",
    "portable",
    "within",
}
ROW, INDENT, FILES, WORDS, WIDTH = 22, 22, 470, 720, 1500


@dataclass
class Call:
    """A function, and what it calls, in the order of the first calls."""

    module: str
    name: str
    summary: str
    below: dict[tuple[str, str], "Call"] = field(default_factory=dict)

    def rows(self, depth: int, deepest: int) -> Iterator[tuple[int, "Call"]]:
        yield depth, self
        if depth < deepest:
            for call in self.below.values():
                yield from call.rows(depth + 1, deepest)


@contextmanager
def recorded(title: str) -> Iterator[Call]:
    """The calls of this package's functions inside the block."""
    root = Call("", title, "")
    stack: list[tuple[FrameType | None, Call]] = [(None, root)]
    seen: dict[CodeType, Call | None] = {}

    def describe(code: CodeType) -> Call | None:
        path = Path(code.co_filename)
        if PACKAGE not in path.parents or code.co_name.startswith("<"):
            return None
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.startswith(LEFT_OUT) or "<locals>" in code.co_qualname:
            return None
        owner, _, attribute = code.co_qualname.rpartition(".")
        if attribute in SMALL:
            return None
        if attribute.startswith("_") and owner != "NullspaceTrainer" and attribute not in ("__call__", "__getitem__"):
            return None
        if isinstance(vars(getattr(sys.modules[f"hf_nullspace.{module}"], owner, object)).get(attribute), property):
            return None
        first = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else ""
        return Call(module, code.co_qualname, inspect.cleandoc(first).split("\n")[0])

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in seen:
                seen[code] = describe(code)
            if (found := seen[code]) is not None:
                below = stack[-1][1].below
                stack.append(
                    (frame, below.setdefault((found.module, found.name), Call(found.module, found.name, found.summary)))
                )
        elif event == "return" and stack[-1][0] is frame:
            stack.pop()

    sys.setprofile(watch)
    try:
        yield root
    finally:
        sys.setprofile(None)


def drawing(root: Call, deepest: int) -> str:
    """The tree as an SVG."""
    rows = [row for call in root.below.values() for row in call.rows(0, deepest)]
    height = ROW * (len(rows) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="{ROW}" font-family="sans-serif" font-weight="bold">{escape(root.name)}</text>',
    ]
    last: dict[int, int] = {}
    for number, (depth, call) in enumerate(rows):
        y, x = ROW * (number + 2), 12 + INDENT * depth
        if depth:
            lines.append(f'<path d="M{x - 14} {last[depth - 1] + 6}V{y - 4}H{x - 4}" fill="none" stroke="#b8b8b8"/>')
        last[depth] = y
        lines.append(f'<text x="{x}" y="{y}" font-family="monospace">{escape(call.name)}</text>')
        place = f"{call.module.replace('.', '/')}.py"
        lines.append(f'<text x="{FILES}" y="{y}" font-family="monospace" fill="#1f5fa8">{escape(place)}</text>')
        lines.append(f'<text x="{WORDS}" y="{y}" font-family="sans-serif" fill="#606060">{escape(call.summary)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def training_step(folder: Path) -> str:
    """The first step of a round: a noise is learned, then the batch goes through the model as two views."""
    from hf_nullspace import NullspaceTrainer
    from tiny_models import tiny_model
    from tiny_training import Images, config

    args = config(folder, rounds=1, logging_steps=100, noise_stop_on="minibatch")
    trainer = NullspaceTrainer(tiny_model(), args, train_dataset=Images())
    step, trees = trainer.training_step, []

    def watched(*given: Any) -> Any:
        with recorded("One training step that begins a round") as tree:
            loss = step(*given)
        trees.append(tree)
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    return drawing(trees[0], deepest=6)


def evaluation(folder: Path) -> str:
    """Clean, corrupted and attacked images of one set, and the report of them."""
    import numpy as np

    from hf_nullspace.data.image_set import ArrayRows, ImageSet
    from hf_nullspace.models.preprocessing import Preprocessing
    from hf_nullspace.robustness.attacks.gradient import FGSM
    from hf_nullspace.robustness.pixel_model import PixelModel
    from hf_nullspace.robustness.report import write_report
    from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted, evaluate
    from tiny_models import tiny_model

    half = (0.5,) * 3
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    images = ImageSet(ArrayRows(noise, [0] * 8), Preprocessing(half, half, (16, 16), None), name="noise")
    model = PixelModel(tiny_model(), half, half)
    with recorded("One evaluation: clean, corrupted and attacked images, and the report") as tree:
        conditions = [Clean(), Corrupted("contrast", 3), Attacked(FGSM(1 / 255))]
        results = {"model": evaluate(model, images, conditions, batch_size=4, progress=False)}
        write_report(results, folder)
    return drawing(tree, deepest=3)


def release(folder: Path) -> str:
    """A finished run: what it lacks, its card, one commit, pulled back and compared."""
    from hf_nullspace import NullspaceTrainer
    from hf_nullspace.hub.recheck import what_is_missing
    from hf_nullspace.hub.release import push_and_verify, stage
    from hf_nullspace.models.preprocessing import make_image_processor
    from tiny_models import tiny_model
    from tiny_training import Images, config

    run, staged = folder / "run", folder / "staged"
    trainer = NullspaceTrainer(tiny_model(), config(run), train_dataset=Images())
    trainer.train()
    trainer.save_model()
    make_image_processor(16).save_pretrained(run)
    with recorded("One release: what the run lacks, the card, one commit, pulled back and compared") as tree:
        what_is_missing(run)
        stage(run, staged, "lab/name")
        push_and_verify(staged, "lab/name", private=None, repeat="the same call")
    return drawing(tree, deepest=3)


WAYS: dict[str, Callable[[Path], str]] = {"training_step": training_step, "evaluation": evaluation, "release": release}


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    from loopback_hub import TOKEN, LoopbackHub

    with tempfile.TemporaryDirectory() as name, LoopbackHub(Path(name) / "hub") as hub:
        os.environ |= hub.environment(Path(name) / "cache", TOKEN)  # before huggingface_hub is imported
        import torch

        torch.set_num_threads(1)
        old = []
        for way, draw in WAYS.items():
            path, text = IMAGES / f"way_of_{way}.svg", draw(Path(name) / way)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                old.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and old:
        sys.exit(f"error: {', '.join(old)}: not what the code does now; run python docs/architecture.py")


if __name__ == "__main__":
    main()
