"""The images of a study on disk: as they are, and under each generated corruption, made once for all runs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_nullspace.command_line import UsageError
from hf_nullspace.core.files import DamagedFileError, read_json, size_and_hash, write_json, write_whole
from hf_nullspace.data.image_set import ArrayRows, ImageSet
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.corruptions import corrupt
from hf_nullspace.robustness.records import images_fingerprint
from hf_nullspace.robustness.suite import Condition, Corrupted


class KeptImages(ImageSet):
    """Some images of a set, from an array on disk, at their own size; ``places`` are their places in the set."""

    def __init__(self, rows: ArrayRows, preprocessing: Preprocessing, places: tuple[int, ...], condition: Condition):
        super().__init__(rows, preprocessing, name="test images", places=places)
        self.condition = condition

    def protocol(self) -> dict[str, Any]:
        """With the corruption that is in the pixels already."""
        described = super().protocol() | {"places": [self.places[0], self.places[-1], len(self.places)]}
        if isinstance(self.condition, Corrupted):
            described |= self.condition.protocol()
        return described


class ImageStore:
    """The test images of a study; arrays of 8-bit RGB images lie below ``folder`` and are memory maps.

    A corrupted image depends on ``seed`` and on its place in the whole set, so a limit changes no image.
    """

    def __init__(self, folder: Path | str, images: Any, seed: int):
        self.images, self.seed = images, seed
        self.preprocessing: Preprocessing = images.preprocessing
        self.fingerprint = images_fingerprint(images)
        self.folder = Path(folder) / self.fingerprint
        self._labels: dict[int, int] = {}
        self._intact: set[Path] = set()

    def get(self, places: tuple[int, ...], condition: Condition) -> KeptImages:
        """The images at ``places`` for a condition: corrupted already, if it is a corruption.

        Raises:
            UsageError: if the set has no such place, or the images differ in size, so that no array holds them.
        """
        if not 0 <= places[0] <= places[-1] < len(self.images):
            raise UsageError(f"places {places[0]} to {places[-1]}, but the test split has {len(self.images)} images")
        name = "clean"
        if isinstance(condition, Corrupted):
            name = f"{condition.corruption}-{condition.severity}-seed-{self.seed}"
        path = self.folder / f"{places[0]}-{places[-1]}-{len(places)}" / f"{name}.npy"
        if path not in self._intact and not _intact(path):
            array = self._array(places, condition)
            write_whole(path, lambda temporary: _save(temporary, array))
            write_json(path.with_suffix(".json"), size_and_hash(path))
        self._intact.add(path)
        for place in places:
            if place not in self._labels:  # a row of a data set takes a while
                self._labels[place] = int(self.images.label(place))
        rows = ArrayRows(np.load(path, mmap_mode="r"), [self._labels[place] for place in places])
        return KeptImages(rows, self.preprocessing, places, condition)

    def _array(self, places: tuple[int, ...], condition: Condition) -> NDArray[np.uint8]:
        """(images, height, width, channels)."""
        array: NDArray[np.uint8] = np.empty((0, 0, 0, 0), dtype=np.uint8)
        for row, place in enumerate(places):
            image = self.images.raw_image(place)
            if isinstance(condition, Corrupted):
                image = corrupt(image, condition.corruption, condition.severity, seed=self.seed, index=place)
            pixels = np.asarray(image)
            if row == 0:
                array = np.empty((len(places), *pixels.shape), dtype=np.uint8)
            if pixels.shape != array.shape[1:]:
                sizes = f"{pixels.shape[1]}x{pixels.shape[0]}, the first {array.shape[2]}x{array.shape[1]}"
                raise UsageError(f"image {place} is {sizes}: a study keeps images of one size. Resize the set first")
            array[row] = pixels
        return array


def _intact(path: Path) -> bool:
    """Whether an array is on the disk as it was written."""
    try:
        return read_json(path.with_suffix(".json")) == size_and_hash(path)
    except (OSError, DamagedFileError):
        return False


def _save(path: Path, array: NDArray[np.uint8]) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a path
        np.save(file, array)
