"""Run by every process of a launch: evaluate 103 images under several conditions and write down what this rank got.

``main(FOLDER)``; FOLDER/rank-R.json holds the results of rank R.
"""

import json
from pathlib import Path

import datasets
import evaluate as hf_evaluate
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import nn

import hf_nullspace
from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.data.image_stream import ImageStream
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.attacks.gradient import FGSM, PGD
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.records import Records, evaluate_resumably
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted, evaluate
from tiny_models import LABELS, tiny_model

N, CLASSES = 103, len(LABELS["id2label"])
CONDITIONS = [Clean(), Corrupted("gaussian_noise", 4), Attacked(FGSM(4 / 255)), Attacked(PGD(4 / 255, steps=2))]
PLAIN = Preprocessing((0.5,) * 3, (0.25,) * 3, (16, 16), None)
METRIC = Path(hf_nullspace.__file__).parent / "metrics" / "robustness"


class Noise(ImageSet):
    """103 images that their seed alone decides, labelled by the model on odd places."""

    def __init__(self, model: nn.Module):
        rng = np.random.default_rng(0)
        self.images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(N)]
        with torch.no_grad():
            predicted = model(torch.stack([PLAIN.pixels_from_image(image) for image in self.images])).argmax(1)
        self.labels = [int(p) if i % 2 else i % CLASSES for i, p in enumerate(predicted)]
        super().__init__(ArrayRows(self.images, self.labels), PLAIN)


def streamed(images: Noise) -> ImageStream:
    rows = datasets.Dataset.from_dict({"image": images.images, "label": images.labels})
    return ImageStream(rows.to_iterable_dataset(), PLAIN, expected=N)


def main(folder: Path) -> None:
    hf_evaluate.config.HF_MODULES_CACHE = str(folder / "modules")
    state = PartialState(cpu=True)
    vit = tiny_model().double()
    with torch.no_grad():
        vit.classifier.weight.mul_(30)
    model = PixelModel(vit, (0.5,) * 3, (0.25,) * 3)
    images = Noise(model)
    found = {}
    ways = {
        "seven": (images, 7),
        "all": (images, 200),
        "stream": (streamed(images), 16),
        "memory": (images.in_memory(), 10),
    }
    for name, (read, batch_size) in ways.items():
        results = evaluate(model, read, CONDITIONS, batch_size=batch_size, seed=5, progress=name == "seven")
        found[name] = {r.condition: [int(bit) for bit in r.correct] for r in results}
    folder_of_rank = folder / f"records-{state.process_index}"  # no shared disk: rank 1 finds nothing of its own
    for _ in range(2):
        results, _ = evaluate_resumably(
            Records(folder_of_rank), model, images, {"clean": Clean()},
            batch_size=9, seed=5, dtype="float64", progress=False,
        )  # fmt: skip
    found["resumed"] = {"clean": [int(bit) for bit in results["clean"].correct]}
    metric = hf_evaluate.load(
        str(METRIC), num_process=state.num_processes, process_id=state.process_index,
        experiment_id="test", cache_dir=str(folder / "cache"),
    )  # fmt: skip
    mine = range(state.process_index, N, state.num_processes)
    for i in mine:
        prediction = images.labels[i] if found["seven"]["clean"][i] else (images.labels[i] + 1) % CLASSES
        metric.add(prediction=prediction, reference=images.labels[i], condition="clean")
    answer = metric.compute()
    found["metric"] = None if answer is None else answer["accuracy"]
    (folder / f"rank-{state.process_index}.json").write_text(json.dumps(found))
    state.destroy_process_group()
