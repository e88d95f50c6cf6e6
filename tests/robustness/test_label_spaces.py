"""The mappings that cost 20% when they are wrong."""

import random

import pytest

from hf_nullspace.robustness.label_spaces import (
    LabelError,
    check_wnids,
    class_names,
    imagenet_columns,
    imagenet_labels,
    indices,
    wnids,
)


def test_the_lists_are_the_published_ones():
    """Checked once against the authors' eval.py and, independently, timm's index lists; here by known entries."""
    assert len(wnids()) == 1000
    assert list(wnids()) == sorted(set(wnids()))
    known = {"n01440764": 0, "n01443537": 1, "n02099601": 207, "n03444034": 573, "n15075141": 999}
    assert {wnid: wnids().index(wnid) for wnid in known} == known
    for space, first, last, total in [("imagenet-a", 6, 988, 102178), ("imagenet-r", 1, 988, 86135)]:
        assert len(indices(space)) == 200 == len(set(indices(space)))
        assert (indices(space)[0], indices(space)[-1]) == (first, last)
        assert list(wnids(space)) == sorted(wnids(space))
        assert sum(indices(space)) == total
    assert len(set(indices("imagenet-a")) & set(indices("imagenet-r"))) < 200


def test_a_models_own_order_is_mapped_by_wnid_or_by_name():
    order = list(range(1000))
    random.Random(0).shuffle(order)
    by_wnid = {i: wnids()[order[i]] for i in range(1000)}
    assert imagenet_columns(by_wnid) == [order.index(i) for i in range(1000)]
    by_name = {i: class_names()[wnids()[order[i]]] for i in range(1000)}
    columns = imagenet_columns(by_name)
    assert [c for c in range(1000) if order[columns[c]] != c] in ([], [134, 517])  # the two cranes have one name
    straight = {i: class_names()[wnid] for i, wnid in enumerate(wnids())}
    assert imagenet_columns(straight) == list(range(1000))
    with_background = {0: "background"} | {i + 1: wnid for i, wnid in enumerate(wnids())}
    assert imagenet_columns(with_background) == list(range(1, 1001))


def test_first_words_are_enough_where_they_are_unique():
    short = {i: class_names()[wnid].split(",")[0].replace(" ", "_") for i, wnid in enumerate(wnids())}
    short |= {638: "maillot", 639: "maillot, tank suit"}
    assert imagenet_columns(short) == list(range(1000))


def test_nameless_or_incomplete_labels_are_refused():
    with pytest.raises(LabelError, match=r"does not name 1000 of .*LABEL_0.*label_order='imagenet'"):
        imagenet_columns({i: f"LABEL_{i}" for i in range(1000)})
    with pytest.raises(LabelError, match="does not name 1 of ImageNet's 1,000 classes, first n01443537"):
        imagenet_columns({i: wnid for i, wnid in enumerate(wnids()) if i != 1})
    with pytest.raises(LabelError, match="share the logits"):
        imagenet_columns({i: class_names()[wnid] for i, wnid in enumerate(wnids()) if i != 517})


def test_foreign_wnids_are_named():
    check_wnids(wnids("imagenet-a")[:3], "imagenet-a", "here")
    foreign = sorted(set(wnids()) - set(wnids("imagenet-a")))[:2]
    with pytest.raises(LabelError, match=f"some/folder: {foreign[0]}, {foreign[1]} do not belong to imagenet-a"):
        check_wnids([*foreign, *wnids("imagenet-a")], "imagenet-a", "some/folder")


def test_a_sets_own_names():
    assert imagenet_labels([class_names()[wnid] for wnid in wnids()], "hub") == list(range(1000))
    assert imagenet_labels(list(wnids("imagenet-r")), "hub") == indices("imagenet-r")
    assert imagenet_labels(["goldfish", "tench"], "hub") == [1, 0]
    with pytest.raises(LabelError, match="'dog' are neither wnids nor"):
        imagenet_labels(["dog", "tench"], "hub")
    with pytest.raises(LabelError, match="mean several classes"):
        imagenet_labels(["crane", "tench"], "hub")
