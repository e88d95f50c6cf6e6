"""Labels of the data against the model's head."""

import pytest
from transformers import ViTConfig

from hf_nullspace.data.label_maps import align_labels

MODEL = ["Tabby Cat", "sports_car", "dog", "T-shirt"]
CRANES = ["crane", "maillot", "crane", "dog"]  # as in ImageNet: the bird and the machine
NAMELESS = ["LABEL_0", "LABEL_1"]
WNIDS = [f"n{i:08d}" for i in range(1000)]
KNOWN = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 207: "golden retriever", 407: "ambulance"}
KNOWN |= {817: "sports car, sport car", 999: "toilet tissue, toilet paper"}
IMAGENET = [KNOWN.get(i, f"class {i}") for i in range(1000)]


@pytest.mark.parametrize(
    ("names", "model", "remap", "id2label", "message"),
    [
        # The same classes: the model's spelling stays
        (["tabby cat", "Sports Car", "DOG", "t_shirt"], MODEL, None, MODEL, "the model's 4 classes in the model's ord"),
        (["dog", "tshirt", "tabby_cat", "sports car"], MODEL, (2, 3, 0, 1), MODEL, "another order"),
        (CRANES, CRANES, None, CRANES, "in the model's order"),
        # Some of them
        (["dog", "tabby cat"], MODEL, (2, 0), MODEL, "2 of the model's 4 classes"),
        (["tabby cat", "sports car"], MODEL, None, MODEL, "2 of the model's 4 classes"),
        (["dog", "maillot"], CRANES, (3, 1), CRANES, "2 of the model's 4 classes"),
        # Names on one side
        (None, MODEL, None, MODEL, "labels have no names; they are taken to be the model's 4"),
        (4, MODEL, None, MODEL, "4 classes have no names; they are taken to be the model's"),
        (["cat", "dog"], NAMELESS, None, ["cat", "dog"], "have no names; they are taken to be the data's"),
        (WNIDS, IMAGENET, None, IMAGENET, "1000 WordNet ids"),
    ],
)
def test_the_head_is_kept(names, model, remap, id2label, message):
    alignment = aligned(names, model)
    assert (alignment.remap, alignment.new_head, alignment.num_labels) == (remap, False, len(model))
    assert alignment.id2label == dict(enumerate(id2label))
    assert alignment.label2id == {name: index for index, name in enumerate(id2label)}
    assert message in alignment.message


@pytest.mark.parametrize(
    ("names", "model", "message"),
    [
        (["0", "1", "2", "3"], MODEL, "4 of the data's 4 classes are not in the model ('0', '1', '2', ...)."),
        (["dog", "bus", "T-shirt"], MODEL, "1 of the data's 3 classes are not in the model ('bus')"),
        (3, MODEL, "3 classes: the data's classes have no names, and the model has 4."),
        (["cat", "dog", "ant"], NAMELESS, "the model has 2 classes without names, the data has 3"),
        (["dog", "crane", "crane", "maillot"], CRANES, "stand for more than one class: 'crane'"),
        (WNIDS, IMAGENET[::-1], "not in the model"),  # a head in another order is not trusted
        (WNIDS[:-1], IMAGENET, "not in the model"),
    ],
)
def test_other_classes_get_a_new_head_and_say_so(names, model, message):
    alignment = aligned(names, model)
    expected = [f"LABEL_{index}" for index in range(names)] if isinstance(names, int) else names
    assert (alignment.remap, alignment.new_head, alignment.id2label) == (None, True, dict(enumerate(expected)))
    assert alignment.message.startswith(f"New classifier head for {len(expected)} classes: ")
    assert message in alignment.message


def aligned(names, model):
    """``names`` of the data, or their number where they have none."""
    config = ViTConfig(id2label=dict(enumerate(model)), label2id={name: index for index, name in enumerate(model)})
    return align_labels(None, config, num_classes=names) if isinstance(names, int) else align_labels(names, config)
