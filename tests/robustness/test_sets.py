"""Small trees of real files in each set's format: every label is checked, and the traps are errors."""

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.label_spaces import LabelError, indices, wnids
from hf_nullspace.robustness.records import images_fingerprint
from hf_nullspace.robustness.sets import (
    SETS,
    MissingData,
    benchmark_preprocessing,
    load_cifar10_c,
    load_set,
)

PROCESSOR = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (224, 224), (224, 224))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def marked(value, size=(8, 6)):
    """An image whose colour says which class it was saved for."""
    return Image.new("RGB", size, (value // 256, value % 256, 7))


def class_of_colour(image):
    red, green, blue = np.asarray(image)[0, 0]
    assert blue == 7
    return int(red) * 256 + int(green)


def tree(folder, classes, size=(8, 6)):
    """folder/<name>/<i>.png for each name -> class, two images in each."""
    for name, value in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(2):
            marked(value, size).save(folder / name / f"{i}.png")
    return folder


def check(loaded, n):
    assert len(loaded) == n
    for i in range(n):
        assert loaded.label(i) == class_of_colour(loaded.raw_image(i))


@pytest.mark.parametrize(
    "name", ["imagenet-1k", "imagenet-sketch", "stylized-imagenet", "imagenet-c/fog/3", "imagenet-a", "imagenet-r"]
)
def test_wnid_folders(tmp_path, name):
    subset = indices(name) if name in ("imagenet-a", "imagenet-r") else None
    classes = subset or [0, 3, 517, 999]
    tree(tmp_path / name, {wnids()[c]: c for c in classes})
    loaded = load_set(name, PROCESSOR, data_root=tmp_path, allow_partial=True)
    check(loaded, 2 * len(classes))
    assert loaded.subset == subset
    assert f"partial: {2 * len(classes)} of {SETS[name].images} images" in str(loaded.protocol())


def test_a_wrong_subset_says_which_wnids_do_not_belong(tmp_path):
    wrong = [wnid for wnid in wnids("imagenet-r") if wnid not in wnids("imagenet-a")]
    tree(tmp_path / "imagenet-a", dict.fromkeys([*wnids("imagenet-a")[:3], *wrong[:2]], 0))
    with pytest.raises(LabelError, match=f"{wrong[0]}, {wrong[1]} do not belong to imagenet-a"):
        load_set("imagenet-a", PROCESSOR, data_root=tmp_path, allow_partial=True)
    (tmp_path / "imagenet-1k" / "train").mkdir(parents=True)
    with pytest.raises(LabelError, match="train do not belong to imagenet-1k"):
        load_set("imagenet-1k", PROCESSOR, data_root=tmp_path)


def test_v2_folders_are_numbers_not_strings(tmp_path):
    tree(tmp_path / "imagenet-v2", {str(c): c for c in (0, 1, 2, 10, 11, 100, 999)})
    check(load_set("imagenet-v2", PROCESSOR, data_root=tmp_path, allow_partial=True), 14)
    (tmp_path / "imagenet-v2" / "1000").mkdir()
    with pytest.raises(LabelError, match="1000 are no classes of imagenet-v2"):
        load_set("imagenet-v2", PROCESSOR, data_root=tmp_path)


def test_damagenet_is_a_flat_folder_and_a_list(tmp_path):
    folder = tmp_path / "damagenet"
    folder.mkdir()
    classes = [65, 970, 230]
    for i, c in enumerate(classes, 1):
        marked(c).save(folder / f"ILSVRC2012_val_0000000{i}.png")
    with pytest.raises(MissingData, match=r"no val.txt .* caffe_ilsvrc12"):
        load_set("damagenet", PROCESSOR, data_root=tmp_path, allow_partial=True)
    lines = [f"ILSVRC2012_val_0000000{i}.JPEG {c}" for i, c in enumerate(classes, 1)]
    (tmp_path / "val.txt").write_text("\n".join(lines) + "\n")
    check(load_set("damagenet", PROCESSOR, data_root=tmp_path, allow_partial=True), 3)
    marked(1).save(folder / "other.png")
    with pytest.raises(LabelError, match=r"other\.png are not in"):
        load_set("damagenet", PROCESSOR, data_root=tmp_path, allow_partial=True)


@pytest.mark.parametrize("line", ["x.JPEG 1000", "x.JPEG 0 0", "65", "x.JPEG -1", "x.JPEG n01440764"])
def test_a_list_that_is_not_caffes_is_refused(tmp_path, line):
    """The development kit has ids alone, 1 to 1000, in an order of its own."""
    (tmp_path / "damagenet").mkdir()
    marked(1).save(tmp_path / "damagenet" / "x.png")
    (tmp_path / "val.txt").write_text(f"x.JPEG 999\n\n{line}\n")
    with pytest.raises(LabelError, match=f"val.txt, line 3: '{line}'; expected an image and its class"):
        load_set("damagenet", PROCESSOR, data_root=tmp_path, allow_partial=True)


def test_a_changed_array_is_noticed_beyond_the_sampled_pixels(tmp_path):
    """Only the first and the last image are decoded for this fingerprint; the changed one lies between."""
    fog, prints = np.zeros((20, 32, 32, 3), np.uint8), []
    np.save(tmp_path / "labels.npy", np.zeros(20, np.int64))
    for value in (0, 0, 9):
        fog[1, 5, 5, 0] = value
        np.save(tmp_path / "fog.npy", fog)
        cifar = load_cifar10_c(tmp_path, "fog", 1, PROCESSOR, allow_partial=True)
        prints.append(images_fingerprint(cifar, sample=2))
    assert prints[0] == prints[1] != prints[2]


def test_what_is_missing_says_how_to_get_it(tmp_path):
    with pytest.raises(MissingData, match=r"imagenet-r is not at .*github.com/hendrycks/imagenet-r.*axiong/imagenet-r"):
        load_set("imagenet-r", PROCESSOR, data_root=tmp_path)
    (tmp_path / "imagenet-r").mkdir()
    with pytest.raises(MissingData, match="no class folders; extract the archive"):
        load_set("imagenet-r", PROCESSOR, data_root=tmp_path)
    (tmp_path / "imagenet-r" / wnids("imagenet-r")[0]).mkdir()
    with pytest.raises(MissingData, match="hold no images"):
        load_set("imagenet-r", PROCESSOR, data_root=tmp_path)
    tree(tmp_path / "imagenet-v2", {"0": 0})
    with pytest.raises(ValueError, match="partial: 2 of 10000 images; complete it"):
        load_set("imagenet-v2", PROCESSOR, data_root=tmp_path)
    assert not issubclass(LabelError, FileNotFoundError)


def test_preprocessing_is_the_protocols_with_the_processors_numbers():
    usual = benchmark_preprocessing(PROCESSOR, SETS["imagenet-1k"])
    assert (usual.resize, usual.size, usual.resample) == (256, (224, 224), Image.Resampling.BICUBIC)
    assert (usual.mean, usual.std) == (PROCESSOR.mean, PROCESSOR.std)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    by_hand = photo.resize((426, 256), Image.Resampling.BICUBIC).crop((101, 16, 325, 240))
    np.testing.assert_array_equal(usual.pixels_from_image(photo).permute(1, 2, 0) * 255, np.asarray(by_hand))
    untouched = benchmark_preprocessing(PROCESSOR, SETS["stylized-imagenet"])
    square = photo.crop((0, 0, 224, 224))
    np.testing.assert_array_equal(untouched.pixels_from_image(square).permute(1, 2, 0) * 255, np.asarray(square))
    large = Preprocessing((0.5,) * 3, (0.5,) * 3, (384, 384), (384, 384))
    with pytest.raises(ValueError, match="must not be resized, but the model takes 384x384"):
        benchmark_preprocessing(large, SETS["damagenet"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_224_px_is_never_cropped_in_silence(tmp_path, streaming):
    name = "imagenet-c/fog/1"
    tree(tmp_path / name, {wnids()[3]: 3}, size=(256, 256))
    loaded = load_set(name, PROCESSOR, data_root=tmp_path, allow_partial=True, streaming=streaming)
    with pytest.raises(ValueError, match=r"imagenet-c/fog/1: an image is 256x256; .* 224x224 already"):
        loaded.pixels_from_image(marked(3, (256, 256)))
    assert loaded.pixels_from_image(marked(3, (224, 224))).shape == (3, 224, 224)


def test_a_hub_set_without_names_needs_to_be_said_in_imagenets_order(monkeypatch):
    rows = datasets.Dataset.from_dict(
        {"jpg": [marked(c) for c in (2, 500, 10)], "cls": [1, 2, 0]},
        features=datasets.Features({"jpg": datasets.Image(), "cls": datasets.Value("int64")}),
    )
    monkeypatch.setattr("hf_nullspace.robustness.sets.commit_of", lambda _: "c0ffee")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _, revision: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda _, split, streaming, revision: {"test": rows}[split])
    with pytest.raises(LabelError, match="no named classes"):
        load_set("imagenet-1k", PROCESSOR, location="someone/imagenet")
    words = {"label_order": "imagenet", "allow_partial": True}
    loaded = load_set("imagenet-1k", PROCESSOR, location="someone/imagenet", **words)
    assert [loaded.label(i) for i in range(3)] == [1, 2, 0]
    beyond = rows.remove_columns("cls").add_column("cls", [1, 1000, 0])
    monkeypatch.setattr(datasets, "load_dataset", lambda _, split, streaming, revision: beyond)
    with pytest.raises(LabelError, match="has label 1000; ImageNet's class indices are 0 to 999"):
        load_set("imagenet-1k", PROCESSOR, location="someone/imagenet", **words)
    stream = rows.to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda _, split, streaming, revision: stream)
    stream.info.features = None
    with pytest.raises(LabelError, match="has no image column"):
        load_set("imagenet-1k", PROCESSOR, location="someone/imagenet", streaming=True)


def test_cifar10_c_from_its_arrays(tmp_path):
    images = np.arange(20 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 32, 32, 3)
    images[:, 0, 0, 0] = np.arange(20)
    np.save(tmp_path / "fog.npy", images)
    with pytest.raises(MissingData, match=r"labels\.npy is not in .*zenodo"):
        load_cifar10_c(tmp_path, "fog", 1, PROCESSOR)
    np.save(tmp_path / "labels.npy", np.tile([3, 1, 4, 1], 5))
    with pytest.raises(ValueError, match="cifar10-c/fog/3 is partial: 4 of 10000 images"):
        load_cifar10_c(tmp_path, "fog", 3, PROCESSOR)
    loaded = load_cifar10_c(tmp_path, "fog", 3, PROCESSOR, allow_partial=True)
    assert "4 of 10000" in loaded.protocol()["note"]
    assert [int(np.asarray(loaded.raw_image(i))[0, 0, 0]) for i in range(4)] == [8, 9, 10, 11]
    assert [loaded.label(i) for i in range(len(loaded))] == [3, 1, 4, 1]
    with pytest.raises(MissingData, match=r"snow\.npy"):
        load_cifar10_c(tmp_path, "snow", 3, PROCESSOR)
    np.save(tmp_path / "labels.npy", np.tile([3, 1, 4, 1], 4))
    with pytest.raises(ValueError, match="with 16 labels"):
        load_cifar10_c(tmp_path, "fog", 3, PROCESSOR)
