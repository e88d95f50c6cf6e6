"""Part of the way back to the checkpoint: which alpha, what is saved, and what becomes of the noise beside it."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_nullspace.averaging import NotAveragedError, interpolate
from hf_nullspace.data.image_files import DataError
from hf_nullspace.noise.artifact import NullspaceNoise
from hf_nullspace.noise.provenance import model_hash
from hf_nullspace.robustness.attacks.gradient import FGSM, PGD
from hf_nullspace.robustness.corruptions import corrupt
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted
from hf_nullspace.training.interpolation import Choice, Point, Selection, choose_alpha
from hf_nullspace.training.loading import DataArguments, load_rows
from hf_nullspace.training.noise_stream import noise_stream
from hf_nullspace.training.selection import selection_rows
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import tiny_model
from tiny_training import CONDITIONS, Images, assert_differs, assert_same, config, pictures, trained
from written_out import influence_of

ALPHAS = (0.25, 0.5, 0.75, 1.0)


def average(base, tuned, alpha):
    """(1 - alpha) * base + alpha * tuned of two state dicts, in float64."""
    return {name: (alpha * value.double() + (1 - alpha) * base[name].double()).float() for name, value in tuned.items()}


def counted_by_hand(model, images, seed):
    """How many are right under each of CONDITIONS, in plain torch; an image that is nearly undecided is an error."""

    def pixels_of(condition):
        raw = [row["image"] for row in images.rows]
        if isinstance(condition, Corrupted):
            raw = [corrupt(x, condition.corruption, condition.severity, seed=seed, index=i) for i, x in enumerate(raw)]
        return torch.from_numpy(np.stack(raw)).permute(0, 3, 1, 2).float() / 255

    def logits_of(pixels):
        return model(pixel_values=(pixels - 0.5) / 0.5).logits

    labels, counts = torch.tensor([row["label"] for row in images.rows]), {}
    for condition in CONDITIONS:
        pixels = pixels_of(condition)
        if isinstance(condition, Attacked):
            pixels.requires_grad_()
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits_of(pixels), labels), pixels)
            pixels = (pixels.detach() + condition.attack.eps * gradient.sign()).clamp(0, 1)
        best = logits_of(pixels).topk(2)
        assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-5, "draw other images: rounding would decide"
        counts[condition] = int((best.indices[:, 0] == labels).sum())
    return counts


def test_every_alpha_is_measured_as_a_loop_of_its_own_does():
    base, tuned, images = tiny_model().eval(), tiny_model(seed=1).eval(), pictures(30)
    found = choose_alpha(tuned, Selection(base, images, CONDITIONS[1:], ALPHAS), batch_size=7, seed=2, progress=False)
    assert [point.alpha for point in found.points] == [0, *ALPHAS], "the checkpoint itself is always there"
    for point in found.points:
        model = copy.deepcopy(base)
        model.load_state_dict(average(base.state_dict(), tuned.state_dict(), point.alpha))
        assert dict(point.correct) == counted_by_hand(model, images, seed=2)
        assert point.count == 30
    assert len({tuple(point.correct.values()) for point in found.points}) > 2


CLEAN, FGSM_1, PGD_1, FOG, SNOW = (
    Clean(), Attacked(FGSM(1 / 255)), Attacked(PGD(1 / 255)), Corrupted("fog", 3), Corrupted("snow", 3)
)  # fmt: skip


def choice(*points):
    """Of 200 images, (alpha, clean, FGSM, PGD, fog, snow) right."""
    names = (CLEAN, FGSM_1, PGD_1, FOG, SNOW)
    return Choice([Point(alpha, 200, dict(zip(names, counts, strict=True))) for alpha, *counts in points])


def test_the_average_counts_attacks_and_corruptions_as_one_each():
    (point,) = choice((0.0, 160, 100, 80, 150, 130)).points
    assert point.clean == 0.8
    assert point.robustness == pytest.approx((0.45 + 0.7) / 2)
    assert point.average == pytest.approx((0.8 + 0.45 + 0.7) / 3)
    assert Point(0.0, 200, {CLEAN: 160, FOG: 150, SNOW: 130}).average == pytest.approx((0.8 + 0.7) / 2)


def test_the_best_average_wins_among_those_that_keep_half_a_point():
    """160 of 200 are right before: 159 are half a point less, 158 are a point less."""
    before, better, best = (0, 160, 60, 60, 100, 100), (0.5, 159, 80, 80, 100, 100), (1, 158, 190, 190, 190, 190)
    found = choice(before, better, best)
    assert found.best.alpha == 0.5
    assert found.as_json("drawn")["alpha"] == 0.5
    assert [point["keeps_clean"] for point in found.as_json("drawn")["alphas"]] == [True, True, False]
    assert choice(before, (0.3, *better[1:]), better).best.alpha == 0.3, "of equals the nearest to the checkpoint"
    none = choice(before, best, (0.1, 160, 60, 60, 100, 99))
    assert none.best.alpha == 0
    assert "no alpha above 0 is better, so the model is the checkpoint again" in none.sentence()


def going_back(folder, selection, model=None, **given):
    given = {"epsilon": 0.01, "noise_max_steps": 6, "interpolate": True} | given
    trainer = NullspaceTrainer(model or tiny_model(), config(folder, **given), train_dataset=Images())
    trainer.selection = selection
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A fine-tuning as it is, and the same with `interpolate`, on images that are right half way."""
    folder, base = tmp_path_factory.mktemp("runs"), tiny_model()
    settings = {"epsilon": 0.01, "noise_max_steps": 6, "ema_decay": 0.7}
    tuned = trained(folder / "tuned", tiny_model(), Images(), **settings)
    half = interpolate(base, tuned.model, 0.5).eval()
    unlabelled = torch.stack([pictures(40)[index]["pixel_values"] for index in range(40)])
    labels = half(pixel_values=unlabelled).logits.argmax(-1)
    selection = Selection(base, pictures(40, labels), CONDITIONS, ALPHAS, "drawn images")
    back = going_back(folder / "back", selection, **settings)
    back.train()
    back.save_model()
    return tuned, back, folder / "back"


def test_what_is_saved_lies_between_the_checkpoint_and_the_fine_tuning(runs):
    tuned, back, folder = runs
    base = tiny_model().state_dict()
    for place, model in ((folder, tuned.model), (folder / "ema", tuned.ema.model)):
        chosen = json.loads((place / "interpolation.json").read_text())
        assert [point["alpha"] for point in chosen["alphas"]] == [0, *ALPHAS]
        assert chosen["images"] == "drawn images"
        saved = AutoModelForImageClassification.from_pretrained(place).state_dict()
        assert_same(saved, average(base, model.state_dict(), chosen["alpha"]), rtol=2e-7, atol=0)
        with Image.open(place / "interpolation.png") as picture:
            assert min(picture.size) > 200
    assert json.loads((folder / "interpolation.json").read_text())["alpha"] == 0.5
    saved = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    assert_same(saved, back.model.state_dict())
    for end in (base, tuned.model.state_dict()):
        assert_differs(saved, end)
    assert_same(base, back.selection.base.state_dict())


def test_the_training_itself_is_the_same_and_the_choice_is_counted(runs):
    tuned, back, _ = runs
    for ours, theirs in zip(back.history, tuned.history, strict=True):
        assert ours["trace"] == theirs["trace"]
    stages = [run.cost.summary()["stages"] for run in (back, tuned)]
    assert [stage["training"]["forward"] for stage in stages] == [2 * 8 * 4] * 2
    # Two models (the run's and its average), five alphas, 40 images: clean, an attack, two corruptions.
    assert stages[0]["selection"]["forward"] == 2 * 5 * 40 * (1 + 2 + 1 + 1)
    assert stages[0]["selection"]["backward_to_input"] == 2 * 5 * 40
    assert stages[1]["selection"]["forward"] == 0


def test_the_noise_beside_the_model_is_scaled_to_epsilon_on_it(runs):
    """Measured by a loop without the library; what was learned on the fine-tuned weights has another influence here."""
    _, back, folder = runs
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    saved = NullspaceNoise.from_pretrained(folder)
    learned = NullspaceNoise.load(folder / "noises/round-001.safetensors")
    held_out, _ = noise_stream(*back.training_rows(), **back.args.stream_settings(), round=1)
    now = influence_of(model, torch.cat(held_out), saved.tensor)
    assert 0.95 * 0.01 < now <= 0.01
    assert saved.provenance.influence == pytest.approx(now, rel=1e-4)
    assert saved.provenance.influence_images == 8
    assert saved.provenance.model_sha256 == model_hash(model) != learned.provenance.model_sha256
    assert saved.provenance.round == learned.provenance.round == 1
    assert not 0.95 * 0.01 < influence_of(model, torch.cat(held_out), learned.tensor) <= 0.01, "else nothing was shown"
    cosine = torch.nn.functional.cosine_similarity(saved.tensor.flatten(), learned.tensor.flatten(), dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-6)


def test_where_there_is_no_way_back_the_training_does_not_begin(tmp_path):
    other = tiny_model()
    other.classifier = torch.nn.Linear(24, 3)
    for base, sharded, reason in (
        (other, False, "a new head, or another size, has no weights to average with"),
        (tiny_model("deit"), False, "differ in their parts"),
        (tiny_model(), True, "no FSDP, DeepSpeed or PEFT"),
    ):
        trainer = going_back(tmp_path, Selection(base, pictures(4), CONDITIONS))
        trainer._is_plain = not sharded
        with pytest.raises(NotAveragedError, match=reason):
            trainer.train()
        assert trainer.state.global_step == 0


def folders(path, *splits):
    """Class folders: of every split 12 images in each of three classes."""
    random = np.random.default_rng(0)
    for split in splits:
        for name in ("ant", "bee", "cat"):
            (path / split / name).mkdir(parents=True)
            for index in range(12):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{index}.png")
    return DataArguments(dataset_name=str(path))


def test_a_validation_split_is_chosen_on_and_nothing_held_out(tmp_path):
    args = folders(tmp_path / "images", "train", "validation", "test")
    rows = load_rows(args, "train")
    chosen = selection_rows(args, rows, None, 1000, base_is_trained_here=False)
    assert (len(chosen.rest), len(chosen.rows)) == (36, 36)
    assert chosen.note == f"{args.dataset_name}, split validation"
    args.eval_split = "validation"
    chosen = selection_rows(args, rows, None, 1000, base_is_trained_here=False)
    assert (len(chosen.rest), len(chosen.rows)) == (33, 3), "the report has the validation split"
    assert len(selection_rows(args, rows, "test", 1000, base_is_trained_here=False).rows) == 36


def test_without_one_a_tenth_is_held_out_and_the_note_says_who_may_have_seen_it(tmp_path):
    args = folders(tmp_path / "images", "train", "test")
    rows = load_rows(args, "train")
    for count, here, held_out, words in (
        (1000, False, 3, "held out; the checkpoint may have been trained on them"),
        (2, True, 2, "held out of all training"),
    ):
        chosen = selection_rows(args, rows, None, count, base_is_trained_here=here)
        assert chosen.note == f"{args.dataset_name}, {held_out} of 36 images of split train, {words}"
        parts = [[row["image"].tobytes() for row in part] for part in (chosen.rows, chosen.rest)]
        assert len(parts[0]) == held_out
        assert not set(parts[0]) & set(parts[1])
        assert set(parts[0]) | set(parts[1]) == {row["image"].tobytes() for row in rows}
    with pytest.raises(DataError, match="9 training images are too few to hold some out"):
        selection_rows(args, rows.select(range(9)), None, 1000, base_is_trained_here=False)
