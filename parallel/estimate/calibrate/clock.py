"""What an operation takes. On a CPU that is the time of all threads of its process on a core: ranks may outnumber the
cores, and neighbours on the machine count for nothing. On a GPU it is the time until the device has done it."""

import time
from collections.abc import Callable

import torch

SPELL_SECONDS = 0.004
"""How long a short operation is repeated at a time."""


class Clock:
    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> float:
        """Seconds since some moment."""
        if not self._cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, operation: Callable[[], object], most: int = 64) -> float:
        """Of one call, repeated up to ``most`` times for a spell; the first call, which may compile, is not counted."""
        operation()
        start = self.now()
        operation()
        once = self.now() - start
        repeats = min(most, int(SPELL_SECONDS / max(once, 1e-6)))
        if repeats < 2:
            return once
        start = self.now()
        for _ in range(repeats):
            operation()
        return (self.now() - start) / repeats
