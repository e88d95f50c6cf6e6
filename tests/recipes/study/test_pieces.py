"""Pieces of a study: kept, found again, done anew when what they depend on changes, and stopped at checkpoints."""

import json
import shutil
import time

import numpy as np
import pytest
import torch

from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.robustness.attacks.gradient import PGD
from hf_nullspace.robustness.image_sets import ArrayRows, ImageSet
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.plans import Planned
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted, evaluate
from hf_nullspace.training.run_settings import OtherRunError
from hf_nullspace.training.trainer import NullspaceTrainer
from study.design import Run, Slice
from study.estimate import seconds_left, work
from study.images import ImageStore
from study.pieces import Piece, Workshop, pieces_of
from tiny_models import tiny_model
from tiny_training import Images, config

HALF = ((0.5,) * 3, (0.5,) * 3)
WHERE = Slice("report", 2, 32)
PLAN = [
    Planned("base", Clean(), 20),
    Planned("base", Attacked(PGD(steps=2)), 10),
    Planned("base", Corrupted("contrast", 4), 20),
]
RUN = Run("nullspace", 1e-3, 3)


def pictures():
    rng = np.random.default_rng(0)
    rows = ArrayRows(rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), [i % 5 for i in range(40)])
    return ImageSet("pictures", rows, Preprocessing(*HALF, (16, 16), (16, 16)))


def workshop(folder, made=None, **changed):
    def trainer_of(run, path):
        if made is not None:
            made.append(run)
        args = config(path, learning_rate=run.learning_rate, seed=run.seed, save_strategy="steps", save_steps=2)
        args.rounds, args.max_steps = 3, 6
        processor = make_image_processor(16)
        return NullspaceTrainer(tiny_model(), args, train_dataset=Images(jitter=0.3), processing_class=processor)

    given = {"shared_settings": {"data": "pictures"}, "device": torch.device("cpu"), "batch_size": 7} | changed
    return Workshop(folder, ImageStore(folder / "images", pictures(), 0), trainer_of, tiny_model, HALF, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with its measurements, done at once."""
    shop = workshop(tmp_path_factory.mktemp("whole"))
    shop.claim(RUN)
    for piece in pieces_of(RUN, PLAN, WHERE):
        assert shop.finished(piece) is None
        assert shop.do(piece)
    return shop


def test_a_training_stops_at_a_checkpoint_and_goes_on(whole, tmp_path):
    shop, piece = workshop(tmp_path), Piece(RUN)
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        assert not shop.do(piece, deadline=time.monotonic() - 1)
        assert (tmp_path / RUN.folder / checkpoint).is_dir()
        assert shop.finished(piece) is None
    assert shop.do(piece)
    assert shop.finished(piece)["weights"] == whole.finished(piece)["weights"]
    assert shop.finished(piece)["cost"]["forward_equivalents"] == whole.finished(piece)["cost"]["forward_equivalents"]
    assert not list((tmp_path / RUN.folder).glob("checkpoint-*"))


def test_measurements_are_those_of_the_suite(whole):
    model = PixelModel(whole._model(RUN).model, *HALF)
    for piece in list(pieces_of(RUN, PLAN, WHERE))[1:]:
        images = pictures()
        rows = ArrayRows(images.rows.images[list(piece.places)], [place % 5 for place in piece.places])
        images = ImageSet("pictures", rows, images.preprocessing)
        images.places = piece.places  # what random numbers depend on
        (direct,) = evaluate(model, images, [piece.planned.condition], batch_size=3, seed=0, progress=False)
        assert (whole.correct(piece) == direct.correct).all()


def test_nothing_is_measured_twice_unless_something_changed(whole):
    pieces = list(pieces_of(RUN, PLAN, WHERE))
    again = workshop(whole.folder)
    assert all(again.finished(piece) for piece in pieces)
    other_numbers = workshop(whole.folder, seed=1)
    assert [bool(other_numbers.finished(piece)) for piece in pieces] == [True, False, False, False]
    assert not workshop(whole.folder, dtype="bf16").finished(pieces[1])
    assert not again.finished(Piece(RUN, Planned("base", Clean(), 19), WHERE))
    assert not again.finished(Piece(RUN, PLAN[0], Slice("report", 0, 32)))


def test_a_new_training_invalidates_its_measurements(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    shop, pieces = workshop(tmp_path), list(pieces_of(RUN, PLAN[:1], WHERE))
    assert shop.finished(pieces[1])
    path = tmp_path / RUN.folder / "finished.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "others"}))
    assert shop.finished(pieces[1]) is None


def test_a_run_of_other_settings_is_refused_or_deleted(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    for _ in range(2):
        workshop(tmp_path).claim(RUN)
    changed = workshop(tmp_path, shared_settings={"data": "others"})
    with pytest.raises(OtherRunError, match="data: pictures there, others now"):
        changed.claim(RUN)
    assert changed.finished(Piece(RUN))
    overwriting = workshop(tmp_path, shared_settings={"data": "others"}, overwrite=True)
    overwriting.claim(RUN)
    assert not overwriting.finished(Piece(RUN))


def test_bf16_measures(whole):
    shop, piece = workshop(whole.folder, dtype="bf16"), list(pieces_of(RUN, PLAN, WHERE))[1]
    in_float32 = whole.correct(piece)
    shop.do(piece)
    assert (shop.correct(piece) == in_float32).mean() > 0.8
    whole.do(piece)


def test_the_checkpoint_before_is_measured_without_training(whole):
    before = list(pieces_of(Run("before"), PLAN[:1], WHERE))
    for piece in before:
        assert whole.do(piece)
    assert whole.finished(before[0])["cost"] is None
    assert (whole.correct(before[1]) != whole.correct(Piece(RUN, PLAN[0], WHERE))).any()


def test_time_left_follows_the_speed_of_finished_pieces(whole):
    pieces = list(pieces_of(RUN, PLAN, WHERE))
    loads = [(piece, work(piece, whole.trainer_of(RUN, whole.folder / "x").args)) for piece in pieces]
    assert [load for _, load in loads[1:]] == [20, 10 * (1 + 3 * 2), 20]
    assert loads[0][1] == 6 * 8 * 2 * 3 + 3 * (3 * 4 * 8 + 10 * 8)
    assert seconds_left(loads, whole) == (0, True)
    other = Run("nullspace", 1e-3, 4)
    left = [(Piece(other, piece.planned, piece.slice), load) for piece, load in loads[1:]]
    done = sum(whole.finished(piece)["seconds"] for piece in pieces[1:])
    assert seconds_left(loads + left, whole)[0] == pytest.approx(done)
    assert seconds_left([(Piece(other), 5500.0)], whole) == (pytest.approx(10.0), False)
