"""Robustness sets, from a local folder or the Hub, with the labels and the preprocessing that their protocol fixes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from hf_nullspace.data.image_files import check_names, chosen_columns
from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.data.image_stream import Images, ImageStream
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.corruptions import CORRUPTIONS, SEVERITIES
from hf_nullspace.robustness.label_spaces import LabelError, check_wnids, class_indices, imagenet_labels, indices, wnids

SUFFIXES = {".jpeg", ".jpg", ".png"}


class MissingData(FileNotFoundError):
    """A set that is not there; the message says where it was looked for and how to get it."""


@dataclass(frozen=True)
class SetInfo:
    """What a protocol fixes about a set. ``layout``: "wnid", "numeric" or "val.txt" (a flat folder beside a list)."""

    name: str
    images: int
    page: str
    hub_id: str | None = None
    layout: str = "wnid"
    space: str = "imagenet-1k"
    resized: bool = False  # 224 px already: never resize or crop again

    @property
    def subset(self) -> list[int] | None:
        """The classes among which the answer is looked for, where they are not all 1,000."""
        return None if self.space == "imagenet-1k" else indices(self.space)


SETS = {
    info.name: info
    for info in (
        SetInfo("imagenet-1k", 50_000, "https://www.image-net.org", "timm/imagenet-1k-wds"),
        SetInfo(
            "imagenet-a", 7_500, "https://github.com/hendrycks/natural-adv-examples", "barkermrl/imagenet-a",
            space="imagenet-a",
        ),
        SetInfo(
            "imagenet-r", 30_000, "https://github.com/hendrycks/imagenet-r", "axiong/imagenet-r", space="imagenet-r"
        ),
        SetInfo("imagenet-v2", 10_000, "https://huggingface.co/datasets/vaishaal/ImageNetV2", layout="numeric"),
        SetInfo(
            "imagenet-sketch", 50_889, "https://github.com/HaohanWang/ImageNet-Sketch",
            "clip-benchmark/wds_imagenet_sketch",
        ),
        SetInfo("stylized-imagenet", 50_000, "https://github.com/rgeirhos/Stylized-ImageNet", resized=True),
        SetInfo("damagenet", 50_000, "http://www.pami.sjtu.edu.cn/Show/56/122", layout="val.txt", resized=True),
        *(
            SetInfo(f"imagenet-c/{c}/{s}", 50_000, "https://github.com/hendrycks/robustness", resized=True)
            for c in CORRUPTIONS
            for s in SEVERITIES
        ),
    )
}  # fmt: skip


def benchmark_preprocessing(preprocessing: Preprocessing, info: SetInfo) -> Preprocessing:
    """The protocol's geometry with the processor's mean and std: resize to 256 (in general size / 0.875), bicubic,
    centre crop; or nothing for sets that are 224 px already."""
    height, width = preprocessing.size
    if info.resized:
        if (height, width) != (224, 224):
            raise ValueError(f"{info.name} is 224x224 and must not be resized, but the model takes {height}x{width}")
        return replace(preprocessing, resize=None)
    return replace(preprocessing, resize=round(min(height, width) / 0.875), resample=Image.Resampling.BICUBIC)


def load_set(
    name: str,
    preprocessing: Preprocessing,
    *,
    data_root: str | Path | None = None,
    location: str | None = None,
    streaming: bool = False,
    label_order: str | None = None,
    allow_partial: bool = False,
) -> Images:
    """A set of ``SETS`` by name: from ``location`` (a folder or a Hub id), else from ``data_root / name``.

    Raises ``MissingData`` when it is not there, ``LabelError`` when its classes are not the set's, and ``ValueError``
    when it does not have the published number of images, unless ``allow_partial`` (which the result's protocol says).
    """
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; expected one of {', '.join(SETS)}")
    info = SETS[name]
    folder = Path(location) if location else Path(data_root or ".") / name
    if not folder.is_dir():
        if location is None or location.startswith((".", "/")):
            other = f"FOLDER or --location {name}={info.hub_id} (Hub id)" if info.hub_id else "FOLDER"
            raise MissingData(
                f"{name} is not at {folder.absolute()}. Get it from {info.page}, put it there, or say where it is: "
                f"--location {name}={other}"
            )
        return from_hub(info, location, preprocessing, streaming, label_order, allow_partial)
    rows = listed_rows(folder, name) if info.layout == "val.txt" else folder_rows(folder, info)
    note = partial_note(f"{name} at {folder}", len(rows), info.images, allow_partial)
    return image_set(info, rows.to_iterable_dataset() if streaming else rows, preprocessing, rows, note=note)


def partial_note(where: str, found: int, published: int, allow_partial: bool) -> str:
    """What the protocol says about a set with another number of images than published; "" where it is whole."""
    if found == published:
        return ""
    note = f"partial: {found} of {published} images"
    if not allow_partial:
        raise ValueError(f"{where} is {note}; complete it, or accept that with --allow_partial (the report says so)")
    return note


def image_set(
    info: SetInfo, rows: Any, preprocessing: Preprocessing, source: datasets.Dataset | str | None, **described: Any
) -> Images:
    described |= {"name": info.name, "subset": info.subset, "ready": info.resized}
    geometry = benchmark_preprocessing(preprocessing, info)
    if isinstance(rows, datasets.Dataset):
        return ImageSet(rows, geometry, **described)
    return ImageStream(rows, geometry, **described, expected=info.images, source=source)


def folder_rows(folder: Path, info: SetInfo) -> datasets.Dataset:
    """Rows of class folders, with ImageNet's class as the label.

    Not through the `imagefolder` builder: that takes splits from parts of file names, and ImageNet's own are called
    ILSVRC2012_val_00000001.JPEG.
    """
    names = sorted(child.name for child in folder.iterdir() if child.is_dir())
    if not names:
        raise MissingData(f"{info.name}: {folder} has no class folders; extract the archive there (see {info.page})")
    if info.layout == "numeric":  # "10" sorts before "2": the folder's name is the class, not its place
        wrong = [name for name in names if not (name.isdecimal() and int(name) < len(wnids()))]
        if wrong:
            raise LabelError(f"{folder}: {', '.join(wrong[:10])} are no classes of {info.name}: its folders are 0..999")
        classes = {name: int(name) for name in names}
    else:
        check_wnids(names, info.space, str(folder))
        classes = {name: class_indices()[name] for name in names}
    found = [(str(path), classes[name]) for name in names for path in images_in(folder / name)]
    if not found:
        raise MissingData(f"{info.name}: the class folders in {folder} hold no images (see {info.page})")
    return rows_of(found)


def images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def rows_of(found: list[tuple[str, int]]) -> datasets.Dataset:
    """Rows of (path, class); an image is decoded when its row is read."""
    check_names(path for path, _ in found)
    table = {"image": [path for path, _ in found], "label": [label for _, label in found]}
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())


def listed_rows(folder: Path, name: str) -> datasets.Dataset:
    """Images of a flat folder with the classes that ``val.txt`` gives: lines of "ILSVRC2012_val_00000001.JPEG 65".

    That list is Caffe's: its numbers 0 to 999 are ImageNet's classes by sorted wnid. The development kit of
    ILSVRC2012 numbers them otherwise, from 1 to 1000 (``ILSVRC2012_validation_ground_truth.txt``).
    """
    lists = [path for path in (folder / "val.txt", folder.parent / "val.txt") if path.is_file()]
    if not lists:
        raise MissingData(
            f"{name}: no val.txt in {folder} or beside it; it is part of Caffe's caffe_ilsvrc12.tar.gz "
            "(https://github.com/BVLC/caffe/blob/master/data/ilsvrc12/get_ilsvrc_aux.sh)"
        )
    classes = listed_classes(lists[0])
    images = images_in(folder)
    unknown = [path.name for path in images if path.stem not in classes]
    if unknown or not images:
        what = f"{', '.join(unknown[:5])} are not in {lists[0]}" if images else f"{folder} holds no images"
        raise LabelError(f"{name}: {what}")
    return rows_of([(str(path), classes[path.stem]) for path in images])


def listed_classes(path: Path) -> dict[str, int]:
    """Image's name without ending -> class, of a ``val.txt``. Raises ``LabelError`` for another kind of list."""
    classes = {}
    for place, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdecimal() or int(words[1]) >= len(wnids()):
            raise LabelError(
                f"{path}, line {place}: {line[:80]!r}; expected an image and its class, 0 to {len(wnids()) - 1} in the "
                "order of the sorted wnids, as in Caffe's val.txt (the development kit's 1 to 1000 have another order)"
            )
        classes[Path(words[0]).stem] = int(words[1])
    return classes


def from_hub(
    info: SetInfo,
    location: str,
    preprocessing: Preprocessing,
    streaming: bool,
    label_order: str | None,
    allow_partial: bool,
) -> Images:
    """A Hub data set with an image and a label column; its class names (wnids or names) decide, never their order.

    Integer labels without names are ImageNet's class indices only if ``label_order="imagenet"`` says so. A stream's
    number of images is known, and compared, only after it was read (``suite.protocol``).
    """
    commit = commit_of(location)  # all of it from one commit, whatever is pushed meanwhile
    splits = datasets.get_dataset_split_names(location, revision=commit)
    split = next((s for s in ("validation", "val", "test", "train") if s in splits), splits[0])
    rows = datasets.load_dataset(location, split=split, streaming=streaming, revision=commit)
    features = rows.features or {}  # a stream may not know them
    image = next((column for column, f in features.items() if isinstance(f, datasets.Image)), None)
    label = next((c for c in ("label", "labels", "cls", "wnid") if c in features), None)
    names = features[label].names if label and isinstance(features[label], datasets.ClassLabel) else None
    if image is None:
        raise LabelError(f"{location} has no image column that `datasets` knows ({features}); download it instead")
    if label is None or (names is None and label_order != "imagenet"):
        raise LabelError(
            f"{location} has no named classes ({features}). Download it and give the folder, or, if its numbers "
            "are ImageNet's class indices, say so: label_order='imagenet'"
        )
    labels = None if names is None else imagenet_labels(names, location)
    if info.subset is not None and labels is not None:
        check_wnids([wnids()[index] for index in labels], info.space, location)
    rows = chosen_columns(rows, {image: "image", label: "label"})
    if not streaming and names is None and (largest := max(rows["label"], default=0)) >= len(wnids()):
        raise LabelError(f"{location} has label {largest}; ImageNet's class indices are 0 to {len(wnids()) - 1}")
    note = "" if streaming else partial_note(f"{info.name} at {location}", len(rows), info.images, allow_partial)
    origin = f"{location}, split {split}, commit {commit or 'not known (offline)'}"
    return image_set(info, rows, preprocessing, commit, remap=labels, note=note, origin=origin)


def commit_of(location: str) -> str | None:
    """The commit that a Hub data set is at; ``None`` offline."""
    try:
        return HfApi().dataset_info(location).sha
    except OfflineModeIsEnabled:
        return None


CIFAR10_C_IMAGES = 10_000  # of each severity


def load_cifar10_c(
    folder: str | Path, corruption: str, severity: int, preprocessing: Preprocessing, *, allow_partial: bool = False
) -> ImageSet:
    """CIFAR-10-C from its published .npy files: 10,000 images per severity, one after the other, and labels.npy."""
    folder = Path(folder)
    for name in (f"{corruption}.npy", "labels.npy"):
        if not (folder / name).is_file():
            raise MissingData(f"CIFAR-10-C: {name} is not in {folder}. Get it from https://zenodo.org/records/2535967")
    images, labels = np.load(folder / f"{corruption}.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    shaped = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
    if not shaped or len(images) != len(labels) or len(images) % len(SEVERITIES):
        raise ValueError(
            f"CIFAR-10-C: {corruption}.npy is {images.dtype} {images.shape} with {len(labels)} labels; expected uint8 "
            "(5 n, 32, 32, 3) and as many labels"
        )
    n = len(images) // len(SEVERITIES)
    part = slice((severity - 1) * n, severity * n)
    name = f"cifar10-c/{corruption}/{severity}"
    note = partial_note(name, n, CIFAR10_C_IMAGES, allow_partial)
    return ImageSet(ArrayRows(images[part], labels[part]), preprocessing, name=name, note=note)
