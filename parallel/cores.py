"""The cores of a machine: which a process may run on, and how long nothing runs on them."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

Result = TypeVar("Result")


def own_cores() -> set[int]:
    """That this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def idle_share(operation: Callable[[], Result]) -> tuple[Result, float]:
    """What the operation returns, and the share of its cores' time in which nothing ran on them, of this process or of
    another."""
    cores, start, before = own_cores(), time.perf_counter(), _idle_seconds()
    result = operation()
    idle, wall = _idle_seconds() - before, time.perf_counter() - start
    return result, min(max(idle / (wall * len(cores)), 0.0), 1.0)


def _idle_seconds() -> float:
    """Of the process's cores together, since some moment."""
    times = psutil.cpu_times(percpu=True)
    return sum(times[core].idle + getattr(times[core], "iowait", 0.0) for core in own_cores())
