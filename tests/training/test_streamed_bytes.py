"""The same row gives the same bytes and the same pixels, streamed or not, from every kind of source."""

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.image_files import encoded_bytes, undecoded
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.training.label_maps import align_labels
from hf_nullspace.training.loading import Classifier, DataArguments, evaluation_images, load_rows, training_images
from hf_nullspace.training.sources import load_image_dataset

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
    rows = undecoded(rows, "image")
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
