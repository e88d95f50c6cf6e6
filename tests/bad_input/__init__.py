"""What the rows of ``python.txt`` may name."""

# ruff: noqa: F401 (the rows use them)

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nan, tensor, zeros

from hf_nullspace import metric_folder
from hf_nullspace.core.settings import check_numbers
from hf_nullspace.core.uploads import push_folder
from hf_nullspace.explain.lrp import lrp_map
from hf_nullspace.explain.maps import saliency_maps
from hf_nullspace.hub.checkpoint_files import read_checkpoint
from hf_nullspace.hub.convert import read_labels, timm_image_processor
from hf_nullspace.invisible.ownership import fingerprint, verify_owner
from hf_nullspace.linear.box import nearest_in_box
from hf_nullspace.linear.layer_norm import exact_encoder_nullspace
from hf_nullspace.linear.patch import PatchNullspace, split_patches
from hf_nullspace.models.attention import attention_weights
from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.patch_embedding import find_patch_embedding, patch_embedding_noise
from hf_nullspace.models.preprocessing import Preprocessing, make_image_processor, rgb_image
from hf_nullspace.noise.algorithm1 import NoiseSettings, learn_noise
from hf_nullspace.noise.artifact import NullspaceNoise
from hf_nullspace.noise.bank import NoiseBank
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.calibration import calibrate
from hf_nullspace.noise.closure import combinations, scaling
from hf_nullspace.noise.pixels import pixel_preimage
from hf_nullspace.robustness.attacks.auto import AutoAttack
from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD
from hf_nullspace.robustness.attacks.patch_fool import PatchFool
from hf_nullspace.robustness.corruptions import corrupt
from hf_nullspace.robustness.label_spaces import imagenet_columns, wnids
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.plans import load_plan, parse_entry
from hf_nullspace.robustness.scores import (
    accuracy,
    corruption_error,
    expected_calibration_error,
    mean_corruption_error,
    nine_column_average,
    paired_difference,
    paired_mean_difference,
    wilson,
    worst_condition,
)
from hf_nullspace.robustness.sets import load_cifar10_c, load_set
from hf_nullspace.robustness.suite import Clean, Corrupted, evaluate
from hf_nullspace.training.augmentation import Augmentation
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.data import ImageClassificationDataset
from hf_nullspace.training.loading import DataArguments, ModelArguments
from hf_nullspace.training.noise_stream import noise_stream
from hf_nullspace.training.objectives import register_objective
from hf_nullspace.training.preflight import check_images
from hf_nullspace.training.sources import load_image_dataset
from hf_nullspace.training.trainer import NullspaceTrainer
from study.design import make_study
from tiny_models import tiny_model, tiny_resnet
from tiny_training import Images


def namespace(places, folder):
    """Every name that a row may use; ``folder`` is a new one, ``places`` those that the tests share."""
    model = tiny_model()
    preprocessing = Preprocessing.from_processor(make_image_processor(16))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rgb = Image.new("RGB", (16, 16), "red")

    def config(**given):
        return NullspaceConfig(**{"output_dir": str(folder), "use_cpu": True, "report_to": "none"} | given)

    def trainer(count=8, **given):
        short = {"rounds": 1, "steps_per_round": 1, "global_batch_size": 4, "noise_batch_size": 4}
        return NullspaceTrainer(model, config(**short | given), train_dataset=Images(count=count))

    def metric(**given):
        import evaluate as library

        module = library.load(metric_folder())
        answers = {"predictions": [0, 1], "references": [0, 0], "condition": ["clean", "clean"]}
        return module.compute(**answers | given)

    def study(arms='{"plain": {"objective": "plain"}}', **given):
        small = {"control": "plain", "seeds": [0], "learning_rates": [0.1], "conditions": ["clean"]}
        return make_study(arms, **small | {"average": ["clean"], "report": "0:4", "selection": None} | given)

    def images_of(rows, **given):
        return ImageClassificationDataset(rows, preprocessing, **given)

    def with_noise(noise, model=model):
        with patch_embedding_noise(model, noise):
            return model(images)

    def attacked(attack, pixels=images, labels=None, seeds=(1, 2, 3, 4)):
        labels = torch.zeros(4, dtype=torch.long) if labels is None else labels
        return attack(PixelModel(model, preprocessing.mean, preprocessing.std), pixels, labels, seeds=seeds)

    made = {
        "folder": folder,
        "g": torch.Generator().manual_seed(0),
        "model": model,
        "resnet": tiny_resnet(),
        "pre": preprocessing,
        "images": images,
        "rgb": rgb,
        "rows": [{"image": rgb, "label": 0}],
        "noise": NullspaceNoise(torch.ones(1, 16, 24), (4, 4)),
        "patches": PatchNullspace.from_model(model),
        "pixels_of": PixelModel,
        "config": config,
        "trainer": trainer,
        "metric": metric,
        "study": study,
        "images_of": images_of,
        "attacked": attacked,
        "with_noise": with_noise,
    }
    return {name: str(place) for name, place in places.items()} | globals() | made
