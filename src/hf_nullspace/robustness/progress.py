"""One progress bar for a whole run: all checkpoints, sets and conditions, with the time left."""

import sys
from collections.abc import Hashable

from tqdm import tqdm

WIDTH = 36  # characters of a condition's name: its settings stand in the table


class Progress:
    """Counts forward passes of this process, done and still expected; shown where ``shown``.

    ``expect`` may be called again for the same key: an estimate gives way to the truth, 0 takes it out (a condition
    that was finished before, a set that is missing), and the time left follows.
    """

    def __init__(self, *, shown: bool = True):
        self.work: dict[Hashable, float] = {}
        self.total, self.done = 0.0, 0.0
        # little smoothing: an attack and a forward take their time differently, and the whole run counts
        self.bar = tqdm(total=0, unit="fwd", disable=not shown, leave=False, smoothing=0.05)

    def expect(self, key: Hashable, work: float) -> None:
        """``work`` forward passes belong to ``key``, whatever was expected of it before."""
        self.total += work - self.work.get(key, 0)
        self.work[key] = work
        self.bar.total = round(self.total)

    def begin(self, title: str) -> None:
        self.bar.set_description(title if len(title) <= WIDTH else f"{title[: WIDTH - 3]}...")

    def advance(self, work: float) -> None:
        self.done += work
        self.bar.update(round(self.done) - self.bar.n)

    def say(self, text: str) -> None:
        """A line on standard output that does not break the bar."""
        self.bar.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
