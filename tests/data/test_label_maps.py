"""Labels of the data against the model's head."""

import pytest
from transformers import ViTConfig

from hf_nullspace.data.label_maps import align_labels

MODEL = ["Tabby Cat", "sports_car", "dog", "T-shirt"]


def config(names):
    return ViTConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def test_the_same_names_in_the_same_order():
    alignment = align_labels(["tabby cat", "Sports Car", "DOG", "t_shirt"], config(MODEL))
    assert (alignment.remap, alignment.new_head) == (None, False)
    assert alignment.id2label == dict(enumerate(MODEL))  # the model's spelling stays
    assert alignment.label2id == {"Tabby Cat": 0, "sports_car": 1, "dog": 2, "T-shirt": 3}
    assert "the model's 4 classes in the model's order" in alignment.message


def test_another_order_is_renumbered_by_name():
    alignment = align_labels(["dog", "tshirt", "tabby_cat", "sports car"], config(MODEL))
    assert (alignment.remap, alignment.new_head) == ((2, 3, 0, 1), False)
    assert "another order" in alignment.message


@pytest.mark.parametrize(("names", "remap"), [(["dog", "tabby cat"], (2, 0)), (["tabby cat", "sports car"], None)])
def test_a_part_of_the_models_classes_keeps_the_head(names, remap):
    alignment = align_labels(names, config(MODEL))
    assert (alignment.remap, alignment.new_head, alignment.num_labels) == (remap, False, 4)
    assert "2 of the model's 4 classes" in alignment.message


def test_data_without_names():
    assumed = align_labels(None, config(MODEL), num_classes=4)
    assert (assumed.remap, assumed.new_head, assumed.id2label[0]) == (None, False, "Tabby Cat")
    assert "4 classes have no names; they are taken to be the model's" in assumed.message
    unknown = align_labels(None, config(MODEL))
    assert not unknown.new_head
    other = align_labels(None, config(MODEL), num_classes=3)
    assert (other.new_head, other.id2label) == (True, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    assert "New classifier head for 3 classes" in other.message


def test_a_model_with_placeholder_names():
    nameless = ViTConfig(num_labels=2)
    assert nameless.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    kept = align_labels(["cat", "dog"], nameless)
    assert (kept.new_head, kept.remap, kept.id2label) == (False, None, {0: "cat", 1: "dog"})
    assert "have no names; they are taken to be the data's" in kept.message
    assert align_labels(["cat", "dog", "ant"], nameless).new_head


def test_other_classes_get_a_new_head_and_say_so():
    alignment = align_labels(["0", "1", "2", "3"], config(MODEL))
    assert (alignment.new_head, alignment.remap) == (True, None)
    assert alignment.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert alignment.message == (
        "New classifier head for 4 classes: 4 of the data's 4 classes are not in the model ('0', '1', '2', ...)."
    )
    assert (
        "1 of the data's 3 classes are not in the model ('bus')"
        in align_labels(["dog", "bus", "T-shirt"], config(MODEL)).message
    )


def test_names_that_stand_for_two_classes():
    cranes = config(["crane", "maillot", "crane", "dog"])  # as in ImageNet: the bird and the machine
    assert not align_labels(["crane", "maillot", "crane", "dog"], cranes).new_head
    confused = align_labels(["dog", "crane", "crane", "maillot"], cranes)
    assert confused.new_head
    assert "stand for more than one class: 'crane'" in confused.message
    part = align_labels(["dog", "maillot"], cranes)  # these two are clear
    assert (part.new_head, part.remap) == (False, (3, 1))


def test_imagenet_folders_by_wordnet_id():
    names = [f"class {i}" for i in range(1000)]
    for index, name in {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 207: "golden retriever"}.items():
        names[index] = name
    names[407], names[817], names[999] = "ambulance", "sports car, sport car", "toilet tissue, toilet paper"
    wnids = [f"n{i:08d}" for i in range(1000)]
    kept = align_labels(wnids, config(names))
    assert (kept.new_head, kept.remap, kept.id2label[0]) == (False, None, "tench, Tinca tinca")
    assert align_labels(wnids, config(names[::-1])).new_head  # a head in another order is not trusted
    assert align_labels(wnids[:-1], config(names)).new_head
