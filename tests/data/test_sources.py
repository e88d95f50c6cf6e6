"""Data sources as files on disk, the traps of each layout, and one-line errors for everything that is not there."""

import http.client
import json
import sys

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_nullspace.data.columns import DataError, class_names, find_columns, num_classes
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.data.image_stream import ImageStream
from hf_nullspace.data.sources import digits, load_image_dataset
from hf_nullspace.models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing.from_processor(ViTImageProcessorPil(size={"height": 8, "width": 8}))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` prepares goes to the test's own folder, and nobody looks for the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def picture(seed, size=(6, 9)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(seed):
    path_less = ImageFeature().encode_example(picture(seed))
    return path_less["bytes"]


def write_images(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / name)
    return folder


def write_parquet(path, labels, label_type=None, metadata=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels, label_type), **more})
    pq.write_table(table.replace_schema_metadata(metadata), path)


def error_line(*args, **options):
    """The message of the DataError, which must be one line that a terminal can show."""
    with pytest.raises(DataError) as caught:
        list(load_image_dataset(*args, **options))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# The built-in digits


def test_digits_are_scikit_learns_split_by_class():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = load_image_dataset("digits"), load_image_dataset("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.features["label"].names == [str(i) for i in range(10)]
    seen = {}
    for split, rows in (("train", train), ("test", test)):
        share = np.bincount(rows["label"][:], minlength=10) / np.bincount(bunch.target)
        np.testing.assert_allclose(share, 0.8 if split == "train" else 0.2, atol=0.005)
        for row in rows:
            pixels = np.array(row["image"])
            assert pixels.shape == (8, 8, 3)
            seen[pixels[..., 0].tobytes()] = row["label"]
    original = {
        np.round(x * 255 / 16).astype(np.uint8).tobytes(): y for x, y in zip(bunch.images, bunch.target, strict=True)
    }
    assert seen == original  # every image, in exactly one split, with its label
    assert digits()["test"]["label"][:12] == test["label"][:12]


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'hf-nullspace[demo]'" in error_line("digits")


# Folders of images


def test_class_folders_with_and_without_splits(tmp_path):
    flat = write_images(tmp_path / "flat", "cat/b.png", "cat/a.jpg", "ant/test_1.jpeg", "train/x.PNG")
    (flat / "cat" / "notes.txt").write_text("no image")
    (flat / "cat" / "._a.jpg").write_text("what macOS leaves behind")
    rows = load_image_dataset(flat)
    # A class called train and a file called test_1 are no splits (the imagefolder builder takes them for such).
    assert rows.features["label"].names == ["ant", "cat", "train"]
    assert rows["label"][:] == [0, 1, 1, 2]
    assert "has no split 'test'; it has 'train'" in error_line(flat, "test")

    split = write_images(tmp_path / "split", "train/b/1.png", "train/a/2.png", "train/c/3.png", "val/c/4.png")
    assert load_image_dataset(split)["label"][:] == [0, 1, 2]
    validation = load_image_dataset(split, "validation")
    assert validation["label"][:] == [2]  # the number of c in train, although a and b are missing here
    assert np.array_equal(np.array(validation[0]["image"]), np.array(picture(3)))
    item = ImageSet(validation, PREPROCESSING)[0]
    assert (tuple(item["pixel_values"].shape), item["labels"]) == ((3, 8, 8), 2)
    streamed = load_image_dataset(split, streaming=True)
    assert [item["labels"] for item in ImageStream(streamed, PREPROCESSING)] == [0, 1, 2]


def test_numbered_class_folders_are_sorted_as_numbers(tmp_path):
    folder = write_images(tmp_path / "v2", "10/a.png", "2/a.png", "0/a.png")
    rows = load_image_dataset(folder)
    assert rows.features["label"].names == ["0", "2", "10"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["gaussian_noise/1/n01/x.png", "gaussian_noise/2/n01/x.png"],
            "expected as class/image.*with one subfolder per",
        ),
        (["x.png", "y.png"], "expected as class/image"),
        (["train/x.png", "test/y.png"], "has split folders, so expected split/class/image"),
        (["train/a/x.png", "val/a/y.png", "valid/a/z.png"], "two folders for one split: 'val' and 'valid'"),
    ],
)
def test_folders_without_one_class_per_image(tmp_path, files, message):
    import re

    assert re.search(message, error_line(write_images(tmp_path / "set", *files)))


def test_folders_without_images(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "train.zip").write_bytes(b"PK")
    assert "holds archives (.zip): extract them first" in error_line(empty)


def test_metadata_beside_images_is_read(tmp_path):
    folder = write_images(tmp_path / "meta", "x.png", "y.png")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "x.png", "label": "dog"}\n{"file_name": "y.png", "label": "cat"}\n'
    )
    rows = load_image_dataset(folder)
    assert [rows.features["label"].names[label] for label in rows["label"]] == ["dog", "cat"]


# Tables


def test_parquet_with_names_in_its_metadata(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1, 1], metadata=metadata)
    write_parquet(tmp_path / "set" / "test.parquet", [1], metadata=metadata)
    rows = load_image_dataset(tmp_path / "set", "train")
    assert rows.features == features
    assert rows["label"][:] == [0, 1, 1]
    assert np.array_equal(np.array(rows[2]["image"]), np.array(picture(2)))
    assert len(load_image_dataset(tmp_path / "set", "test")) == 1
    streamed = load_image_dataset(tmp_path / "set", "train", streaming=True)
    assert [item["labels"] for item in ImageStream(streamed, PREPROCESSING)] == [0, 1, 1]
    assert "'nope'" in error_line(tmp_path / "set", "nope")
    assert "corresponds to no data" in error_line(tmp_path / "set", "train[:0]")


def test_parquet_without_metadata_has_no_names(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", [3, 1], pa.int32())
    rows = load_image_dataset(tmp_path / "set")
    assert isinstance(rows.features["image"], ImageFeature)
    assert isinstance(rows.features["label"], Value)
    assert ImageSet(rows, PREPROCESSING, num_labels=4)[0]["labels"] == 3
    assert (class_names(rows), num_classes(rows)) == (None, 4)
    assert num_classes(load_image_dataset(tmp_path / "set", streaming=True)) is None
    named = load_image_dataset(tmp_path / "set", class_names=["a", "b", "c", "d"])
    assert named.features["label"].int2str(named["label"][:]) == ["d", "b"]
    assert (class_names(named), num_classes(named)) == (["a", "b", "c", "d"], 4)


def test_text_labels_are_numbered_over_all_splits(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", ["dog", "ant", "cat"])
    write_parquet(tmp_path / "set" / "test.parquet", ["dog", "cat"])
    test = load_image_dataset(tmp_path / "set", "test")
    assert test.features["label"].names == ["ant", "cat", "dog"]
    assert test["label"][:] == [2, 1]
    assert np.array_equal(np.array(test[1]["image"]), np.array(picture(1)))
    assert "Pass class_names, or load without streaming" in error_line(tmp_path / "set", streaming=True)
    streamed = load_image_dataset(tmp_path / "set", "test", streaming=True, class_names=["dog", "cat"])
    assert [row["label"] for row in streamed] == [0, 1]
    assert "Row 0 has label 'dog', which is not one of the class names ['cat']" in error_line(
        tmp_path / "set", "test", class_names=["cat"]
    )


@pytest.mark.parametrize(
    ("labels", "label_type", "message"),
    [
        ([0, None, 1], None, "Row 1 of split 'train' of {folder} has no label"),
        (["a", None, "b"], None, "Row 1 of column 'label' has no label"),
        ([-1, -1], None, "label -1, expected 0 or more (2 such rows). -1 marks unlabelled images"),
        ([0.5, 1.5], None, "holds double, expected classes (integers or text). Regression is not supported"),
        ([[0, 1], [1]], None, "expected one class per image. Multi-label sets are not supported"),
        ([], pa.int64(), "a parquet file has no rows; remove it or choose another split"),
    ],
)
def test_tables_with_unusable_labels(tmp_path, labels, label_type, message):
    write_parquet(tmp_path / "set" / "train.parquet", labels, label_type)
    message = message.replace("double", "float64").replace("{folder}", str(tmp_path / "set"))
    assert message in error_line(tmp_path / "set")


def test_labels_beyond_the_names(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1, 7], metadata=metadata)
    assert "Row 2 of split 'train' of" in (message := error_line(tmp_path / "set"))
    assert "has label 7, expected 0 to 1. Check label_column" in message


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1])
    content = (tmp_path / "set" / "train.parquet").read_bytes()
    (tmp_path / "set" / "train.parquet").write_bytes(content[: len(content) // 2])
    assert "Cannot load the data set" in error_line(tmp_path / "set")


def test_saved_to_disk(tmp_path):
    features = Features({"img": ImageFeature(), "y": ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"img": [picture(0), picture(1)], "y": [1, 0]}, features=features)
    datasets.DatasetDict({"train": rows, "holdout": rows.select([1])}).save_to_disk(str(tmp_path / "dict"))
    assert load_image_dataset(tmp_path / "dict", "holdout", label_column="y")["label"][:] == [0]
    streamed = load_image_dataset(tmp_path / "dict", streaming=True)
    assert [row["label"] for row in streamed] == [1, 0]
    assert "it has 'train', 'holdout'" in error_line(tmp_path / "dict", "test")
    datasets.DatasetDict({"train": rows, "none": rows.select([])}).save_to_disk(str(tmp_path / "empty"))
    assert "a split has no rows" in error_line(tmp_path / "empty")
    rows.save_to_disk(str(tmp_path / "one"))
    assert len(load_image_dataset(tmp_path / "one", "train")) == 2
    assert "has no split 'test'" in error_line(tmp_path / "one", "test")


# Columns


IMAGE, CLASSES, NUMBER, TEXT = ImageFeature(), ClassLabel(names=["a"]), Value("int64"), Value("string")


@pytest.mark.parametrize(
    ("features", "named", "expected"),
    [
        ({"label": NUMBER, "photo": IMAGE}, {}, ("photo", "label")),
        ({"pic": IMAGE, "kind": CLASSES, "label_text": TEXT}, {}, ("pic", "kind")),
        ({"img": IMAGE, "fine_label": CLASSES, "coarse_label": CLASSES}, {}, ("img", "fine_label")),
        ({"image": IMAGE, "mask": IMAGE, "label": CLASSES}, {}, ("image", "label")),
        ({"jpg": IMAGE, "cls": NUMBER, "__key__": TEXT}, {}, ("jpg", "cls")),
        ({"a": IMAGE, "b": IMAGE, "x": NUMBER}, {"image_column": "b", "label_column": "x"}, ("b", "x")),
    ],
)
def test_columns_are_found(features, named, expected):
    assert find_columns(Features(features), **named) == expected


# The Hub, which is not there


def test_a_dead_endpoint_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its pauses between retries
    assert "Hub cannot be reached" in error_line("nobody/nothing-here")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("gone"), "no data set 'a/b' on the Hub that you may read"),
        (
            http.client.HTTPException("peer closed connection\nreceived 7 of 9 bytes"),
            "HTTPException: peer closed",
        ),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts are no longer supported"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_loading_may_raise_is_one_line(monkeypatch, raised, message):
    def load_dataset(*args, **options):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert message in error_line("a/b")
