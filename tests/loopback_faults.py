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
    cut_after: int | None = None
    lose_answer: bool = False
    wait: bool = False
    came: threading.Event = field(default_factory=threading.Event)
    """Set when the first such request has come."""
    go: threading.Event = field(default_factory=threading.Event)


class Faults:
    """The faults of one server."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    def fault(self, request: str) -> Fault | None:
        """The first fault that a request meets."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    fault.came.set()
                    return fault
        return None

    def _expect(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def fail(self, pattern: str, *, status: int = 500, times: int = 1) -> Fault:
        """Answer with ``status``."""
        return self._expect(Fault(pattern, times, status=status))

    def cut_upload(self, pattern: str, *, times: int = 1, after: int = 10) -> Fault:
        """End the connection after ``after`` bytes of the request's body."""
        return self._expect(Fault(pattern, times, cut_after=after))

    def lose_answer(self, pattern: str) -> Fault:
        """Do what is asked, and end the connection instead of saying so."""
        return self._expect(Fault(pattern, 1, lose_answer=True))

    def hold(self, pattern: str) -> Fault:
        """Wait, after the request has been read, until ``go`` of the fault is set; ``came`` says that it is there."""
        return self._expect(Fault(pattern, 1, wait=True))
