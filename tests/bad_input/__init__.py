"""What the rows of ``python.txt`` may name."""

import functools
import importlib
import pkgutil
from collections import Counter

import datasets
import evaluate as library
import numpy as np
import torch
import transformers
from PIL import Image

import hf_nullspace
from hf_nullspace.data.columns import find_columns
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.models.patch_embedding import patch_embedding_noise
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor
from hf_nullspace.noise.artifact import NullspaceNoise
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.trainer import NullspaceTrainer
from study.arguments import CompareArguments
from study.design import make_study
from tiny_models import tiny_model, tiny_resnet
from tiny_training import Images


@functools.cache
def functions_and_classes():
    """Those of the whole package, by their names; of two of the same name neither."""
    names = [module.name for module in pkgutil.walk_packages(hf_nullspace.__path__, "hf_nullspace.")]
    found = [
        (name, value)
        for module in map(importlib.import_module, names)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    count = Counter(name for name, _ in found)
    return {name: value for name, value in found if count[name] == 1}


def namespace(places, folder):
    """Every name that a row may use; ``folder`` is a new one, ``places`` those that the tests share."""
    model = tiny_model()
    preprocessing = Preprocessing.from_processor(make_image_processor(16))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rgb = Image.new("RGB", (16, 16), "red")

    def config(**given):
        return NullspaceConfig(**{"output_dir": str(folder), "use_cpu": True, "report_to": "none"} | given)

    class Bare(torch.nn.Module):
        vit = model

        def get_input_embeddings(self):
            return self.vit.get_input_embeddings()

    def trainer(model=model, count=8, processing_class=None, **given):
        short = {"rounds": 1, "steps_per_round": 1, "global_batch_size": 4, "noise_batch_size": 4}
        named = {"train_dataset": Images(count=count), "processing_class": processing_class}
        return NullspaceTrainer(model, config(**short | {"held_out_images": 2} | given), **named)

    def with_config(**changed):
        other = tiny_model()
        for name, value in changed.items():
            setattr(other.config, name, value)
        return other

    def with_head(classes):
        other = tiny_model()
        other.classifier = torch.nn.Linear(24, classes)
        return other

    def metric(**given):
        module = library.load(
            hf_nullspace.metric_folder(), cache_dir=str(folder)
        )  # else it waits for the lock of others
        answers = {"predictions": [0, 1], "references": [0, 0], "condition": ["clean", "clean"]}
        return module.compute(**answers | given)

    def measured(condition, reference):
        right = [int(name == "clean") for name in condition]
        answers = {"predictions": right, "references": [1] * len(right), "condition": condition}
        return metric(**answers, reference_errors=reference)

    def study(arms='{"plain": {"objective": "plain"}}', **given):
        small = {"control": "plain", "seeds": [0], "learning_rates": [0.1], "conditions": ["clean"]}
        return make_study(CompareArguments(arms=arms, **small | {"average": ["clean"], "report": "0:4"} | given))

    def arms(**more):
        return {"plain": {"objective": "plain"}} | {name: {"objective": "random"} | arm for name, arm in more.items()}

    def images_of(rows, **given):
        return ImageSet(rows, preprocessing, **given)

    def with_noise(noise, model=model):
        with patch_embedding_noise(model, noise):
            return model(images)

    def attacked(attack, pixels=images, labels=None, seeds=(1, 2, 3, 4)):
        labels = torch.zeros(4, dtype=torch.long) if labels is None else labels
        return attack(PixelModel(model, preprocessing.mean, preprocessing.std), pixels, labels, seeds=seeds)

    def columns(label_column=None, **features):
        return find_columns(datasets.Features(features), label_column=label_column)

    made = {
        "columns": columns,
        "picture": datasets.Image(),
        "number": datasets.Value("int64"),
        "folder": folder,
        "g": torch.Generator().manual_seed(0),
        "model": model,
        "resnet": tiny_resnet(),
        "bare": Bare(),
        "with_config": with_config,
        "with_head": with_head,
        "pre": preprocessing,
        "images": images,
        "rgb": rgb,
        "rows": [{"image": rgb, "label": 0}],
        "noise": NullspaceNoise(torch.ones(1, 16, 24), (4, 4)),
        "patches": PatchNullspace.from_model(model),
        "pixels_of": PixelModel,
        "Images": Images,
        "tiny_model": tiny_model,
        "config": config,
        "trainer": trainer,
        "metric": metric,
        "measured": measured,
        "fog": [f"fog/{severity}" for severity in range(1, 6)],
        "study": study,
        "arms": arms,
        "images_of": images_of,
        "attacked": attacked,
        "with_noise": with_noise,
    }
    libraries = {"datasets": datasets, "transformers": transformers, "np": np, "torch": torch, "Image": Image}
    libraries |= {"nan": torch.nan, "tensor": torch.tensor, "zeros": torch.zeros}
    return {name: str(place) for name, place in places.items()} | functions_and_classes() | libraries | made
