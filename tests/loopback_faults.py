"""What goes wrong on the loopback Hub, and for which requests."""

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong, for the next ``times`` requests whose "METHOD path" the pattern is found in."""

    pattern: str
    times: int
    status: int | None = None
    """Answer with this status."""
    cut_after: int | None = None
    """Read so many bytes of the request's body, then end the connection."""
    lose_answer: bool = False
    """Do what is asked, then end the connection without an answer."""
    wait: bool = False
    """Wait for :attr:`go`, then go on."""
    came: threading.Event = field(default_factory=threading.Event)
    """Set when the first such request has come."""
    go: threading.Event = field(default_factory=threading.Event)

    def meets(self, request: str) -> bool:
        if self.times > 0 and re.search(self.pattern, request):
            self.times -= 1
            self.came.set()
            return True
        return False


class Faults:
    """The faults of one server; a pattern is searched in "METHOD path"."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._of_faults = threading.Lock()

    def fault(self, request: str) -> Fault | None:
        """The first fault that a request meets."""
        with self._of_faults:
            return next((fault for fault in self.faults if fault.meets(request)), None)

    def _expect(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def fail(self, pattern: str, *, status: int = 500, times: int = 1) -> Fault:
        """Answer with ``status``."""
        return self._expect(Fault(pattern, times, status=status))

    def cut_upload(self, pattern: str, *, times: int = 1, after: int = 10) -> Fault:
        """End the connection after ``after`` bytes of the request's body."""
        return self._expect(Fault(pattern, times, cut_after=after))

    def lose_answer(self, pattern: str, *, times: int = 1) -> Fault:
        """Do what is asked, and end the connection instead of saying so."""
        return self._expect(Fault(pattern, times, lose_answer=True))

    def hold(self, pattern: str, *, times: int = 1) -> Fault:
        """Wait, after the request has been read, until ``go`` of the fault is set; ``came`` says that it is there."""
        return self._expect(Fault(pattern, times, wait=True))

    def let_go(self) -> None:
        """Let go of all that is held."""
        for fault in self.faults:
            fault.go.set()
