"""Finished results on disk, found again only if nothing that they depend on has changed; conditions, and others."""

import base64
import hashlib
import itertools
import json
import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from hf_nullspace.core.files import DamagedFileError, read_json, write_json, write_whole
from hf_nullspace.core.processes import rank_and_world_size
from hf_nullspace.data.image_stream import Images, ImageStream
from hf_nullspace.robustness.pixel_model import PixelModel, model_fingerprint
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.suite import Attacked, Condition, ConditionResult, evaluate

logger = logging.getLogger(__name__)

FORMAT = 3  # another one where the same protocol would give other numbers
LIBRARIES = ("hf-nullspace", "torch", "transformers", "datasets", "accelerate", "numpy", "pillow")


def record(result: ConditionResult) -> dict[str, Any]:
    """What results.json says about one condition; scores in [0, 1]."""
    score = result.score
    entry = {
        "condition": result.condition,
        "protocol": result.protocol,
        "n": result.n,
        "correct": int(result.correct.sum()),
        "score": score.value,
        "interval": [score.low, score.high],
        "seconds": round(result.seconds, 3),
        "seed": result.seed,
        "correct_bits": bits(result.correct),
    }
    if result.correct_all is not None:
        entry |= {"score_all_classes": float(result.correct_all.mean()), "correct_all_bits": bits(result.correct_all)}
    return entry


def result_from_record(entry: Mapping[str, Any]) -> ConditionResult:
    """The inverse of ``record``; raises ``ValueError`` for a damaged one."""
    correct = from_bits(entry["correct_bits"], entry["n"])
    if int(correct.sum()) != entry["correct"]:
        raise ValueError(f"damaged record of {entry['condition']!r}: its bits say {int(correct.sum())} correct")
    every = entry.get("correct_all_bits")
    return ConditionResult(
        condition=entry["condition"],
        correct=correct,
        seconds=entry["seconds"],
        seed=entry["seed"],
        protocol=entry["protocol"],
        correct_all=None if every is None else from_bits(every, entry["n"]),
    )


def bits(values: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(values).tobytes()).decode()


def from_bits(text: str, n: int) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n).astype(bool)


class Records:
    """Finished results, one JSON file each: a result is made once, and again if anything that it depends on changes."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @staticmethod
    def key(*, sort_keys: bool = True, **depends_on: Any) -> str:
        """A name for a result: a hash of everything it depends on (fingerprints, condition, protocol, seed, dtype).

        ``sort_keys=False``: the order of the arguments counts.
        """
        text = json.dumps({"format": FORMAT, **depends_on}, sort_keys=sort_keys, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def read(self, name: str, parse: Callable[[Any], Any] = lambda entry: entry) -> Any:
        """What ``parse`` makes of the file ``name``, or None if there is none, or a damaged one, which is logged.

        The main process reads it for all, so that no process goes another way.
        """
        found: list[Any] = [None]
        rank, world = rank_and_world_size()
        path = self.folder / f"{name}.json"
        if rank == 0 and path.is_file():
            try:
                found = [parse(read_json(path))]
            except (ValueError, KeyError, TypeError) as error:
                is_named = isinstance(error, DamagedFileError)
                problem = error if is_named else f"{path} is damaged ({type(error).__name__}: {error})"
                logger.warning("%s; it is made again", problem)
        if world > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def write(self, name: str, entry: Any) -> None:
        """Keep what JSON can hold; of a mapping every later change is noticed."""
        if rank_and_world_size()[0] == 0:
            write_json(self.folder / f"{name}.json", entry, sealed=isinstance(entry, Mapping))

    def kept(self, make: Callable[[], Any], **depends_on: Any) -> Any:
        """What ``make()`` returned in this or an earlier run, as JSON gives it back."""
        key = self.key(**depends_on)
        if (found := self.read(key)) is None:
            self.write(key, make())
            found = self.read(key)
        return found

    def others(self, keys: Iterable[str]) -> int:
        """How many records belong to another checkpoint, protocol, data set or seed; they are never mixed in."""
        known = set(keys)
        return sum(p.stem not in known for p in self.folder.glob("*.json") if not p.stem.startswith("checks-"))


def images_fingerprint(images: Images, *, sample: int = 64) -> str:
    """A hash of the number of images, labels, geometry, its ``content_digest``, and the pixels of ``sample`` images.

    Of a stream the first ``sample`` images count: it would have to be read once more otherwise.
    """
    digest = hashlib.sha256(json.dumps(images.protocol(), sort_keys=True, default=str).encode())
    digest.update(repr(images.subset).encode())
    if not isinstance(images, ImageStream):
        n = len(images)
        digest.update(repr([n, [images.label(index) for index in range(n)]]).encode())
    digest.update(images.content_digest().encode())
    for image, label in some_of(images, sample):
        digest.update(f"{label} {image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def some_of(images: Images, count: int) -> list[tuple[Image.Image, int]]:
    """At most ``count`` evenly spaced images with their labels; of a stream the first."""
    if isinstance(images, ImageStream):
        return list(itertools.islice(images.pairs(), count))
    few = images.part(count)
    return [(few.raw_image(index), few.label(index)) for index in range(len(few))]


def evaluate_resumably(
    records: Records,
    model: PixelModel,
    images: Images,
    conditions: Mapping[str, Condition],
    *,
    batch_size: int,
    seed: int,
    dtype: str,
    workers: int = 0,
    samples: Path | None = None,
    fingerprint: str | None = None,
    progress: Progress | bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, ConditionResult], list[str]]:
    """``suite.evaluate`` for conditions by title, each kept as soon as it is finished, none measured twice.

    Returns the results by title, in the order asked for, and the keys of their records. ``dtype`` names what the
    forwards compute in. With ``samples`` (a folder) every condition is measured, and its label, prediction and
    confidence per image are written there as parquet. ``fingerprint`` is the model's where the caller knows it.
    """
    fingerprints = {"model": fingerprint or model_fingerprint(model), "images": images_fingerprint(images)}
    usual: dict[str, Any] = fingerprints | {"seed": seed, "dtype": dtype, "written": images.modification_stamp()}
    keys = {
        title: records.key(**usual, title=title, condition=repr(condition), **batch_settings(condition, batch_size))
        for title, condition in conditions.items()
    }
    known = {} if samples else {title: records.read(key, result_from_record) for title, key in keys.items()}
    found = {title: result for title, result in known.items() if result is not None}
    if found:
        say(f"{len(found)} of {len(conditions)} conditions were finished before: {', '.join(found)}")
    titles = {str(condition): title for title, condition in conditions.items()}

    def keep(result: ConditionResult) -> None:
        title = titles[result.condition]
        protocol = result.protocol | {"fingerprints": fingerprints, "dtype": dtype, "versions": versions()}
        protocol |= batch_settings(conditions[title], batch_size)
        if samples is not None and rank_and_world_size()[0] == 0:
            write_samples(result, samples / f"{keys[title]}.parquet", title)
        found[title] = replace(result, condition=title, protocol=protocol, samples=None)
        records.write(keys[title], record(found[title]))

    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "workers": workers, "progress": progress}
    if left := [condition for title, condition in conditions.items() if title not in found]:
        evaluate(model, images, left, per_sample=samples is not None, on_result=keep, **options)
    return {title: found[title] for title in conditions}, list(keys.values())


def batch_settings(condition: Condition, batch_size: int) -> dict[str, Any]:
    """What a result depends on only if its attack is not independent of the batch: batch size and processes."""
    if isinstance(condition, Attacked) and condition.attack.batch_dependent:
        return {"batch_size": batch_size, "processes": rank_and_world_size()[1]}
    return {}


def write_samples(result: ConditionResult, path: Path, title: str) -> None:
    """One row per image; the condition's title is in the file's metadata."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"correct": result.correct, **(result.samples or {})})
    table = table.replace_schema_metadata({"condition": title})
    write_whole(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))


def versions() -> dict[str, str]:
    """Python's and the libraries' that a number may depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # run from a source tree
            found[library] = "not installed"
    return found
