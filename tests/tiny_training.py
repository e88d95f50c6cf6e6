"""Tiny data sets and settings for the trainer's tests: every run takes well under a second."""

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback, TrainingArguments

from hf_nullspace.data.augmentation import Augmentation
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.data.transforms import Transforms
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.robustness.attacks.gradient import FGSM
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import tiny_model


class Images(torch.utils.data.Dataset):
    """Random images with labels; ``jitter`` draws an augmentation from (seed, epoch, index), as the real ones do."""

    def __init__(self, count=40, dtype=torch.float32, jitter=0.0, labels=5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.pixel_values = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(labels, (count,), generator=generator)
        self.jitter, self.key = jitter, ("epoch", 0)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.pixel_values[index]
        if self.jitter:
            kind = 0 if self.key[0] == "epoch" else 1
            generator = np.random.default_rng((kind, *self.key[1:], index))
            image = image + self.jitter * torch.from_numpy(generator.standard_normal(image.shape)).to(image.dtype)
        return {"pixel_values": image, "labels": self.labels[index]}

    def set_epoch(self, epoch):
        self.key = ("epoch", epoch)


def augmented(names, count=40):
    """Images of the package's own data set, with crops, flips and the transforms ``names``; torchvision is needed."""
    import torchvision_here

    assert torchvision_here.why_missing() is None
    random = np.random.default_rng(5)
    rows = [{"image": random.integers(0, 256, (18, 20, 3), np.uint8), "label": i % 5} for i in range(count)]
    processing = Preprocessing.from_processor(make_image_processor(16))
    return ImageSet(rows, processing, augmentation=Augmentation(), transforms=Transforms(names), num_labels=5, seed=2)


CONDITIONS = [Clean(), Attacked(FGSM(4 / 255)), Corrupted("contrast", 3), Corrupted("contrast", 5)]
"""What a tiny model can be measured under."""


def pictures(count, labels=None, kind=ImageSet):
    """Drawn images of 16 pixels as a set to measure on; the labels are drawn, too, unless they are given."""
    random = np.random.default_rng(5)
    labels = random.integers(5, size=count) if labels is None else labels
    pixels = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(p), "label": int(label)} for p, label in zip(pixels, labels, strict=True)]
    return kind(rows, Preprocessing((0.5,) * 3, (0.5,) * 3, (16, 16), None))


class Recorder(torch.nn.Module):
    """Keeps the images that a model's patch embedding is given, in the order of the forward passes: (training?, x)."""

    def __init__(self, model):
        super().__init__()
        self.seen = []
        model.get_input_embeddings().register_forward_pre_hook(self._keep)

    def _keep(self, module, args):
        self.seen.append((module.training, args[0].detach().clone()))


def config(folder, **given):
    """Two rounds of two steps, four noise steps of Algorithm 1 each, nothing saved, on the CPU."""
    short = {
        "output_dir": str(folder),
        "preset": "descent",
        "rounds": 2,
        "steps_per_round": 2,
        "per_device_train_batch_size": 8,
        "noise_max_steps": 4,
        "noise_batch_size": 8,
        "held_out_images": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    if "rounds" in given and given["rounds"] is None:
        del short["rounds"], short["steps_per_round"]
    return NullspaceConfig(**{**short, **given})


def parameters_of(model):
    """Name -> a copy of each parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(ours, theirs, **tolerance):
    """Two dictionaries of tensors are equal: bit for bit, or within ``rtol`` and ``atol``."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if tolerance:
            torch.testing.assert_close(value, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(value, theirs[name]), name


def assert_differs(ours, theirs):
    """Some tensor differs."""
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


class RoundRecorder(TrainerCallback):
    """(optimizer step, round) whenever a noise was learned."""

    def __init__(self):
        self.rounds = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "noise/round" in logs:
            self.rounds.append((state.global_step, logs["noise/round"]))


def trained(folder, model=None, data=None, resume=False, **given):
    """A trainer after its run, or the rest of it from a checkpoint; in float64 unless model and data are given."""
    names = ("callbacks", "compute_loss_func", "compute_metrics", "data_collator", "eval_dataset", "processing_class")
    named = {name: given.pop(name) for name in names if name in given}
    data = data if data is not None else Images(dtype=torch.float64)
    model = model if model is not None else tiny_model().double()
    trainer = NullspaceTrainer(model, config(folder, **given), train_dataset=data, **named)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def plain_arguments(folder, **given):
    """Settings of transformers' own Trainer for four steps."""
    short = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), report_to="none", **short, **given)


def train_batches(recorder):
    """The images of the training steps, whose two views go through the model one after the other on a CPU."""
    passes = [images for training, images in recorder.seen if training and len(images) > 1]  # one asks for a shape
    clean, noisy = passes[::2], passes[1::2]
    assert all(torch.equal(a, b) for a, b in zip(clean, noisy, strict=True))
    return clean


def labelled(batches, data):
    """(images, their labels) of every batch of ``data``."""
    return [
        (x, torch.stack([data.labels[(data.pixel_values == image).flatten(1).all(1)][0] for image in x]))
        for x in batches
    ]


def logged(trainer, name):
    """The values of this name in a trainer's log, in their order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def accuracy(prediction):
    """A ``compute_metrics``."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
