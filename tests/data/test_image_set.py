"""Items, augmentation and streams: what a row becomes must not depend on batch, worker, process, order or resume."""

import io
import logging
import pickle
import re

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from hf_nullspace.data.augmentation import Augmentation
from hf_nullspace.data.image_files import CorruptImageError, DataError
from hf_nullspace.data.image_set import ImageSet, collate
from hf_nullspace.data.image_stream import ImageStream
from hf_nullspace.models.preprocessing import Preprocessing

PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})
PREPROCESSING = Preprocessing.from_processor(PROCESSOR)
CROPS = Augmentation(scale=(0.2, 1.0))


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8))


def table(count=12, labels=None, names=("a", "b", "c")):
    labels = [i % 3 for i in range(count)] if labels is None else labels
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": [picture(i) for i in range(count)], "label": labels}, features=features)


@pytest.fixture(scope="module")
def rows():
    return table()


@pytest.fixture
def files(tmp_path):
    """Five files, two of them broken, as rows of paths."""
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.jpg")
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) - 200])
    (tmp_path / "3.jpg").write_text("no image at all")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(5)])})
    columns = {"image": [str(tmp_path / f"{i}.jpg") for i in range(5)], "label": list(range(5))}
    return datasets.Dataset.from_dict(columns, features=features)


def loaded(dataset, **options):
    """The items of one pass of a DataLoader, in its order."""
    loader = DataLoader(dataset, collate_fn=collate, **options)
    batches = list(loader)
    return torch.cat([batch["pixel_values"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def test_items_are_what_the_processor_gives(rows):
    dataset = ImageSet(rows, PREPROCESSING, num_labels=3)
    assert len(dataset) == 12
    for index in (0, 5, -1):
        item = dataset[index]
        expected = PROCESSOR(rows[index]["image"], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(item["pixel_values"], expected)
        assert item["labels"] == rows[index]["label"]
    assert len(list(iter(dataset))) == 12


def test_the_evaluation_view_gives_pixels_and_the_original_image(rows):
    dataset = ImageSet(rows, PREPROCESSING, remap=(7, 8, 9))
    assert dataset[4]["labels"] == dataset.label(4) == 8
    original = dataset.raw_image(4)
    assert (original.mode, original.size) == ("RGB", (20, 24))
    assert np.array_equal(np.array(original), np.array(picture(4)))
    assert torch.equal(dataset.pixels_from_image(original), PREPROCESSING.pixels_from_image(picture(4)))
    batch = collate([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [7, 8]
    assert batch["labels"].dtype == torch.int64


def test_any_sequence_of_rows_will_do(rows, tmp_path):
    picture(3).save(tmp_path / "x.png")
    kinds = [picture(3), np.array(picture(3)), str(tmp_path / "x.png"), {"bytes": (tmp_path / "x.png").read_bytes()}]
    kinds[3]["path"] = None
    for item in ImageSet([{"image": kind, "label": 1} for kind in kinds], PREPROCESSING):
        assert torch.equal(item["pixel_values"], PREPROCESSING.normalize(PREPROCESSING.pixels_from_image(picture(3))))


def test_the_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(0).save(tmp_path / "turned.png", exif=exif)
    dataset = ImageSet([{"image": str(tmp_path / "turned.png"), "label": 0}], PREPROCESSING)
    assert dataset.raw_image(0).size == (24, 20)
    assert np.array_equal(np.array(dataset.raw_image(0)), np.rot90(np.array(picture(0)), -1))


# Bad rows


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, 2, 1], {"num_labels": 2}, "Row 2 of the data has label 2, expected 0 to 1"),
        ([0, 1, None, 1], {}, "Row 2 of the data has no label"),
        ([-1, -1, -1, -1], {}, r"Row 0 .* label -1, .*\(4 such rows\).*unlabelled"),
        ([0, 1, 2, 1], {"remap": (0, 1)}, "Row 2 of the data has label 2, expected 0 to 1"),
        ([0, 1, 2, 1], {"remap": (0, 1, 5), "num_labels": 5}, "label 5, expected 0 to 4"),
    ],
)
def test_bad_labels_are_found_before_training(labels, options, message):
    with pytest.raises(DataError, match=message):
        ImageSet(table(4, labels), PREPROCESSING, **options)
    listed = [{"image": picture(i), "label": label} for i, label in enumerate(labels)]
    for dataset in (ImageSet(listed, PREPROCESSING, **options), stream(table(4, labels), 1, **options)):
        with pytest.raises(DataError, match=r"Row [02] of (the stream of )?the data has (no )?label"):
            list(dataset)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # torch waits for it, 5 s each
def test_a_corrupt_image_names_row_and_file(files, num_workers):
    dataset = ImageSet(files, PREPROCESSING)
    assert dataset[0]["labels"] == 0
    for index, reason in ((1, "truncated"), (3, "cannot identify image file")):
        loader = DataLoader(torch.utils.data.Subset(dataset, [index]), collate_fn=collate, num_workers=num_workers)
        with pytest.raises(
            CorruptImageError, match=rf"Row {index} of the data \(.*{index}\.jpg\) cannot be decoded.*{reason}"
        ):
            list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_puts_the_next_good_row_in_its_place(files, num_workers, caplog):
    dataset = ImageSet(files, PREPROCESSING, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        pixel_values, labels = loaded(dataset, batch_size=2, num_workers=num_workers)
        loaded(dataset, batch_size=2)
    assert labels.tolist() == [0, 2, 2, 4, 4]  # the label goes with the image
    assert torch.equal(pixel_values[1], pixel_values[2])
    assert dataset.corrupt_rows == [1, 3]  # also where a worker found them
    if num_workers == 0:
        assert len(caplog.records) == 2  # each row once, not once per epoch


def test_skipping_does_not_hide_that_nothing_can_be_read(files):
    broken = ImageSet(files.select([1, 3]), PREPROCESSING, on_corrupt="skip")
    with pytest.raises(CorruptImageError, match="Rows 0 to 1 of the data have no readable image"):
        broken[0]


# Fingerprints


def encoded_rows(count=130, change=lambda rows: None, names="ab"):
    """Rows of encoded images of one colour each, and labels 0, 1, 0, ...; ``change`` may alter the list of rows."""
    rows = [{"image": {"bytes": tiny_png(i), "path": f"{i}.png"}, "label": i % 2} for i in range(count)]
    change(rows)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))})
    return datasets.Dataset.from_list(rows, features=features)


CHANGES = (
    lambda rows: rows[0]["image"].update(bytes=rows[0]["image"]["bytes"] + b" "),
    lambda rows: rows[5].update(label=0),
    lambda rows: rows.insert(0, rows.pop(2)),
)


def tiny_png(colour):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def print_of(rows, streamed):
    if streamed:
        return ImageStream(rows.to_iterable_dataset(), PREPROCESSING).content_fingerprint()
    return ImageSet(rows, PREPROCESSING).content_fingerprint()


@pytest.mark.parametrize("streamed", [False, True])
def test_the_fingerprint_knows_contents_labels_and_order(streamed, tmp_path):
    known = print_of(encoded_rows(), streamed)
    assert re.fullmatch("[0-9a-f]{16}", known)
    assert print_of(encoded_rows(), streamed) == known
    changed = [encoded_rows(change=change) for change in CHANGES]
    others = [print_of(rows, streamed) for rows in (*changed, encoded_rows(names="ba"))]
    assert len({known, *others}) == 5
    fewer = print_of(encoded_rows().select(range(129)), streamed)
    assert (fewer == known) == streamed  # a stream's length is not known
    # The same files by their paths, wherever they lie
    for i in range(130):
        (tmp_path / f"somewhere-{i}.png").write_bytes(tiny_png(i))
    paths = [{"image": str(tmp_path / f"somewhere-{i}.png"), "label": i % 2} for i in range(130)]
    by_path = datasets.Dataset.from_list(paths, features=encoded_rows().features)
    assert print_of(by_path, streamed) == known
    (tmp_path / "somewhere-0.png").unlink()
    assert print_of(by_path, streamed) != known  # said by name when the row is read


def test_the_fingerprint_of_other_rows(rows):
    listed = [{"image": picture(i), "label": i % 3} for i in range(12)]
    known = ImageSet(listed, PREPROCESSING).content_fingerprint()
    assert ImageSet(listed, PREPROCESSING).content_fingerprint() == known
    listed[3] = {"image": None, "label": 0}
    assert ImageSet(listed, PREPROCESSING).content_fingerprint() != known
    dataset = ImageSet(rows, PREPROCESSING, augmentation=CROPS, seed=3)
    known = dataset.content_fingerprint()
    assert ImageSet(rows, PREPROCESSING).content_fingerprint() == known  # of the data alone


# Augmentation


def test_crops_are_torchvisions_in_area_ratio_and_fallback():
    augmentation = Augmentation(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    generator = np.random.default_rng(0)
    boxes = np.array([augmentation.box(500, 400, generator) for _ in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].max() <= 500
    assert boxes[:, 3].max() <= 400
    areas, ratios = widths * heights / (500 * 400), widths / heights
    assert 0.08 * 0.99 < areas.min() < 0.1
    assert 0.95 < areas.max() <= 1.0
    assert 0.74 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.35
    # Small crops are never rejected, so their area is uniform and their ratio log-uniform:
    small = [Augmentation(scale=(0.1, 0.3)).box(500, 500, generator) for _ in range(4000)]
    areas = np.array([(r - x) * (b - y) / 250000 for x, y, r, b in small])
    logs = np.array([np.log((r - x) / (b - y)) for x, y, r, b in small]) / np.log(4 / 3)
    assert areas.mean() == pytest.approx(0.2, abs=0.003)
    assert areas.std() == pytest.approx(0.2 / np.sqrt(12), abs=0.002)
    assert logs.mean() == pytest.approx(0, abs=0.03)
    assert logs.std() == pytest.approx(2 / np.sqrt(12), abs=0.02)
    # Where no crop fits: the largest in the middle whose ratio is allowed (torchvision's fallback).
    assert Augmentation(scale=(1, 1)).box(90, 600, generator) == (0, 240, 90, 360)
    assert Augmentation(scale=(1, 1)).box(600, 90, generator) == (240, 0, 360, 90)
    assert Augmentation(scale=(1, 1), ratio=(1, 1)).box(60, 60, generator) == (0, 0, 60, 60)


def test_flips_are_mirror_images_at_their_rate():
    always, never = (Augmentation(scale=(1, 1), ratio=(1, 1), flip=flip) for flip in (1.0, 0.0))
    square = picture(0).crop((0, 0, 20, 20))
    assert np.array_equal(np.array(always.apply(square, np.random.default_rng(0))), np.array(square)[:, ::-1])
    assert np.array_equal(np.array(never.apply(square, np.random.default_rng(0))), np.array(square))
    half = Augmentation(scale=(1, 1), ratio=(1, 1))
    generator = np.random.default_rng(0)
    flipped = [half.apply(square, generator).tobytes() != square.tobytes() for _ in range(1000)]
    assert 450 < sum(flipped) < 550


def test_an_augmented_item_is_the_crop_at_the_models_size(rows):
    whole = Augmentation(scale=(1, 1), ratio=(20 / 24, 20 / 24), flip=1.0)
    dataset = ImageSet(rows, PREPROCESSING, augmentation=whole)
    mirrored = picture(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.equal(dataset[2]["pixel_values"], PROCESSOR(mirrored, return_tensors="pt")["pixel_values"][0])


def test_augmentation_depends_on_seed_epoch_and_row_only(rows):
    def make(**options):
        return ImageSet(rows, PREPROCESSING, augmentation=CROPS, **{"seed": 1, **options})

    dataset = make()
    in_order, _ = loaded(dataset, batch_size=4)
    torch.manual_seed(123)  # no global generator has a say
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(loaded(dataset, batch_size=5)[0], in_order)
    assert torch.equal(loaded(make(), batch_size=12)[0], in_order)
    backwards = torch.stack([dataset[i]["pixel_values"] for i in reversed(range(12))])
    assert torch.equal(backwards.flip(0), in_order)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7]["pixel_values"], in_order[7])

    dataset.set_epoch(1)
    second, _ = loaded(dataset, batch_size=4)
    assert all(not torch.equal(a, b) for a, b in zip(in_order, second, strict=True))
    dataset.set_epoch(0)
    assert torch.equal(loaded(dataset, batch_size=4)[0], in_order)
    assert not torch.equal(loaded(make(seed=2), batch_size=12)[0], in_order)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_epoch_reaches_workers(rows, persistent):
    dataset = ImageSet(rows, PREPROCESSING, augmentation=CROPS)
    expected = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        expected.append(loaded(dataset, batch_size=4)[0])
    loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=2, persistent_workers=persistent)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), expected[epoch])


def test_a_stream_of_its_own_ignores_the_epoch(rows):
    dataset = ImageSet(rows, PREPROCESSING, augmentation=CROPS, seed=1)
    noise = dataset.with_key("noise", 3)
    first, labels = loaded(noise, batch_size=4)
    dataset.set_epoch(5)
    noise.set_epoch(6)
    assert torch.equal(loaded(dataset.with_key("noise", 3), batch_size=6)[0], first)
    assert torch.equal(loaded(noise, batch_size=6)[0], first)
    assert labels.tolist() == rows["label"][:]
    for other in (dataset, dataset.with_key("noise", 4), dataset.with_key("held out", 3)):
        assert not torch.equal(loaded(other, batch_size=12)[0], first)


# Streams


def stream(rows, shards=4, **options):
    return ImageStream(rows.to_iterable_dataset(num_shards=shards), PREPROCESSING, **options)


def by_label(pixel_values, labels):
    return {int(label): values for label, values in zip(labels, pixel_values, strict=True)}


@pytest.fixture(scope="module")
def numbered():
    """Sixteen images, the label says which."""
    return table(16, list(range(16)), [str(i) for i in range(16)])


def test_a_stream_gives_the_same_items(numbered):
    plain, labels = loaded(stream(numbered), batch_size=4)
    assert labels.tolist() == list(range(16))
    assert torch.equal(plain, loaded(ImageSet(numbered, PREPROCESSING), batch_size=4)[0])


def test_stream_augmentation_depends_on_seed_epoch_and_image_only(numbered):
    options = {"augmentation": CROPS, "seed": 1}
    ordered = by_label(*loaded(stream(numbered, **options), batch_size=4))
    shuffled_stream = stream(numbered, shuffle_buffer=8, **options)
    shuffled, labels = loaded(shuffled_stream, batch_size=3)
    assert labels.tolist() != list(range(16))
    assert sorted(labels.tolist()) == list(range(16))
    in_workers = by_label(*loaded(stream(numbered, shuffle_buffer=8, **options), batch_size=2, num_workers=2))
    for label, values in by_label(shuffled, labels).items():
        assert torch.equal(values, ordered[label])
        assert torch.equal(values, in_workers[label])
    # The same run again, and the next epoch
    again, same_order = loaded(shuffled_stream, batch_size=3)
    assert same_order.tolist() == labels.tolist()
    assert torch.equal(again, shuffled)
    shuffled_stream.set_epoch(1)
    later, other_order = loaded(shuffled_stream, batch_size=3)
    assert other_order.tolist() != labels.tolist()
    assert not torch.equal(by_label(later, other_order)[0], ordered[0])


def test_a_new_epoch_reaches_persistent_stream_workers(numbered):
    dataset = stream(numbered, augmentation=CROPS, shuffle_buffer=8)
    loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(torch.cat([batch["labels"] for batch in loader]).tolist())
    assert all(sorted(order) == list(range(16)) for order in orders)  # every image once, whatever the workers
    assert orders[0] == orders[2] != orders[1]


def test_a_repeated_stream_never_ends_and_reshuffles(numbered):
    endless = iter(stream(numbered, shuffle_buffer=16, repeat=True))
    turns = [[next(endless)["labels"] for _ in range(16)] for _ in range(3)]
    resumed = iter(stream(numbered, shuffle_buffer=16, repeat=True))  # as Trainer does it: it draws and drops batches
    assert [next(resumed)["labels"] for _ in range(48)] == [*turns[0], *turns[1], *turns[2]]
    assert all(sorted(turn) == list(range(16)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    # One shard, two workers: the one without a shard stops instead of looking for ever.
    loader = DataLoader(stream(numbered, shards=1, repeat=True), 8, collate_fn=collate, num_workers=2)
    batches = iter(loader)
    assert [next(batches)["labels"].tolist() for _ in range(2)] == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("shards", [1, 4])
def test_processes_share_a_stream_without_overlap(numbered, shards):
    view = stream(numbered, shards=shards, augmentation=CROPS).with_key("noise", 2, shuffle_buffer=8)
    assert [item["labels"] for item in view] == [item["labels"] for item in view]
    parts = [[item["labels"] for item in view.of_process(rank, 2)] for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 8
    assert sorted(parts[0] + parts[1]) == list(range(16))
    other = stream(numbered, shards=shards, augmentation=CROPS).with_key("noise", 3, shuffle_buffer=8)
    assert [item["labels"] for item in other] != [item["labels"] for item in view]


def test_broken_streams(files):
    with pytest.raises(DataError, match="stream has no images"):
        list(ImageStream(files.to_iterable_dataset(num_shards=1).take(0), PREPROCESSING))

    def interrupted():
        yield from ({"image": {"bytes": None, "path": files[i]["image"].filename}, "label": 0} for i in (0, 2))
        raise ConnectionResetError("peer went away\nwith details")

    rows = datasets.IterableDataset.from_generator(interrupted, features=files.features)
    with pytest.raises(DataError, match=r"broke after 2 rows: ConnectionResetError: peer went away\. Check") as caught:
        list(ImageStream(rows, PREPROCESSING))
    assert "\n" not in str(caught.value)
