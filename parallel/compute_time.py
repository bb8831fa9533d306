"""How long a rank computes in a step: the time in which it does not wait for other ranks.

On a CPU that is the clock's. On CUDA the host runs ahead of the device, and a wait is one of the computing stream's: it
lies between two events.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class ComputeTime(Protocol):
    def begin(self) -> None:
        """Count from here."""
        ...

    def waits(self) -> AbstractContextManager[None]:
        """A context that does not count. Not to be nested."""
        ...

    def seconds(self) -> float:
        """Since ``begin``, outside ``waits``. On CUDA the host waits for the device."""
        ...


class HostComputeTime:
    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._began, self._waited_s = time.perf_counter(), 0.0

    @contextmanager
    def waits(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - start

    def seconds(self) -> float:
        return time.perf_counter() - self._began - self._waited_s


class CudaComputeTime:
    """Of the device that is current when ``begin`` is called."""

    def __init__(self) -> None:
        self._began: torch.cuda.Event | None = None
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        self._began, self._waits = _event(), []

    @contextmanager
    def waits(self) -> Iterator[None]:
        before = _event()
        yield
        self._waits.append((before, _event()))

    def seconds(self) -> float:
        assert self._began is not None, "begin comes first"
        end = _event()
        end.synchronize()
        waited_ms = sum(before.elapsed_time(after) for before, after in self._waits)
        return float(self._began.elapsed_time(end) - waited_ms) / 1e3


def compute_time(device: torch.device) -> ComputeTime:
    return CudaComputeTime() if device.type == "cuda" else HostComputeTime()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
