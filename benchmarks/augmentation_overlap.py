"""Which measured corruption an augmentation resembles: minimal sample distance (Mintun, Kirillov, Xie 2021).

    python benchmarks/augmentation_overlap.py MODEL DATA       (folders or Hub ids; training images; extra `vision`)

f(t) is the mean over images of the model's last CLS feature under the transform t. Of an augmentation so many samples
a_1, a_2, ... are drawn, each with the same parameters for all images. For every corruption c the number is

    min_i ||f(a_i) - f(c)|| / ||f(no change) - f(c)||

1: no sample is nearer to the corruption than an unchanged image; 0: a sample is the corruption, as the model sees it.
Mixup and CutMix join each image with the one before it. Writes benchmarks/results/augmentation_overlap.json.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import circumstances, keep, settings_of
from torch import Tensor

from hf_nullspace.data.augmentation import Augmentation, generator_for, seed_for
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.data.sources import load_image_dataset
from hf_nullspace.data.transforms import OF_ONE_IMAGE, OF_TWO_IMAGES, Transforms
from hf_nullspace.models.loading import load_image_processor, load_model
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.corruptions import CORRUPTIONS, corrupt

ALL_OPERATIONS = "augmix with brightness, colour, contrast, sharpness"
CROPS = "crops of at least 0.6, flips"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    for name, default in (("images", 100), ("samples", 60), ("severity", 3), ("batch", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    model = load_model(args.model).eval()
    preprocessing = Preprocessing.from_processor(load_image_processor(args.model))
    images = ImageSet(load_image_dataset(args.data, "train"), preprocessing).part(args.images)
    raw = [images.raw_image(index) for index in range(len(images))]
    pixels = torch.stack([images.pixels_from_image(image) for image in raw])

    @torch.no_grad()
    def feature(changed: list[Tensor] | Tensor) -> Tensor:
        chunks = (preprocessing.normalize(torch.stack(list(changed)))).split(args.batch)
        return torch.cat([model.base_model(chunk).last_hidden_state[:, 0] for chunk in chunks]).mean(0)

    def corrupted(name: str) -> list[Tensor]:
        changed = (corrupt(image, name, args.severity, seed=0, index=index) for index, image in enumerate(raw))
        return [images.pixels_from_image(image) for image in changed]

    clean = feature(pixels)
    targets = {name: feature(corrupted(name)) for name in CORRUPTIONS}
    rows = {}
    for name, sample in samplers(preprocessing, raw, pixels).items():
        drawn = torch.stack([feature(sample(number)) for number in range(args.samples)])
        rows[name] = {c: nearest(drawn, clean, target) for c, target in targets.items()}
        print(name, rows[name], flush=True)
    keep("augmentation_overlap", {"settings": settings_of(args), **circumstances(), "distance": rows})


def nearest(drawn: Tensor, clean: Tensor, target: Tensor) -> float:
    """min_i ||drawn_i - target|| / ||clean - target||, at most 1, of features (samples, D), (D,), (D,)."""
    return round(min(float((drawn - target).norm(dim=1).min() / (clean - target).norm()), 1.0), 3)


def samplers(preprocessing: Preprocessing, raw: list[Any], pixels: Tensor) -> dict[str, Callable[[int], list[Tensor]]]:
    """Name -> a function from the number of a sample to the changed pixels of all images."""
    from torchvision.transforms import v2

    every = v2.AugMix(all_ops=True)
    labels = torch.zeros(2, dtype=torch.int64)

    def of_one(name: str) -> Callable[[int], list[Tensor]]:
        return lambda number: [Transforms(name).change(each, seed_for(name, number)) for each in pixels]

    def of_two(name: str) -> Callable[[int], list[Tensor]]:
        def sample(number: int) -> list[Tensor]:
            pairs = torch.stack([pixels, pixels.roll(1, 0)], 1)
            return [Transforms(name).mix(pair, labels, 2, seed_for(name, number))[0] for pair in pairs]

        return sample

    def all_operations(number: int) -> list[Tensor]:
        changed = []
        for each in pixels:
            torch.manual_seed(seed_for(ALL_OPERATIONS, number))
            changed.append(every((each * 255).round().to(torch.uint8)) / 255)
        return changed

    def crops(number: int) -> list[Tensor]:
        cut = (Augmentation((0.6, 1.0)).apply(image, generator_for(CROPS, number)) for image in raw)
        return [preprocessing.pixels_from_image(image, preprocessing.size) for image in cut]

    found = {name: of_one(name) for name in OF_ONE_IMAGE} | {ALL_OPERATIONS: all_operations}
    return found | {name: of_two(name) for name in OF_TWO_IMAGES} | {CROPS: crops}


if __name__ == "__main__":
    main()
