"""Runs on images that were pixels in [0, 1], and what an attack inside of a step does, without the library."""

import torch
from torch.nn.functional import cross_entropy, log_softmax, softmax

import tiny_training
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.preprocessing import make_image_processor
from tiny_models import tiny_model
from tiny_training import Images, Recorder, assert_differs, assert_same, labelled, parameters_of, train_batches
from written_out import fine_tuned, logits_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EPS = 0.05


class Pictures(Images):
    """Images that were pixels in [0, 1] before the image processor normalised them."""

    def __init__(self, count=40, dtype=torch.float64, **given):
        super().__init__(count, torch.float64, **given)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
        self.pixel_values = ((self.pixel_values.sigmoid() - mean) / std).to(dtype)


def trained(folder, model=None, data=None, **given):
    given = {"max_grad_norm": 0.0, "attack_eps": str(EPS), "attack_steps": 3, "epsilon": 0.01} | given
    given.setdefault("processing_class", make_image_processor(16, MEAN, STD))
    return tiny_training.trained(folder, model, data if data is not None else Pictures(), **given)


def normalise(pixels):
    mean, std = (torch.tensor(values, dtype=pixels.dtype).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def denormalise(pixel_values):
    mean, std = (torch.tensor(values, dtype=pixel_values.dtype).view(1, 3, 1, 1) for values in (MEAN, STD))
    return pixel_values * std + mean


def draw(kind, seed, step, count):
    """The start of an attack: image i of step t from (seed, t, i)."""
    rows = []
    for index in range(count):
        generator = torch.Generator().manual_seed(derive_seed(seed, step, index))
        rows.append(kind(3, 16, 16, generator=generator))
    return torch.stack(rows).double()


def attack(pixels, start, loss_of, steps=3, step=EPS / 4):
    """Steps that make ``loss_of(images)`` larger, within EPS of ``pixels``."""
    adversarial = start.clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(normalise(adversarial)), [adversarial])
        moved = adversarial.detach() + step * gradient.sign()
        adversarial = (pixels + (moved - pixels).clamp(-EPS, EPS)).clamp(0, 1)
    return normalise(adversarial)


def pgd(vit, x, y, seed, t, **steps):
    """Madry's attack, from a uniform start."""
    pixels = denormalise(x)
    start = pixels + EPS * (2 * draw(torch.rand, seed, t, len(x)) - 1)
    return attack(pixels, start, lambda images: cross_entropy(logits_of(vit, images), y), **steps)


def divergence_pgd(vit, x, seed, step):
    """The attack of TRADES."""
    pixels = denormalise(x)
    start = pixels + 0.001 * draw(torch.randn, seed, step, len(x))
    clean = softmax(logits_of(vit, x), 1).detach()
    return attack(pixels, start, lambda images: (clean * (clean.log() - log_softmax(logits_of(vit, images), 1))).sum())


def agree(trainer, loss_of, tmp_path, data=None):
    """The batches are those of every run here: their order depends on the seed alone, so a plain run shows it."""
    model, data = tiny_model().double(), data if data is not None else Pictures()
    recorder = Recorder(model)
    trained(tmp_path / "order", model, data, objective="plain")
    batches = labelled(train_batches(recorder), data)
    assert len(batches) == 4
    theirs, _ = fine_tuned(batches, loss_of)
    assert_same(parameters_of(trainer.model), parameters_of(theirs), rtol=1e-7, atol=1e-9)
    assert_differs(parameters_of(theirs), parameters_of(tiny_model().double()))
