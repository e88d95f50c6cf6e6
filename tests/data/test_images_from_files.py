"""Images and labels as they lie in files: streamed or not they are the same, and what is broken is named."""

import io
import itertools
import os
import re
import struct
import tarfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.data.image_files import CorruptImageError, DataError, decoded_image, encoded_bytes, undecoded
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.data.image_stream import ImageStream
from hf_nullspace.data.label_maps import align_labels
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.robustness.label_spaces import wnids
from hf_nullspace.robustness.records import images_fingerprint
from hf_nullspace.robustness.sets import load_set
from hf_nullspace.training.loading import (
    Classifier,
    DataArguments,
    evaluation_images,
    load_rows,
    training_images,
)

NAMES = ["ant", "bee", "cat"]


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def in_file(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def files():
    """Name -> bytes: noise, which a second JPEG compression would change, in all kinds of files."""
    rgb = Image.fromarray(noise(0, 40, 50, 3))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "0.jpg": in_file(rgb, "JPEG", quality=75),
        "1.jpg": in_file(rgb.convert("L"), "JPEG", quality=75),
        "2.jpg": in_file(Image.fromarray(noise(1, 40, 50, 4), "CMYK"), "JPEG", quality=75),
        "3.jpg": in_file(Image.fromarray(noise(2, 40, 50, 3)), "JPEG", quality=75, exif=turned),
        "4.png": in_file(Image.fromarray(noise(3, 40, 50, 3)), "PNG"),
        "5.png": in_file(Image.fromarray(noise(4, 40, 50, 2).view(np.uint16)[..., 0]), "PNG"),
        "6.png": in_file(rgb.quantize(8), "PNG"),
    }


FILES = files()
LABELS = dict(zip(FILES, [0, 1, 2, 0, 1, 2, 0], strict=True))
JPEGS = {name: content for name, content in FILES.items() if name.endswith("jpg")}


def class_folders(folder):
    for name, content in FILES.items():
        path = folder / "train" / NAMES[LABELS[name]] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def table(labels=None, feature=None, **names):
    labels = labels or list(LABELS.values())
    images = [{"bytes": content, "path": name} for name, content in FILES.items()]
    columns = {"image": ImageFeature(), "label": feature or ClassLabel(names=NAMES), "width": Value("int64")}
    rows = {"image": images, "label": labels, "width": [50] * len(images)}
    rows = datasets.Dataset.from_dict(rows, features=Features(columns), split=datasets.NamedSplit("train"))
    return rows.rename_columns(names)


def parquet(folder):
    folder.mkdir(parents=True, exist_ok=True)
    table(image="picture", label="kind").to_parquet(folder / "train-00000-of-00001.parquet")


def text_labels(folder):
    folder.mkdir()
    table([NAMES[label] for label in LABELS.values()], Value("string")).to_parquet(
        folder / "train-00000-of-00001.parquet"
    )


def saved(folder):
    table(image="img").save_to_disk(str(folder))


def webdataset(folder):
    folder.mkdir()
    with tarfile.open(folder / "train-000.tar", "w") as shard:
        for name, content in JPEGS.items():  # all examples of a shard must have the same endings
            for path, data in ((name, content), (f"{name[0]}.cls", str(LABELS[name]).encode())):
                entry = tarfile.TarInfo(path)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))


def paths(folder):
    class_folders(folder / "files")
    rows = [f"{path},{LABELS[path.name]}" for path in sorted((folder / "files").rglob("*.*g"))]
    (folder / "train.csv").write_text("\n".join(["picture,label", *rows]) + "\n")


def classifier():
    config = ViTConfig(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=0, num_attention_heads=1)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    processor = make_image_processor(16)
    labels = align_labels(NAMES, config)
    return Classifier(ViTForImageClassification(config), processor, Preprocessing.from_processor(processor), labels)


def encoded(rows):
    """Sorted (bytes, label) of all rows; from the file where a row has its path."""
    rows = undecoded(rows)
    return sorted((encoded_bytes(row["image"]), row["label"]) for row in rows)


def check(rows, stream, files=FILES):
    assert encoded(rows) == encoded(stream) == sorted((content, LABELS[name]) for name, content in files.items())
    for row, streamed in zip(rows, stream, strict=True):
        assert row["label"] == streamed["label"]
        assert np.array_equal(np.asarray(row["image"]), np.asarray(streamed["image"]))
    args, model = DataArguments(crop_scale=1, horizontal_flip=False, shuffle_buffer=0), classifier()
    plain = training_images(args, rows, model, seed=0)
    endless = iter(training_images(args, stream, model, seed=0))
    held, whole = (evaluation_images(each, model, len(files)) for each in (stream, rows))
    for index in range(len(files)):
        item, streamed = plain[index], next(endless)
        assert item["labels"] == streamed["labels"] == held[index]["labels"]
        assert torch.equal(item["pixel_values"], streamed["pixel_values"])
        assert torch.equal(item["pixel_values"], held[index]["pixel_values"])
        assert held.raw_image(index).tobytes() == whole.raw_image(index).tobytes()


@pytest.mark.parametrize("write", [class_folders, parquet, text_labels, saved, webdataset])
def test_a_stream_of_local_files_keeps_the_bytes(write, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "set")
    for name in FILES if write is not webdataset else ():  # a row's path is a name, `datasets` looks here for it
        (tmp_path / name).write_bytes(b"another file of that name")
    monkeypatch.chdir(tmp_path)
    names = NAMES if write is text_labels else None
    check(
        *(load_image_dataset(tmp_path / "set", streaming=s, class_names=names) for s in (False, True)),
        files=JPEGS if write is webdataset else FILES,
    )


@pytest.mark.parametrize("write", [class_folders, parquet])
def test_a_stream_from_the_hub_keeps_the_bytes(write, tmp_path, hub_here):
    write(tmp_path / "hub" / "datasets" / "someone" / "pictures")
    args = DataArguments(dataset_name="someone/pictures")
    check(*(load_rows(args, "train", streaming=s) for s in (False, True)))


def test_a_robustness_set_from_the_hub_keeps_the_bytes_and_maps_the_labels(tmp_path, hub_here):
    backwards = list(wnids("imagenet-a"))[::-1]
    folder = tmp_path / "hub" / "datasets" / "someone" / "adversarial"
    folder.mkdir(parents=True)
    feature = ClassLabel(names=backwards)
    table(feature=feature, image="jpg", label="cls").to_parquet(folder / "test-00000-of-00001.parquet")

    def load(name="imagenet-a", allow_partial=True, **options):
        known = {"location": "someone/adversarial", "allow_partial": allow_partial}
        return load_set(name, classifier().preprocessing, **known, **options)

    whole, stream = load(), load(streaming=True)
    streamed = list(stream.pairs())
    assert len(streamed) == len(whole) == len(FILES)
    assert [wnids()[label] for _, label in streamed] == [backwards[label] for label in LABELS.values()]
    for images in (whole, stream):
        assert re.fullmatch("someone/adversarial, split test, commit [0-9a-f]{40}", images.protocol()["from"])
    assert whole.protocol()["note"] == "partial: 7 of 7500 images"
    with pytest.raises(ValueError, match="is partial: 7 of 7500 images; complete it"):
        load(allow_partial=False)
    with pytest.raises(ValueError, match="do not belong to imagenet-r"):
        load("imagenet-r")
    for index, (image, label) in enumerate(streamed):
        assert label == whole.label(index)
        assert image.tobytes() == whole.raw_image(index).tobytes()
        assert image.tobytes() == decoded_image({"bytes": list(FILES.values())[index], "path": None}, "").tobytes()


# Corrupt images


def png_of_size(width, height):
    """A PNG that says it is so large; nothing is behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    signature, length, check = b"\x89PNG\r\n\x1a\n", struct.pack(">I", 13), struct.pack(">I", zlib.crc32(chunk))
    return signature + length + chunk + check + b"\0\0\0\x10IDAT"


BROKEN = {
    "truncated": (FILES["0.jpg"][:-300], "cannot be decoded: OSError: .*truncated"),
    "text": (b"no image", "cannot be decoded: UnidentifiedImageError"),
    "empty": (b"", "cannot be decoded: UnidentifiedImageError"),
    "12,000 x 12,000": (png_of_size(12_000, 12_000), r"is too large: Image size \(144000000 pixels\) exceeds limit"),
    "bomb": (png_of_size(50_000, 50_000), r"is too large: Image size \(2500000000 pixels\) exceeds limit"),
    "none": (None, "has no image. Remove the row"),
}


def broken_table(content, split="train"):
    """Three images, the middle one broken."""
    images = [{"bytes": data, "path": "1.jpg"} for data in (FILES["0.jpg"], content, FILES["4.png"])]
    images[1] = images[1] if content is not None else None
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1, 2]}, features=features, split=datasets.NamedSplit(split)
    )


def rows_of(folder, content, streaming, split):
    """From a parquet file with names of its own for the columns."""
    folder.mkdir()
    rows = broken_table(content, split).rename_columns({"image": "picture", "label": "kind"})
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return load_image_dataset(folder, split, streaming=streaming)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["truncated", "12,000 x 12,000", "none"])
def test_a_corrupt_image_is_named_in_training_and_measuring(kind, streaming, tmp_path, own_cache, caplog):
    content, message = BROKEN[kind]
    of = "of the stream of split 'train'" if streaming else "of split 'train'"
    file = "" if content is None else r" \(1\.jpg\)"
    rows = rows_of(tmp_path / "set", content, streaming, "train")
    exact = {"crop_scale": 1, "horizontal_flip": False, "shuffle_buffer": 0}

    def three(args):
        return [item["labels"] for item in itertools.islice(training_images(args, rows, classifier(), 0), 3)]

    with pytest.raises(CorruptImageError, match=f"^Row 1 {of}{file} {message}.*--skip_corrupt_images true") as caught:
        three(DataArguments(**exact))
    assert "\n" not in str(caught.value)
    with caplog.at_level("WARNING", "hf_nullspace"):
        assert three(DataArguments(**exact, skip_corrupt_images=True)) == ([0, 2, 0] if streaming else [0, 2, 2])
    said = [record.getMessage() for record in caplog.records]
    assert re.search(f"^Row 1 {of}{file} {message}", said[0])
    assert "skip" not in said[0]  # that was asked for
    assert len(said) == 1
    # To measure on: the row of the split, and no image twice
    with pytest.raises(CorruptImageError, match=f"^Row 1 of split 'train'{file} {message}"):
        list(evaluation_images(rows, classifier(), 3))
    caplog.clear()
    with caplog.at_level("WARNING", "hf_nullspace"):
        measured = evaluation_images(rows, classifier(), 3, skip_corrupt=True)
    assert [item["labels"] for item in measured] == [0, 2]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert re.search(f"^Row 1 of split 'train'{file} {message}.* It is left out", warning)
    assert "skip" not in warning


@pytest.mark.parametrize("kind", BROKEN)
def test_a_corrupt_image_is_named_in_a_robustness_set(kind):
    content, message = BROKEN[kind]
    rows = broken_table(content)
    with pytest.raises(CorruptImageError, match=rf"^Row 1 of own, test.* {message}") as caught:
        ImageSet(rows, classifier().preprocessing, name="own, test").raw_image(1)
    assert "skip" not in str(caught.value)  # evaluate_robustness has no such option
    beyond = ImageSet(concatenate_datasets([rows] * 30), classifier().preprocessing, name="own, test")
    assert images_fingerprint(beyond, sample=2)  # the row's fault is not the fingerprint's
    assert beyond.modification_stamp()
    with pytest.raises(CorruptImageError, match=rf"^Row 1 of the stream of own, test.* {message}"):
        list(ImageStream(rows.to_iterable_dataset(), classifier().preprocessing, name="own, test").pairs())


def test_nothing_to_measure_on_is_said():
    rows = broken_table(b"no image").select([1])
    with pytest.raises(CorruptImageError, match="None of the 1 images of split 'train' can be decoded"):
        evaluation_images(rows, classifier(), None, skip_corrupt=True)


def test_a_lost_connection_is_no_corrupt_image(tmp_path, hub_here):
    """Else a network that fails would leave images out of a run that skips corrupt ones."""
    class_folders(tmp_path / "hub" / "datasets" / "someone" / "pictures")
    rows = load_rows(DataArguments(dataset_name="someone/pictures"), "train", streaming=True)
    skipping = DataArguments(skip_corrupt_images=True)
    images = training_images(skipping, rows, classifier(), 0)
    hub_here.fail(r"GET .*/resolve/.*", times=100, status=403)
    with pytest.raises(DataError, match=r"^Row 0 .* \(hf://.*\) cannot be read: .* Check the connection") as caught:
        next(iter(images))
    assert not isinstance(caught.value, CorruptImageError)


# Names and labels


def test_a_file_name_that_is_no_utf_8_is_named(tmp_path):
    for folder in (tmp_path / "own" / "cat", tmp_path / "imagenet-v2" / "0"):
        folder.mkdir(parents=True)
        Path(os.fsdecode(os.fsencode(folder) + b"/\xffa.png")).write_bytes(FILES["4.png"])
    message = r"/\\udcffa\.png: the name of this file or folder is no UTF-8\. Rename it"
    with pytest.raises(DataError, match=message):
        load_image_dataset(tmp_path / "own")
    with pytest.raises(DataError, match=message):
        load_set("imagenet-v2", classifier().preprocessing, data_root=tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("label", "type_name"), [(ClassLabel(names=NAMES), "ClassLabel"), (Value("int64"), "int64"), (None, "string")]
)
def test_an_image_column_without_images_is_refused(label, type_name, streaming, tmp_path, own_cache):
    rows = broken_table(FILES["0.jpg"]).remove_columns("label")
    rows = rows.add_column("label", [0, 1, 2] if label else ["a", "b", "c"], feature=label or Value("string"))
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=f"Column 'label' holds {type_name}, expected images .*image_column"):
        load_image_dataset(
            tmp_path / "set", streaming=streaming, image_column="label", class_names=None if label else NAMES
        )
