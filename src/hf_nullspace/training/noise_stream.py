"""The images that a noise is learned on: a stream of its own, determined by (seed, round).

The training loader never sees it, so the order of the training batches does not depend on how many noise steps ran.
The noise's batch size is a number of all processes together; each rank takes its share of every batch.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset as HubStream
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_nullspace.core.seeds import derive_seed
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
            most a quarter of its images to the held-out ones; a streaming one is shuffled in a buffer if it can be.
            One with ``with_stream`` (ImageClassificationDataset) draws its augmentation from (seed, round) as well.
        batch_size: images per noise step, over all processes.
        held_out_images: how many images of the stream to hold out, over all processes.

    Returns:
        ``(held_out, batches)``: tensors ``pixel_values`` (b, C, H, W).

    Raises:
        ValueError: if the dataset is empty or too small to hold an image out, or its rows have no ``pixel_values``.
    """
    if hasattr(dataset, "with_stream"):
        dataset = dataset.with_stream("noise", round)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        share = _share(batch_size, rank, processes)
        count = -(-_share(held_out_images, rank, processes) // share)  # whole batches, the last one cut below
        shards = getattr(dataset, "num_shards", 0)
        workers = min(num_workers, shards // processes if shards % processes == 0 else shards)
        rows = _Restarted(dataset, derive_seed(seed, round), rank, processes, held_out_batches=count, batch_size=share)
        loader = DataLoader(rows, share, collate_fn=collate, num_workers=workers, generator=_generator(seed, round))
        batches = (_images(batch, input_name) for batch in loader)
        held_out = list(itertools.islice(batches, count))
        if held_out:
            held_out[-1] = held_out[-1][: _share(held_out_images, rank, processes) - (count - 1) * share]
        return held_out, batches
    if len(dataset) == 0:
        raise ValueError("the training set is empty: no image to learn a noise on")
    order = torch.randperm(len(dataset), generator=_generator(seed, round)).tolist()
    held_out_images = held_out_of(len(dataset), held_out_images, processes)
    held, pool = order[:held_out_images], order[held_out_images:]

    def drawn() -> Iterator[list[int]]:
        indices = _endless(pool, seed, round)
        while True:
            yield list(itertools.islice(indices, batch_size))[rank::processes]

    generator = _generator(seed, round)  # the workers' base seed: else it would come from the global generator
    options: dict[str, Any] = {"collate_fn": collate, "num_workers": num_workers, "generator": generator}
    mine = held[rank::processes]
    share = _share(batch_size, rank, processes)
    chunks = [mine[i : i + share] for i in range(0, len(mine), share)]
    held_loader = DataLoader(dataset, batch_sampler=chunks, **options)
    loader = DataLoader(dataset, batch_sampler=_Endless(drawn), **options)
    return [_images(batch, input_name) for batch in held_loader], (_images(batch, input_name) for batch in loader)


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
def an_empty_stream_is_said() -> Iterator[None]:
    """accelerate has words of its own for a stream without a row; this has the reader's."""
    try:
        yield
    except ValueError as error:
        if "Batch does not contain any data" not in str(error):
            raise
        raise ValueError(_EMPTY) from error


def _share(total: int, rank: int, processes: int) -> int:
    """How many of ``total`` images fall to a rank: positions rank, rank + processes, ..."""
    return len(range(rank, total, processes))


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*key))


def _endless(pool: list[int], seed: int, round: int) -> Iterator[int]:
    for epoch in itertools.count(1):
        for position in torch.randperm(len(pool), generator=_generator(seed, round, epoch)).tolist():
            yield pool[position]


def _images(batch: dict[str, Any], input_name: str) -> Tensor:
    if input_name not in batch:
        raise ValueError(f"training rows have {sorted(batch)}; the noise is learned on {input_name!r}")
    return batch[input_name]


def _splitter(dataset: Any) -> Callable[[int, int], Any] | None:
    """What gives one process's part of a streaming data set, if anything does."""
    if isinstance(dataset, HubStream):
        return lambda rank, processes: split_dataset_by_node(dataset, rank, processes)
    return dataset.split if callable(getattr(dataset, "split", None)) else None


class _Endless:
    """Batches of indices without an end, as a batch sampler."""

    def __init__(self, batches: Callable[[], Iterator[list[int]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches()


class _Restarted(IterableDataset[Any]):
    """This rank's rows of a streaming data set, begun again when they end, then without those that were held out.

    The first ``held_out_batches`` of ``batch_size`` rows are the held-out ones; workers give batches in turn, so each
    knows how many of its own those are. A data set that can be split by node (``split``) is; of another every rank
    reads all rows and keeps its own.
    """

    def __init__(
        self, dataset: Any, seed: int, rank: int, processes: int, *, held_out_batches: int, batch_size: int
    ) -> None:
        super().__init__()
        if hasattr(dataset, "shuffle") and not hasattr(dataset, "with_stream"):
            dataset = dataset.shuffle(seed=seed % 2**32, buffer_size=_SHUFFLE_BUFFER)
        self._first, self._step = rank, processes
        if processes > 1 and (split := _splitter(dataset)) is not None:
            dataset = split(rank, processes)
            self._first, self._step = 0, 1
        self._dataset = dataset
        self._held_out_batches, self._batch_size = held_out_batches, batch_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        held_out = self._batch_size * len(range(own, self._held_out_batches, workers))
        for epoch in itertools.count():
            if epoch == 0 and iter(self._dataset) is iter(self._dataset):
                raise ValueError("the training stream can be read only once; give a data set that can be begun again")
            count = 0
            for row in itertools.islice(self._dataset, self._first, None, self._step):
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
