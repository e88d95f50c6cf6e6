"""The noise's own data stream: what is held out, which rank sees what, and what the training does not notice."""

import itertools
import random

import datasets
import numpy as np
import pytest
import torch

from hf_nullspace.data.augmentation import Augmentation
from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.training.noise_stream import noise_stream, own_randomness


class Numbers(torch.utils.data.Dataset):
    """Image i is the number i."""

    def __init__(self, count=40):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"pixel_values": torch.full((1, 2, 2), float(index)), "labels": 0}


class NumberStream(torch.utils.data.IterableDataset):
    """The same in order, again and again; it can be divided over ``num_shards`` workers."""

    def __init__(self, count=40):
        self.count = count

    def __iter__(self):
        return (Numbers()[i] for i in range(self.count))


def hub_stream(count=40, shards=4):
    def rows(parts):
        for part in parts:
            for i in range(part, count, shards):
                yield {"pixel_values": [[[float(i)]]], "labels": 0}

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"parts": list(range(shards))})
    return stream.with_format("torch")


def collate(rows):
    return torch.utils.data.default_collate(list(rows))


def drawn(dataset, batches=12, **given):
    """The numbers in the held-out batches, and in each of the first batches."""
    given = {"batch_size": 6, "held_out_images": 7, "seed": 1, "round": 2} | given
    held, stream = noise_stream(dataset, collate, **given)
    numbers = [[int(value) for value in batch[:, 0, 0, 0]] for batch in itertools.islice(stream, batches)]
    return [int(value) for batch in held for value in batch[:, 0, 0, 0]], numbers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [Numbers, NumberStream, hub_stream])
def test_held_out_images_are_never_learned_on(make, workers):
    held, batches = drawn(make(), batches=30, num_workers=workers)
    assert len(held) == len(set(held)) == 7
    seen = list(itertools.chain(*batches))
    assert len(seen) == 180, "several passes over 40 images"
    assert not set(held) & set(seen)
    # A stream holds out whole batches and may leave some of them unused; everything else is learned on.
    assert len(set(seen)) >= 40 - 12
    if make is Numbers:
        assert set(seen) == set(range(40)) - set(held)


@pytest.mark.parametrize("make", [Numbers, NumberStream, hub_stream])
def test_a_round_is_determined_by_seed_and_round(make):
    assert drawn(make()) == drawn(make())
    if make is not NumberStream:  # a plain stream has one order
        assert drawn(make()) != drawn(make(), round=3)
        assert drawn(make()) != drawn(make(), seed=5)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_map_style_stream(workers):
    assert drawn(Numbers(), num_workers=workers) == drawn(Numbers())


def test_epochs_are_passes_in_new_orders():
    held, batches = drawn(Numbers(), batches=11)
    seen = list(itertools.chain(*batches))
    first, second = seen[:33], seen[33:66]
    assert sorted(first) == sorted(second) == sorted(set(range(40)) - set(held))
    assert first != second


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_partition_every_batch(processes):
    held, batches = drawn(Numbers())
    shares = [drawn(Numbers(), rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(itertools.chain(*(share[0] for share in shares))) == sorted(held)
    for step, batch in enumerate(batches):
        parts = [share[1][step] for share in shares]
        assert sorted(itertools.chain(*parts)) == sorted(batch), "the same images, whatever the number of processes"
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("make", [NumberStream, hub_stream])
def test_ranks_read_different_parts_of_a_stream(make):
    shares = [drawn(make(), rank=rank, processes=2, batches=10) for rank in range(2)]
    assert [len(share[0]) for share in shares] == [4, 3]
    assert all(len(batch) == 3 for share in shares for batch in share[1])
    one, other = ({*share[0], *itertools.chain(*share[1])} for share in shares)
    assert not one & other
    for held, batches in shares:
        assert not set(held) & set(itertools.chain(*batches))


def test_a_shard_for_each_worker_of_each_process():
    """Two shards, two processes, two workers: the worker without a shard must not end the run."""
    shares = [drawn(hub_stream(shards=2), rank=rank, processes=2, num_workers=2) for rank in range(2)]
    assert all(len(share[0]) + len(set(itertools.chain(*share[1]))) >= 12 for share in shares)


def test_little_data():
    held, batches = drawn(Numbers(5), held_out_images=512, batch_size=6)
    assert len(held) == 1, "at most a quarter is held out"
    assert all(len(batch) == 6 for batch in batches)
    assert set(itertools.chain(*batches)) == set(range(5)) - set(held)
    with pytest.raises(ValueError, match=r"1 held-out images .of 5. are less than one for each of 2 processes"):
        drawn(Numbers(5), processes=2)


def test_empty_data():
    with pytest.raises(ValueError, match="the training set is empty"):
        drawn(Numbers(0))
    for few in (1, 3):
        with pytest.raises(ValueError, match=rf"has {few} images, .*\(held_out_images=7\); use 4 images or more"):
            drawn(Numbers(few), held_out_images=7)
        assert drawn(Numbers(few), held_out_images=0)[0] == []
    for held_out in (0, 7):
        with pytest.raises(ValueError, match="the training stream is empty"):
            drawn(NumberStream(0), held_out_images=held_out)
    with pytest.raises(ValueError, match=r"the training stream has 5 images .* lower held_out_images"):
        drawn(NumberStream(5))
    with pytest.raises(ValueError, match=r"the training stream has 5 images .* noise step takes 100000; lower noise_b"):
        drawn(NumberStream(5), held_out_images=0, batch_size=100_000)


def test_a_stream_that_can_be_read_once_is_refused():
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.rows = iter(NumberStream())

        def __iter__(self):
            return self.rows

    with pytest.raises(ValueError, match="can be read only once"):
        drawn(Once())


def test_rows_without_images_are_named():
    def rows(parts):
        yield from ({"image_tensor": 1.0, "labels": 0} for _ in parts for _ in range(20))

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"parts": [0, 1]})
    with pytest.raises(ValueError, match=r"training rows have \['image_tensor', 'labels'\].*'pixel_values'"):
        noise_stream(stream, collate, batch_size=4, held_out_images=4, seed=0, round=0)


def test_augmentation_is_drawn_from_the_round():
    rows = [{"image": np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8), "label": 0} for i in range(8)]
    images = ImageSet(rows, Preprocessing((0.5,) * 3, (0.5,) * 3, (16, 16), None), augmentation=Augmentation())

    def first(round):
        return next(noise_stream(images, collate, batch_size=4, held_out_images=0, seed=0, round=round)[1])

    assert torch.equal(first(0), first(0))
    plain = torch.stack([ImageSet(rows, images.preprocessing)[i]["pixel_values"] for i in range(8)])
    assert (torch.cdist(first(0).flatten(1), plain.flatten(1)) > 1).all(), "the images were changed"
    assert not torch.equal(first(0), first(1))


def test_own_randomness_gives_the_generators_back():
    def numbers():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 (the global one is meant)

    def state():
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return random.getstate(), legacy, torch.get_rng_state().tolist(), torch.initial_seed()

    before = state()
    with own_randomness(5):
        inside = numbers()
    assert state() == before
    numbers()
    again = []

    def fail():
        with own_randomness(5):
            again.append(numbers())
            raise KeyError

    before = state()
    with pytest.raises(KeyError):
        fail()
    assert again == [inside]
    assert state() == before
    with own_randomness(6):
        assert all(a != b for a, b in zip(numbers(), inside, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_does_not_draw_from_the_global_generator(workers):
    before = torch.get_rng_state()
    drawn(Numbers(), num_workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
