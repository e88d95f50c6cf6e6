"""Images that a setting is chosen on: neither trained on, nor measured in a report."""

from typing import NamedTuple

import datasets

from hf_nullspace.averaging import NotAveragedError
from hf_nullspace.data.image_files import DataError
from hf_nullspace.data.image_set import ImageSet, evenly_spaced
from hf_nullspace.data.sources import SPLIT_FOLDERS, split_names
from hf_nullspace.training.loading import Classifier, DataArguments, Rows, evaluation_images, load_rows

_SHARE = 10
"""Of so many training images one is held out at most."""


class SelectionRows(NamedTuple):
    """What a training split becomes where images are needed to choose on."""

    rest: Rows
    """To train on."""
    rows: Rows
    """To choose on: at most ``most`` of them."""
    most: int
    note: str
    """Where these come from."""


def selection_rows(
    args: DataArguments, rows: Rows, split: str | None, count: int, *, base_is_trained_here: bool
) -> SelectionRows:
    """Rows to choose on: ``split``; else a validation split that nothing else uses; else a part of the training split.

    ``rows`` are the training split's. Of these every tenth, and at most ``count`` evenly spaced ones, are held out; a
    checkpoint from elsewhere may have been trained on them, which the note says.

    Raises:
        DataError: if ``split`` is trained or measured on, or is not there, or too little is left to hold out.
    """
    if split is None:
        split = _validation_split(args)
    else:
        for name in ("train_split", "eval_split"):
            other = getattr(args, name)
            if _parts(split) & _parts(other):
                raise DataError(f"selection_split={split!r} shares images with {name}={other!r}: choose another split")
    if split is not None:
        note = f"{args.dataset_name}, split {split}"
        return SelectionRows(rows, load_rows(args, split, streaming=args.streaming), count, note)
    if isinstance(rows, datasets.IterableDataset):
        raise DataError("nothing can be held out of a stream to choose alpha on; name a split with selection_split")
    held_out = evenly_spaced(len(rows), min(count, len(rows) // _SHARE))
    if not held_out:
        raise DataError(f"{len(rows)} training images are too few to hold some out; name a split with selection_split")
    rest = sorted(set(range(len(rows))) - set(held_out))
    note = f"{args.dataset_name}, {len(held_out)} of {len(rows)} images of split {args.train_split}, held out"
    note += " of all training" if base_is_trained_here else "; the checkpoint may have been trained on them"
    return SelectionRows(rows.select(rest), rows.select(held_out), count, note)


def selection_images(chosen_on: SelectionRows, classifier: Classifier, *, skip_corrupt: bool) -> ImageSet:
    """The images of these rows, not augmented: evenly spaced ones, or the first of a stream.

    Raises:
        NotAveragedError: if the classifier's head is new, so that it has no weights to go back to.
        DataError: as :func:`evaluation_images`.
    """
    if classifier.labels.new_head:
        raise NotAveragedError(
            "interpolate goes part of the way back to the checkpoint, which has no head for these classes "
            f"({classifier.labels.message}); fine-tune without interpolate first, then again from what that gave"
        )
    first = chosen_on.most if isinstance(chosen_on.rows, datasets.IterableDataset) else None
    images = evaluation_images(chosen_on.rows, classifier, first, skip_corrupt=skip_corrupt)
    return images if len(images) <= chosen_on.most else images.part(chosen_on.most)


def _validation_split(args: DataArguments) -> str | None:
    known = split_names(
        args.dataset_name, streaming=args.streaming, config_name=args.dataset_config, revision=args.dataset_revision
    )
    taken = _parts(args.train_split) | _parts(args.eval_split)
    return next((name for name in SPLIT_FOLDERS["validation"] if name in known and name not in taken), None)


def _parts(split: str) -> set[str]:
    """The splits in "train+validation[:50%]"."""
    return {part.partition("[")[0].strip() for part in split.split("+")}
