"""A finished condition is found again if nothing changed, and never if anything did."""

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from hf_nullspace.core.files import read_json
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.attacks.auto import AutoAttack
from hf_nullspace.robustness.attacks.gradient import FGSM
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.records import (
    Records,
    evaluate_resumably,
    images_fingerprint,
    model_fingerprint,
    record,
    result_from_record,
)
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted

ALONE = {"clean": Clean()}
CONDITIONS = {"clean": Clean(), "weak": Attacked(FGSM(1 / 255)), "noisy": Corrupted("shot_noise", 2)}
USUAL = {"batch_size": 5, "seed": 1, "dtype": "float32", "progress": False}


@pytest.fixture
def counted(tiny_vit):
    """The tiny ViT, and how many images it has seen."""
    seen = []
    tiny_vit.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return tiny_vit, seen


def test_finished_conditions_are_not_run_again(counted, images, tmp_path):
    model, seen = counted
    records, said = Records(tmp_path), []
    first, keys = evaluate_resumably(records, model, images, ALONE, **USUAL)
    assert sum(seen) == 13
    both, more = evaluate_resumably(records, model, images, CONDITIONS, **USUAL, say=said.append)
    assert list(both) == list(CONDITIONS)
    assert sum(seen) == 13 + 2 * 13 + 13
    assert both["clean"].correct.tolist() == first["clean"].correct.tolist()
    assert said == ["1 of 3 conditions were finished before: clean"]
    assert more[0] == keys[0]
    again, _ = evaluate_resumably(records, model, images, CONDITIONS, **USUAL)
    assert sum(seen) == 52
    assert [r.correct.tolist() for r in again.values()] == [r.correct.tolist() for r in both.values()]
    assert records.others(more) == 0


def test_an_interrupted_run_keeps_what_was_finished(counted, images, tmp_path):
    model, seen = counted
    original, calls = images.pixels_from_image, []

    def fails_later(image):
        calls.append(image)
        if len(calls) > 13 + 4:
            raise KeyboardInterrupt
        return original(image)

    images.pixels_from_image = fails_later
    with pytest.raises(KeyboardInterrupt):
        evaluate_resumably(Records(tmp_path), model, images, CONDITIONS, **USUAL)
    assert len(list(tmp_path.glob("*.json"))) == 1
    images.pixels_from_image = original
    seen.clear()
    evaluate_resumably(Records(tmp_path), model, images, CONDITIONS, **USUAL)
    assert sum(seen) == 26 + 13


CHANGES = {
    "weight": lambda model, images: model.model.classifier.bias.data[3].add_(1e-6),
    "normalisation": lambda model, images: setattr(model, "std", (0.25, 0.2, 0.31)),
    "pixel": lambda model, images: images.images[4].putpixel((0, 0), (1, 2, 3)),
    "label": lambda model, images: images.labels.__setitem__(7, 9),
    "number": lambda model, images: images.__dict__.update(places=range(12), _chosen=range(12)),
}
WEAK = Attacked(FGSM(1 / 255))


@pytest.mark.parametrize(
    ("change", "condition", "settings"),
    [
        *((change, Clean(), {}) for change in CHANGES),
        *((None, WEAK, settings) for settings in ({"seed": 2}, {"dtype": "bf16"})),
        (None, Attacked(FGSM(2 / 255)), {}),
    ],
)
def test_what_has_changed_is_measured_again_and_never_mixed_in(counted, images, tmp_path, change, condition, settings):
    model, seen = counted
    images.images[:] = [image.copy() for image in images.images]
    evaluate_resumably(Records(tmp_path), model, images, {"title": WEAK if change is None else condition}, **USUAL)
    seen.clear()
    if change is not None:
        CHANGES[change](model, images)
    _, keys = evaluate_resumably(Records(tmp_path), model, images, {"title": condition}, **(USUAL | settings))
    assert sum(seen) == len(images) * (2 if change is None else 1)
    assert Records(tmp_path).others(keys) == 1


def image_files(folder):
    """Seven images on disk, whose files are all as long."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for place in range(7):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{place}.bmp")
    rows = {"image": [str(folder / f"{place}.bmp") for place in range(7)], "label": list(range(7))}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def preprocessed(rows):
    return ImageSet(rows, Preprocessing((0.5,) * 3, (0.5,) * 3, (16, 16), None), name="files")


def test_a_replaced_file_of_the_same_size_is_run_again(counted, tmp_path):
    model, seen = counted
    files = preprocessed(image_files(tmp_path / "files"))
    before = images_fingerprint(files, sample=2)  # two of the seven images
    evaluate_resumably(Records(tmp_path / "records"), model, files, ALONE, **USUAL)
    seen.clear()
    stamp, changed = files.modification_stamp(), tmp_path / "files" / "3.bmp"
    size = changed.stat().st_size
    Image.new("RGB", (16, 16)).save(changed)
    assert changed.stat().st_size == size
    assert images_fingerprint(files, sample=2) == before
    assert files.part(3).modification_stamp() == files.modification_stamp() != stamp
    evaluate_resumably(Records(tmp_path / "records"), model, files, ALONE, **USUAL)
    assert sum(seen) == 7


def test_every_byte_of_images_inside_a_table_counts(tmp_path):
    rows = image_files(tmp_path / "files")

    paths = sorted((tmp_path / "files").iterdir())

    def embedded(blacken):
        contents = [path.read_bytes() for path in paths]
        if blacken:
            contents[3] = contents[3][:-3] + bytes(3)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        images = [{"bytes": content, "path": None} for content in contents]
        return preprocessed(datasets.Dataset.from_dict({"image": images, "label": rows["label"][:]}, features=features))

    digests = [embedded(blacken).content_digest() for blacken in (False, False, True)]
    assert digests[0] == digests[1] != digests[2]
    assert images_fingerprint(embedded(False), sample=2) != images_fingerprint(embedded(True), sample=2)


def test_an_attack_that_looks_at_its_batch_is_known_by_it(counted, images, tmp_path):
    @dataclass(frozen=True, repr=False)
    class Neighbour(FGSM):
        batch_dependent = True

    model, seen = counted
    for attack, again in ((FGSM(1 / 255), 0), (Neighbour(1 / 255), 26)):
        for batch_size in (5, 6):
            seen.clear()
            words = USUAL | {"batch_size": batch_size}
            found, _ = evaluate_resumably(Records(tmp_path), model, images, {"attacked": Attacked(attack)}, **words)
        assert sum(seen) == again
    assert found["attacked"].protocol["batch_size"] == 6
    assert AutoAttack.batch_dependent


def test_fingerprints_do_not_depend_on_where_a_model_sits(tiny_vit, images):
    twin = PixelModel(tiny_vit.model, tiny_vit.mean, tiny_vit.std)
    assert model_fingerprint(twin.train()) == model_fingerprint(tiny_vit)
    assert model_fingerprint(PixelModel(tiny_vit.model.bfloat16(), tiny_vit.mean, tiny_vit.std))
    assert images_fingerprint(images) == images_fingerprint(images)
    assert images_fingerprint(images.part(5)) != images_fingerprint(images)


def test_a_part_is_evenly_spaced_and_says_so(images):
    part = images.part(4)
    assert part.places == [0, 4, 8, 12]
    assert [part.label(i) for i in range(4)] == [images.labels[p] for p in part.places]
    assert part.protocol()["note"] == "4 of 13 images, evenly spaced"
    assert len(images.part(99)) == 13


def test_samples_are_written_per_image(tiny_vit, images, tmp_path):
    found, keys = evaluate_resumably(
        Records(tmp_path / "records"), tiny_vit, images, ALONE, **USUAL, samples=tmp_path / "samples"
    )
    table = pyarrow.parquet.read_table(tmp_path / "samples" / f"{keys[0]}.parquet")
    assert table.column("label").to_pylist() == images.labels
    assert table.column("correct").to_pylist() == found["clean"].correct.tolist()
    assert table.schema.metadata[b"condition"] == b"clean"
    assert found["clean"].samples is None


def test_a_damaged_record_is_an_error(tiny_vit, images, tmp_path):
    found, _ = evaluate_resumably(Records(tmp_path), tiny_vit, images, ALONE, **USUAL)
    entry = read_json(next(tmp_path.glob("*.json")))
    assert entry == record(found["clean"])
    entry["correct"] = entry["correct"] + 1
    with pytest.raises(ValueError, match="damaged record of 'clean'"):
        result_from_record(entry)


@pytest.mark.parametrize("content", ["", '{"condition": "clean"}', "[]", "other seconds"])
def test_a_damaged_record_on_the_disk_is_logged_and_made_again(tiny_vit, images, tmp_path, caplog, content):
    records = Records(tmp_path)
    first, _ = evaluate_resumably(records, tiny_vit, images, ALONE, **USUAL)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1') if content == "other seconds" else content)
    again, _ = evaluate_resumably(records, tiny_vit, images, ALONE, **USUAL)
    assert f"{path} is damaged" in caplog.text
    assert "made again" in caplog.text
    assert (again["clean"].correct == first["clean"].correct).all()
    assert records.read(path.stem) == record(again["clean"])


def test_what_was_made_is_kept_under_a_key_that_does_not_change(tmp_path):
    records, made = Records(tmp_path), []

    def make():
        made.append(1)
        return {"numbers": (1, 2.5)}

    for _ in range(2):
        assert records.kept(make, model="a", settings={"b": (1, None)}) == {"numbers": [1, 2.5]}
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["719d718b61482dfd845258a0534360d3.json"]
    records.kept(make, model="b", settings={"b": (1, None)})
    assert len(made) == 2


def test_a_subsets_second_judgement_survives(images, tiny_vit, tmp_path):
    images.subset = list(range(10))
    found, _ = evaluate_resumably(Records(tmp_path), tiny_vit, images, ALONE, **USUAL)
    again, _ = evaluate_resumably(Records(tmp_path), tiny_vit, images, ALONE, **USUAL)
    assert again["clean"].correct_all.dtype == np.bool_
    assert again["clean"].correct_all.tolist() == found["clean"].correct_all.tolist()
