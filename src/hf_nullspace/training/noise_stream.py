"""The images that a noise is learned on: a stream of its own, determined by (seed, round).

The training loader never sees it, so the order of the training batches does not depend on how many noise steps ran.
The noise's batch size is a number of all processes together; each rank takes its share of every batch.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_nullspace.core.seeds import derive_seed, generator_of
from hf_nullspace.data.image_stream import Images, ImageStream
from hf_nullspace.training.preflight import held_out_of

_SHUFFLE_BUFFER = 1024
_EMPTY = "the training stream is empty; check the split's name and the data files"


def noise_stream(
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    batch_size: int,
    held_out_images: int,
    seed: int,
    round: int,
    rank: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    input_name: str = "pixel_values",
) -> tuple[list[Tensor], Iterator[Tensor]]:
    """Held-out batches and an endless stream of other batches for one round, this rank's share of each.

    Args:
        dataset: the training set; a map-style one is drawn from without replacement, epoch after epoch, and gives at
            most a quarter of its images to the held-out ones; a stream of `datasets` is shuffled in a buffer. An
            ImageSet or ImageStream draws its augmentation from (seed, round) as well.
        batch_size: images per noise step, over all processes.
        held_out_images: how many images of the stream to hold out, over all processes.

    Returns:
        ``(held_out, batches)``: tensors ``pixel_values`` (b, C, H, W).

    Raises:
        ValueError: if the dataset is empty or too small to hold an image out, or its rows have no ``pixel_values``.
    """
    if isinstance(dataset, Images):
        dataset = dataset.with_key("noise", round)
    share = _share(batch_size, rank, processes)
    # The generator is for the workers' base seed: else it would come from the global generator.
    options: dict[str, Any] = {"collate_fn": collate, "generator": generator_of(seed, round)}
    if isinstance(dataset, IterableDataset):
        wanted = _share(held_out_images, rank, processes)
        count = -(-wanted // share)  # whole batches, the last one cut below
        shards = dataset.num_shards if isinstance(dataset, (ImageStream, datasets.IterableDataset)) else 0
        workers = min(num_workers, shards // processes if shards % processes == 0 else shards)
        rows = _EndlessRows(dataset, derive_seed(seed, round), rank, processes, held_out=count, batch_size=share)
        batches = _images(DataLoader(rows, share, num_workers=workers, **options), input_name)
        held_out = list(itertools.islice(batches, count))
        if held_out:
            held_out[-1] = held_out[-1][: wanted - (count - 1) * share]
        return held_out, batches
    if len(dataset) == 0:
        raise ValueError("the training set is empty: no image to learn a noise on")
    order = torch.randperm(len(dataset), generator=generator_of(seed, round)).tolist()
    count = held_out_of(len(dataset), held_out_images, processes)
    mine = order[:count][rank::processes]
    held = [mine[first : first + share] for first in range(0, len(mine), share)]
    endless = _endless_batches(order[count:], batch_size, seed, round)
    drawn = (batch[rank::processes] for batch in endless)
    loaders = (
        DataLoader(dataset, batch_sampler=indices, num_workers=num_workers, **options) for indices in (held, drawn)
    )
    held_out_batches, batches = (_images(loader, input_name) for loader in loaders)
    return list(held_out_batches), batches


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and the global generators as before afterwards.

    So that data sets which draw from global generators neither disturb the training nor depend on it.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what a user's data set may draw from)
    # One GPU at most is this process's own; by default fork_rng would open a context on all of them, and warn.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def clear_error_of_an_empty_stream() -> Iterator[None]:
    """For a stream without a row accelerate's error does not say what to check."""
    try:
        yield
    except ValueError as error:
        if "Batch does not contain any data" not in str(error):
            raise
        raise ValueError(_EMPTY) from error


def _share(total: int, rank: int, processes: int) -> int:
    """How many of ``total`` images fall to a rank: positions rank, rank + processes, ..."""
    return len(range(rank, total, processes))


def _endless_batches(pool: list[int], batch_size: int, seed: int, round: int) -> Iterator[list[int]]:
    """Batches from ``pool``, pass after pass in new orders."""

    def passes() -> Iterator[int]:
        for epoch in itertools.count(1):
            order = torch.randperm(len(pool), generator=generator_of(seed, round, epoch))
            yield from (pool[position] for position in order.tolist())

    indices = passes()
    while True:
        yield list(itertools.islice(indices, batch_size))


def _images(batches: Iterable[dict[str, Any]], input_name: str) -> Iterator[Tensor]:
    for batch in batches:
        if input_name not in batch:
            raise ValueError(f"training rows have {sorted(batch)}; the noise is learned on {input_name!r}")
        yield batch[input_name]


class _EndlessRows(IterableDataset[Any]):
    """This rank's rows of a stream, begun again when they end, then without those that were held out.

    The first ``held_out`` batches of ``batch_size`` rows are the held-out ones; workers give batches in turn, so each
    knows how many of its own those are. Of a stream that is neither an ImageStream nor one of `datasets` every rank
    reads all rows and keeps its own.
    """

    def __init__(self, rows: Any, seed: int, rank: int, processes: int, *, held_out: int, batch_size: int) -> None:
        super().__init__()
        if isinstance(rows, datasets.IterableDataset):
            rows = rows.shuffle(seed=seed % 2**32, buffer_size=_SHUFFLE_BUFFER)
        self._first, self._step = rank, processes
        if processes > 1 and isinstance(rows, (ImageStream, datasets.IterableDataset)):
            of_process = split_dataset_by_node if isinstance(rows, datasets.IterableDataset) else ImageStream.of_process
            rows = of_process(rows, rank, processes)
            self._first, self._step = 0, 1
        self._rows, self._held_out, self._batch_size = rows, held_out, batch_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        held_out = self._batch_size * len(range(own, self._held_out, workers))
        for epoch in itertools.count():
            if epoch == 0 and iter(self._rows) is iter(self._rows):
                raise ValueError("the training stream can be read only once; give a data set that can be begun again")
            count = 0
            for row in itertools.islice(self._rows, self._first, None, self._step):
                count += 1
                if epoch == 0 or count > held_out:
                    yield row
            if count == 0:
                raise ValueError(_EMPTY)
            if count <= held_out:
                raise ValueError(
                    f"the training stream has {count} images for this reader, and {held_out} of them are to be held "
                    "out; lower held_out_images"
                )
            if count * workers < self._batch_size:  # one batch would read the stream over and over
                raise ValueError(
                    f"the training stream has {count * workers} images for this process, and a noise step takes "
                    f"{self._batch_size}; lower noise_batch_size, or learn_noise's batch_size"
                )
