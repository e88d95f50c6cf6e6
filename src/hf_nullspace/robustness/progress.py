"""One progress bar for a whole run: all checkpoints, sets and conditions, with the time left."""

import sys
from collections.abc import Hashable

from tqdm import tqdm

WIDTH = 36  # characters of a condition's name: its settings stand in the table


class Progress(tqdm):
    """Counts forward passes of this process, done and still expected; shown where ``shown``.

    ``expect`` may be called again for the same key: an estimate gives way to the truth, 0 takes it out (a condition
    that was finished before, a set that is missing), and the time left follows.
    """

    def __init__(self, *, shown: bool = True):
        # little smoothing: an attack and a forward take their time differently, and the whole run counts
        super().__init__(total=0, unit="fwd", disable=not shown, leave=False, smoothing=0.05)
        self.work: dict[Hashable, float] = {}
        self.done = 0.0

    def expect(self, key: Hashable, work: float) -> None:
        """``work`` forward passes belong to ``key``, whatever was expected of it before."""
        self.work[key] = work
        self.total = round(sum(self.work.values()))

    def begin(self, title: str) -> None:
        self.set_description(title if len(title) <= WIDTH else f"{title[: WIDTH - 3]}...")

    def advance(self, work: float) -> None:
        self.done += work
        self.update(round(self.done) - self.n)

    def say(self, text: str) -> None:
        """A line on standard output that does not break the bar."""
        self.write(text)
        sys.stdout.flush()
