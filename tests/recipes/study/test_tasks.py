"""Tasks of a study: kept, found again, done anew when what they depend on changes, and stopped at checkpoints."""

import json
import shutil
import time

import numpy as np
import pytest
import torch

from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.robustness.attacks.gradient import PGD
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.plans import Planned
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted, evaluate
from hf_nullspace.training.trainer import NullspaceTrainer
from study.design import Choice, Measurement, Run, Slice
from study.images import ImageStore
from study.schedule import seconds_left, work
from study.tasks import Runner
from tiny_models import tiny_model
from tiny_training import Images, config

HALF = ((0.5,) * 3, (0.5,) * 3)
WHERE = Slice("report", 2, 32)
PLAN = [
    Planned("base", Clean(), 20),
    Planned("base", Attacked(PGD(steps=2)), 10),
    Planned("base", Corrupted("contrast", 4), 20),
]
RUN = Run("nullspace", Choice(1e-3), 3)
HALF_WAY = Run("nullspace", Choice(1e-3, 0.5), 3)
MEASUREMENTS = [Measurement(RUN, planned, WHERE) for planned in PLAN]


def pictures():
    rng = np.random.default_rng(0)
    rows = ArrayRows(rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), [i % 5 for i in range(40)])
    return ImageSet(rows, Preprocessing(*HALF, (16, 16), (16, 16)), name="pictures")


def runner_in(folder, seed=0, data="pictures", **changed):
    def trainer_of(run, path):
        args = config(path, learning_rate=run.choice.learning_rate, seed=run.seed, save_strategy="steps", save_steps=2)
        args.rounds, args.max_steps = 3, 6
        processor = make_image_processor(16)
        return NullspaceTrainer(tiny_model(), args, train_dataset=Images(jitter=0.3), processing_class=processor)

    store = ImageStore(folder / "images", pictures(), seed)
    cpu, settings = torch.device("cpu"), {"data": data}
    return Runner(folder, store, trainer_of, tiny_model, lambda run: settings, cpu, batch_size=7, **changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with its measurements, done at once."""
    runner = runner_in(tmp_path_factory.mktemp("whole"))
    runner.claim(RUN)
    for task in (RUN, *MEASUREMENTS):
        assert runner.finished(task) is None
        assert runner.do(task)
    return runner


def test_a_training_stops_at_a_checkpoint_and_goes_on(whole, tmp_path):
    runner, task = runner_in(tmp_path), RUN
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        assert not runner.do(task, deadline=time.monotonic() - 1)
        assert (tmp_path / RUN.folder / checkpoint).is_dir()
        assert runner.finished(task) is None
    assert runner.do(task)
    ours, theirs = runner.finished(task), whole.finished(task)
    assert ours["weights"] == theirs["weights"]
    assert ours["cost"]["forward_equivalents"] == theirs["cost"]["forward_equivalents"]
    assert not list((tmp_path / RUN.folder).glob("checkpoint-*"))


def test_measurements_are_those_of_the_suite(whole):
    model = PixelModel(whole._model(RUN).model, *HALF)
    for task in MEASUREMENTS:
        images = pictures()
        rows = ArrayRows(images.rows.images[list(task.places)], [place % 5 for place in task.places])
        images = ImageSet(rows, images.preprocessing, name="pictures")
        images.places = task.places  # what random numbers depend on
        (direct,) = evaluate(model, images, [task.planned.condition], batch_size=3, seed=0, progress=False)
        assert (whole.correct(task) == direct.correct).all()


def test_nothing_is_measured_twice_unless_something_changed(whole):
    again, tasks = runner_in(whole.folder), [RUN, *MEASUREMENTS]
    assert all(again.finished(task) for task in tasks)
    other_numbers = runner_in(whole.folder, seed=1)
    assert [bool(other_numbers.finished(task)) for task in tasks] == [True, False, False, False]
    assert not runner_in(whole.folder, dtype="bf16").finished(tasks[1])
    assert not again.finished(Measurement(RUN, Planned("base", Clean(), 19), WHERE))
    assert not again.finished(Measurement(RUN, PLAN[0], Slice("report", 0, 32)))


def test_the_keys_of_studies_on_disk_do_not_change(whole):
    keys = [whole._key(task, "abc") for task in MEASUREMENTS[:2]]
    assert keys == ["c17a0608408667ef2b76a091df0fe835", "ee8a2d29508465bc6ea871f947f8032d"]


def test_an_average_has_the_weights_between_the_checkpoint_and_the_trained_ones(whole):
    task = Measurement(HALF_WAY, PLAN[0], WHERE)
    assert whole.finished(HALF_WAY) is None
    assert whole.do(HALF_WAY)
    assert whole.do(task)
    base, tuned, half_way = (
        model.state_dict() for model in (tiny_model(), whole._model(RUN).model, whole._model(HALF_WAY).model)
    )
    for name, value in half_way.items():
        torch.testing.assert_close(value, (base[name] + tuned[name]) / 2)
    assert whole.finished(HALF_WAY)["cost"] == whole.finished(RUN)["cost"]
    assert whole.finished(task)["n"] == 20


def test_a_new_training_invalidates_its_measurements(whole, tmp_path):
    whole.do(HALF_WAY)
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    runner = runner_in(tmp_path)
    assert runner.finished(MEASUREMENTS[0])
    assert runner.finished(HALF_WAY)
    path = tmp_path / RUN.folder / "finished.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "others"}))
    assert runner.finished(MEASUREMENTS[0]) is None
    assert runner.finished(HALF_WAY) is None


def test_time_left_follows_the_speed_of_finished_tasks(whole):
    settings = whole.trainer_of(RUN, whole.folder / "x").args
    loads = [(task, work(task, lambda run: settings)) for task in (RUN, *MEASUREMENTS)]
    assert [load for _, load in loads] == [6 * 8 * 2 * 3 + 3 * (3 * 4 * 8 + 10 * 8), 20, 10 * (1 + 3 * 2), 20]
    assert seconds_left(loads, whole) == (0, True)
    other = Run("nullspace", Choice(1e-3), 4)
    left = [(Measurement(other, planned, WHERE), load) for planned, load in zip(PLAN, [20, 70, 20], strict=True)]
    done = sum(whole.finished(task)["seconds"] for task in MEASUREMENTS)
    assert seconds_left(loads + left, whole)[0] == pytest.approx(done)
    assert seconds_left([(other, 5500.0)], whole) == (pytest.approx(10.0), False)
