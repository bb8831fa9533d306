"""What an operation takes. On a CPU that is the time of all threads of its process on a core: ranks may outnumber the
cores, and neighbours on the machine count for nothing. On a GPU it is the time until the device has done it."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

Result = TypeVar("Result")

SPELL_SECONDS = 0.004
"""How long a short operation is repeated at a time."""


def own_cores() -> set[int]:
    """That this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def idle_share(operation: Callable[[], Result]) -> tuple[Result, float]:
    """What the operation returns, and the share of the cores' time in which none of them ran anything, neighbours on
    the machine included."""
    cores, start, before = own_cores(), time.perf_counter(), _idle_seconds()
    result = operation()
    idle, wall = _idle_seconds() - before, time.perf_counter() - start
    return result, min(max(idle / (wall * len(cores)), 0.0), 1.0)


def _idle_seconds() -> float:
    """Of the process's cores together, since some moment."""
    times = psutil.cpu_times(percpu=True)
    return sum(times[core].idle + getattr(times[core], "iowait", 0.0) for core in own_cores())


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
