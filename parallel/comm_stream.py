"""The communication stream of a rank: exchanges proceed on it by themselves, in the order in which they were started.

An exchange of several hops is a chain: what one hop brings is what the next one sends. On CUDA a chain is queued on a
stream of its own, behind events. On a CPU a thread takes the chains one after the other: it starts the collectives of
one, hop by hop, and turns to the next while the last hop is still in flight. Either way the order of collectives on a
group is the order of ``start``, whatever the timing, and nobody has to wait for a hop to have the next one leave.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Protocol, TypeVar

import torch

from model.exchange import Pending
from parallel.collectives import Transfer

Brought = TypeVar("Brought")
Chain = Callable[[], Sequence[Pending[Brought]]]
"""Starts the hops of an exchange, each once the one before it is done, and returns what the last one will bring."""


@dataclass(frozen=True)
class Times:
    """Seconds in which some collective of this rank was in flight, and in which its computation waited for one."""

    communication_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def hidden_s(self) -> float:
        return max(0.0, self.communication_s - self.exposed_s)


class CommStream(Protocol):
    def start(self, chain: Chain[Brought], hops: int) -> Pending[list[Brought]]:
        """Have the chain of an exchange of so many hops run; what its last hop brought is there to be waited for."""
        ...

    def track(self, transfer: Transfer[Any]) -> None:
        """A collective was started: it counts as communication until it is done."""
        ...

    def exposed(self) -> AbstractContextManager[None]:
        """A context in which the computation waits for communication."""
        ...

    def times(self) -> Times:
        """Since ``clear``, once everything that was started has been waited for."""
        ...

    def clear(self) -> None: ...


class HostStream:
    """On a CPU. A chain of one hop needs nobody to go on with it, and starts in the caller's thread."""

    def __init__(self) -> None:
        self._chains: SimpleQueue[tuple[Chain[Any], Future[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._flights: list[tuple[float, float]] = []
        self._exposed_s = 0.0
        weakref.finalize(self, self._chains.put, None)

    def start(self, chain: Chain[Brought], hops: int) -> Pending[list[Brought]]:
        last: Future[Sequence[Pending[Brought]]] = Future()
        if hops > 1:
            if self._thread is None:
                # A daemon: a peer that never answers must not keep the process from ending.
                self._thread = threading.Thread(target=_run_chains, args=(self._chains,), daemon=True)
                self._thread.start()
            self._chains.put((chain, last))
        else:
            last.set_result(chain())

        def finish() -> list[Brought]:
            with self.exposed():
                return [pending.wait() for pending in last.result()]

        return Pending(finish)

    def track(self, transfer: Transfer[Any]) -> None:
        start, flights = perf_counter(), self._flights
        transfer.when_done(lambda end: flights.append((start, max(start, end))))

    @contextmanager
    def exposed(self) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            end = perf_counter()
            self._exposed_s += end - start
            self._flights.append((start, end))  # what is copied meanwhile is communication too

    def times(self) -> Times:
        return Times(union_s(self._flights), self._exposed_s)

    def clear(self) -> None:
        self._flights, self._exposed_s = [], 0.0


class CudaStream:
    """On CUDA. The host queues a whole chain at once and waits for nothing. A chain's tensors stay referenced until the
    computing stream has been made to wait for its end, and every chain begins behind what that stream was given before
    it: memory that either stream frees is therefore free on the other one too."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._chains: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, chain: Chain[Brought], hops: int) -> Pending[list[Brought]]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            begin = _event()
            arrived = [pending.wait() for pending in chain()]
            end = _event()
        self._chains.append((begin, end))
        kept: list[Chain[Brought]] = [chain]

        def finish() -> list[Brought]:
            with self.exposed():
                torch.cuda.current_stream().wait_event(end)
            kept.clear()
            return arrived

        return Pending(finish)

    def track(self, transfer: Transfer[Any]) -> None:
        """Nothing: the events around a chain tell when it was under way."""

    @contextmanager
    def exposed(self) -> Iterator[None]:
        before = _event()
        yield
        self._waits.append((before, _event()))

    def times(self) -> Times:
        torch.cuda.current_stream().synchronize()
        in_s = [sum(begin.elapsed_time(end) for begin, end in of) / 1e3 for of in (self._chains, self._waits)]
        return Times(*in_s)

    def clear(self) -> None:
        self._chains.clear()
        self._waits.clear()


def comm_stream(device: torch.device) -> CommStream:
    return CudaStream(device) if device.type == "cuda" else HostStream()


def union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """The time that at least one of the intervals covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@torch.no_grad()
def _run_chains(chains: SimpleQueue[tuple[Chain[Any], Future[Any]] | None]) -> None:
    while (item := chains.get()) is not None:
        chain, last = item
        try:
            last.set_result(chain())
        except BaseException as error:
            last.set_exception(error)
        del item, chain, last
