"""Labels that are class probabilities, as mixup and CutMix make them: every objective, the loss, what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.data import default_collate

from hf_nullspace.noise.artifact import load_noise_bank
from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM
from hf_nullspace.training.losses import mean_over_images, view_loss
from hf_nullspace.training.objectives import check_labels
from tiny_attacks import EPS, Pictures, agree, divergence_pgd, pgd, trained
from tiny_models import tiny_model
from tiny_training import assert_differs, assert_same, parameters_of
from written_out import logits_of

SMOOTHING = 0.2


class Mixed(Pictures):
    """Every image is two of five classes, in a share of its own."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype=dtype)
        share = torch.rand(len(self), 1, generator=torch.Generator().manual_seed(9))
        first = torch.eye(5)[self.labels]
        self.labels = share * first + (1 - share) * first.roll(1, 0)


def smoothed(logits, probabilities):
    """-sum_k q_k log p_k, with q = (1 - s) y + s / K."""
    target = (1 - SMOOTHING) * probabilities + SMOOTHING / probabilities.shape[1]
    return -(target * log_softmax(logits, 1)).sum(1).mean()


def test_every_kind_of_objective_is_the_loop_without_the_trainer(tmp_path):
    """Attacks ascend the cross-entropy with the probabilities, that of TRADES the divergence; labels are smoothed."""
    given = {"objective": "nullspace+madry+trades+fast", "trades_beta": 4.0, "label_smoothing_factor": SMOOTHING}
    trainer = trained(tmp_path, data=Mixed(), **given)
    bank = [noise.tensor for noise in load_noise_bank(tmp_path / "noises")]

    def loss(vit, x, y, step):
        y = y.double()
        views = [x, x, pgd(vit, x, y, 42, step), x, pgd(vit, x, y, 42, step, steps=1, step=1.25 * EPS)]
        noises = [0.0, bank[step // 2], 0.0, 0.0, 0.0]
        total = sum(smoothed(logits_of(vit, view, noise), y) for view, noise in zip(views, noises, strict=True))
        total = total + smoothed(logits_of(vit, x), y)
        p, q = (log_softmax(logits_of(vit, view), 1) for view in (x, divergence_pgd(vit, x, 42, step)))
        return total + 4 * (p.exp() * (p - q)).sum(1).mean()

    agree(trainer, loss, tmp_path, Mixed())


@pytest.mark.parametrize("objective", ["plain+trades", "random"])
def test_accumulation_ends_with_the_same_parameters(tmp_path, objective):
    """The Trainer's count of a batch has every probability in it, so the loss divides by their number again."""
    runs = [
        trained(tmp_path / str(count), data=Mixed(), objective=objective, gradient_accumulation_steps=count,
                per_device_train_batch_size=8 // count)
        for count in (1, 2)
    ]  # fmt: skip
    assert_same(*(parameters_of(run.model) for run in runs), rtol=1e-7, atol=1e-9)
    assert_differs(parameters_of(runs[0].model), parameters_of(tiny_model().double()))


@pytest.mark.parametrize("objective", ["fast", "pyramid", "fgm", "universal"])
def test_one_hot_probabilities_are_classes(tmp_path, objective):
    class OneHot(Pictures):
        def __init__(self):
            super().__init__()
            self.labels = torch.eye(5)[self.labels]

    runs = [trained(tmp_path / type(data).__name__, data=data, objective=objective) for data in (Pictures(), OneHot())]
    assert_same(*(parameters_of(run.model) for run in runs), rtol=1e-7, atol=1e-9)
    watched = [[entry for entry in run.state.log_history if "fast/pgd_accuracy" in entry] for run in runs]
    assert bool(watched[0]) == (objective == "fast")
    assert watched[0] == watched[1], "of probabilities the watch takes the largest"


def test_bf16_trains_with_a_collate_function_that_mixes(tmp_path):
    """Mixup in the collate function, as torchvision's documentation has it, and probabilities in bfloat16."""

    def mix(rows):
        batch = default_collate(rows)
        classes = torch.eye(5)[batch["labels"]]
        batch["pixel_values"] = 0.7 * batch["pixel_values"] + 0.3 * batch["pixel_values"].roll(1, 0)
        return batch | {"labels": (0.7 * classes + 0.3 * classes.roll(1, 0)).bfloat16()}

    trainer = trained(
        tmp_path, tiny_model(), Pictures(dtype=torch.float32), objective="plain+fast", bf16=True, data_collator=mix
    )
    before = parameters_of(tiny_model())
    assert all(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_loss_and_mean_divide_by_images():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator).softmax(1)
    each = -(labels * log_softmax(logits, 1)).sum(1)
    counted = 2 * labels.numel()  # as the Trainer counts a batch of twice as many
    torch.testing.assert_close(view_loss(logits, labels, None), each.mean())
    torch.testing.assert_close(view_loss(logits, labels, counted), each.sum() / 12)
    torch.testing.assert_close(mean_over_images(each, labels, None), each.mean())
    torch.testing.assert_close(mean_over_images(each, labels, torch.tensor(counted)), each.sum() / 12)
    half = view_loss(logits.bfloat16(), labels.bfloat16(), None)
    torch.testing.assert_close(half, cross_entropy(logits.bfloat16().float(), labels.bfloat16().float()))
    told = []
    view_loss(logits, labels, counted, loss_func=lambda *given, num_items_in_batch: told.append(num_items_in_batch))
    assert told == [12], "a user's loss gets the number of images"


def test_probabilities_that_are_none_are_refused():
    model = torch.nn.Identity()
    model.config = SimpleNamespace(num_labels=3)
    good = torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])
    check_labels({"labels": good}, model)
    check_labels({"labels": good.bfloat16()}, model)
    for wrong in (good[:, :2], good + 0.1, good - good.flip(1), good * float("nan"), good.long()):
        with pytest.raises(ValueError, match="or a probability for each class"):
            check_labels({"labels": wrong}, model)


def test_attacks_that_ascend_the_cross_entropy_take_them():
    class Logits(torch.nn.Module):
        def forward(self, pixels):
            return pixels.flatten(1)[:, :4] * torch.tensor([1.0, 2.0, 3.0, 4.0])

    pixels = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(1)) / 2 + 0.25
    labels = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.1, 0.2, 0.7]])
    copy = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(labels * log_softmax(Logits()(copy), 1)).sum(), [copy])
    torch.testing.assert_close(FGSM(0.1)(Logits(), pixels, labels), pixels + 0.1 * gradient.sign())
    with pytest.raises(ValueError, match="expected one label per image"):
        CW()(Logits(), pixels, labels)
    with pytest.raises(ValueError, match="expected one label per image"):
        FGSM(0.1)(Logits(), pixels, labels[:1])
