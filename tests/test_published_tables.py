"""Every table of constants that was published, a second time and literally, from its source; compared exactly."""

import hashlib

import numpy as np
import pytest
import torch

from figures.table_4 import TABLE_4
from figures.table_5 import TABLE_5
from hf_nullspace.data.label_maps import IMAGENET_ANCHORS
from hf_nullspace.hub.convert import NORMALIZATIONS
from hf_nullspace.hub.timm_vit import SIZES
from hf_nullspace.robustness import published
from hf_nullspace.robustness.corruption_functions import frost_overlays
from hf_nullspace.robustness.corruptions import CIFAR, CORRUPTIONS, IMAGENET, SEVERITIES, SMALL
from hf_nullspace.robustness.label_spaces import class_names, wnids
from hf_nullspace.robustness.sets import SETS

# github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py: ``c`` of each function, severities 1 to 5.
CIFAR_C = """
gaussian_noise      0.04 | 0.06 | .08 | .09 | .10
shot_noise          500 | 250 | 100 | 75 | 50
impulse_noise       .01 | .02 | .03 | .05 | .07
defocus_blur        0.3 0.4 | 0.4 0.5 | 0.5 0.6 | 1 0.2 | 1.5 0.1
glass_blur          0.05 1 1 | 0.25 1 1 | 0.4 1 1 | 0.25 1 2 | 0.4 1 2
motion_blur         6 1 | 6 1.5 | 6 2 | 8 2 | 9 2.5
snow                0.1 0.2 1 0.6 8 3 0.95 | 0.1 0.2 1 0.5 10 4 0.9 | 0.15 0.3 1.75 0.55 10 4 0.9 | \
                    0.25 0.3 2.25 0.6 12 6 0.85 | 0.3 0.3 1.25 0.65 14 12 0.8
frost               1 0.2 | 1 0.3 | 0.9 0.4 | 0.85 0.4 | 0.75 0.45
fog                 .2 3 | .5 3 | 0.75 2.5 | 1 2 | 1.5 1.75
brightness          .05 | .1 | .15 | .2 | .3
contrast            .75 | .5 | .4 | .3 | 0.15
elastic_transform   0 0 0.08 | 0.05 0.2 0.07 | 0.08 0.06 0.06 | 0.1 0.04 0.05 | 0.1 0.03 0.03
pixelate            0.95 | 0.9 | 0.85 | 0.75 | 0.65
jpeg_compression    80 | 65 | 58 | 50 | 40
"""
# The same repository, make_imagenet_c.py; the other eight corruptions of large images are the library's.
IMAGENET_C = """
gaussian_noise      .08 | .12 | 0.18 | 0.26 | 0.38
shot_noise          60 | 25 | 12 | 5 | 3
impulse_noise       .03 | .06 | .09 | 0.17 | 0.27
brightness          .1 | .2 | .3 | .4 | .5
contrast            0.4 | .3 | .2 | .1 | .05
pixelate            0.6 | 0.5 | 0.4 | 0.3 | 0.25
jpeg_compression    25 | 18 | 15 | 10 | 7
"""
# make_cifar_c.py again: np.arange(1, stop, 0.01). Rounding lets the first two reach their stop.
CIFAR_C_ZOOMS = [(7, 1.06), (12, 1.11), (16, 1.15), (21, 1.20), (26, 1.25)]

# Hendrycks & Dietterich 2019, section 4.1: the fifteen of the benchmark, and the place of each in our seeds.
FIFTEEN = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness "
    "contrast elastic_transform pixelate jpeg_compression"
)

# github.com/google-research/augmix, imagenet.py: ALEXNET_ERR, "taken from hendrycks/robustness"; in FIFTEEN's order.
ALEXNET = (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324,
           0.564592, 0.853204, 0.646056, 0.717840, 0.606500)  # fmt: skip
ALEXNET_CLEAN = 100 - 56.522  # torchvision's AlexNet: its accuracy

# Table 1 of the paper, the rows that are quoted. "_" was not given.
TABLE_1 = """
                  Clean PatchFool    CW   MIM  FGSM DamageNet     A     C    V2     R Sketch Stylized Average
ViT-S             74.19      0.68  0.18     _ 13.79     29.82 16.35 71.13 62.51 34.67  14.26    12.15   31.85
ViT-S+NS          77.47     19.10  2.38     _ 25.95     32.43 20.77 55.98 66.5  41.61  25.67    16.02   38.94
ViT-B             77.68     15.92  0.56 81.72 25.65     38.69 23.88 62.16 66.05 41.63  16.31    17.97   38.41
ViT-B+NS          81.42     23.52  2.36 74.72 36.50     40.44 24.55 47.82 70.25 44.85  26.35    19.02   43.95
ViT-B+DAT         81.47     22.64  0.76 70.28 48.80     43.31 23.83 45.95 70.24 48.68  36.94    23.99   47.92
ViT-B+DAT+NS      81.33     24.14  0.88 71.18 48.98     43.67 24.22 45.91 70.14 48.48  37.25    23.87   48.01
"""
# Table 4: patch size, embedding dimension, nullspace dimension.
TABLE_4_ROWS = ((16, 192, 576), (32, 384, 2688), (16, 384, 384), (32, 768, 2304), (16, 768, 2), (8, 768, 0),
                (32, 1024, 2048), (16, 1024, 0))  # fmt: skip
# Table 5: fine-tuning step, MSE probability.
TABLE_5_COLUMNS = ((40, 0.028), (120, 0.027), (160, 0.026), (280, 0.029), (360, 0.028), (440, 0.029), (520, 0.027),
                   (600, 0.025), (680, 0.028), (760, 0.026))  # fmt: skip

# Images and classes, as each set's own page or paper counts them.
COUNTS = {
    "imagenet-1k": (50_000, None),  # Russakovsky et al. 2015, table 2: validation
    "imagenet-a": (7_500, 200),  # Hendrycks et al. 2021, "Natural Adversarial Examples"
    "imagenet-r": (30_000, 200),  # Hendrycks et al. 2021, "The Many Faces of Robustness"
    "imagenet-v2": (10_000, None),  # Recht et al. 2019
    "imagenet-sketch": (50_889, None),  # Wang et al. 2019
    "stylized-imagenet": (50_000, None),  # Geirhos et al. 2019: the validation images
    "damagenet": (50_000, None),  # Chen et al. 2022
}
# SHA-256 of the wnids, one a line and sorted, of eval.py in github.com/hendrycks/imagenet-r (``all_wnids``,
# ``imagenet_r_wnids``) and /natural-adv-examples (``thousand_k_to_200``, as wnids).
WNIDS = {
    "imagenet-1k": "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd",
    "imagenet-a": "f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520",
    "imagenet-r": "e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624",
}
NAMES = "035b5ab45535c08f365a90fccab178b3207400ac1b652ad7951610cbf92b75f1"  # "wnid name", one a line


def severities(text):
    """corruption -> a number or a tuple of numbers per severity."""
    rows = (line.partition(" ") for line in text.strip().splitlines())
    cells = {name: [tuple(map(float, cell.split())) for cell in rest.split("|")] for name, _, rest in rows}
    return {name: tuple(cell if len(cell) > 1 else cell[0] for cell in row) for name, row in cells.items()}


@pytest.mark.parametrize(("table", "source"), [(CIFAR, CIFAR_C), (IMAGENET, IMAGENET_C)])
def test_severities_of_corruptions(table, source):
    assert {name: row for name, row in table.items() if name != "zoom_blur"} == severities(source)


def test_zooms_and_the_order_of_corruptions():
    assert [(len(row), round(row[-1], 9)) for row in CIFAR["zoom_blur"]] == CIFAR_C_ZOOMS
    for row in CIFAR["zoom_blur"]:
        np.testing.assert_allclose(row, 1 + np.arange(len(row)) / 100, rtol=1e-12)
    assert tuple(FIFTEEN.split()) == CORRUPTIONS
    assert (SEVERITIES, SMALL) == ((1, 2, 3, 4, 5), 64)
    assert len(frost_overlays()) == 5


def test_alexnets_errors():
    percent = [round(100 * error, 4) for error in ALEXNET]
    assert list(published.ALEXNET_ERRORS.items()) == list(zip(FIFTEEN.split(), percent, strict=True))
    assert pytest.approx(ALEXNET_CLEAN, abs=1e-9) == published.ALEXNET_CLEAN_ERROR
    assert published.ALEXNET_ERRORS["fog"] == 81.9324


def test_table_1():
    head, *rows = (line.split() for line in TABLE_1.strip().splitlines())
    ours = {"clean": "Clean", "DAmageNet": "DamageNet", "average": "Average"}
    assert [ours.get(column, column) for column in published.TABLE_1_COLUMNS] == head
    assert [name.removesuffix(" (quoted)").replace(" ", "") for name in published.TABLE_1] == [row[0] for row in rows]
    for found, (_, *numbers) in zip(published.TABLE_1.values(), rows, strict=True):
        assert list(found.values()) == [None if number == "_" else float(number) for number in numbers]


def test_tables_4_and_5():
    assert {(features, patch): dimension for patch, features, dimension in TABLE_4_ROWS} == TABLE_4
    assert dict(TABLE_5_COLUMNS) == TABLE_5


def test_sizes_of_robustness_sets():
    counts = {name: (info.images, info.subset and len(info.subset)) for name, info in SETS.items()}
    corrupted = {name: counts.pop(name) for name in list(counts) if name.startswith("imagenet-c/")}
    assert counts == COUNTS
    assert corrupted == {f"imagenet-c/{c}/{s}": (50_000, None) for c in FIFTEEN.split() for s in range(1, 6)}


def digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_label_maps():
    assert {space: digest(wnids(space)) for space in WNIDS} == WNIDS
    assert [len(wnids(space)) for space in WNIDS] == [1000, 200, 200]
    assert digest(f"{wnid} {name}" for wnid, name in sorted(class_names().items())) == NAMES
    anchors = {0: "tench", 1: "goldfish", 207: "goldenretriever", 407: "ambulance", 817: "sportscar", 999: "toilet"}
    assert anchors == IMAGENET_ANCHORS
    names = list(class_names().values())
    assert all(names[i].partition(",")[0].replace(" ", "").startswith(anchor) for i, anchor in IMAGENET_ANCHORS.items())


def test_vit_sizes_and_normalisations():
    """Dosovitskiy et al. 2021, table 1 (B, L, H); Touvron et al. 2021, table 1 (Ti, S); Zhai et al. 2022, table 2."""
    assert SIZES == {
        "tiny": (192, 12, 3), "small": (384, 12, 6), "medium": (512, 12, 8), "base": (768, 12, 12),
        "large": (1024, 24, 16), "huge": (1280, 32, 16), "giant": (1408, 40, 16), "gigantic": (1664, 48, 16),
    }  # fmt: skip
    torch.testing.assert_close(  # torchvision's documentation of its pre-trained models; Google's ViTs map to [-1, 1]
        torch.tensor([*NORMALIZATIONS["imagenet"], *NORMALIZATIONS["augreg"]]),
        torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
        rtol=0,
        atol=0,
    )
