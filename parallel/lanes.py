"""Lanes between the ranks of a host, through memory that they share: what gloo's sockets are between hosts.

A lane leads from one rank to another and keeps its order. To send, a rank writes rows into a buffer in its memory and
says over a Unix socket where they lie; the other rank copies them out when it wants them, and gives the buffer back. No
thread carries them and no network stack sees them. Gloo has a thread for every group that wakes a hundred times a
second, and two of them on either side for every piece of a message: of eight ranks that train on two cores, that took a
sixteenth of the processors' time.
"""

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from parallel.shared_memory import SharedMemory, broken, set_timeout, timed_out

HEADER = struct.Struct("=qqd")
"""Of a message: where it begins in the sender's memory, its bytes, when it left."""
OFFSET = struct.Struct("=q")
"""What gives a buffer back: where it begins."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor that are sent: all, or those that ``chosen`` numbers, int64 [N]."""

    tensor: Tensor
    chosen: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.tensor if self.chosen is None else self.chosen), *self.tensor.shape[1:])

    def write(self, into: Tensor) -> None:
        if self.chosen is None:
            into.copy_(self.tensor)
        else:
            torch.index_select(self.tensor, 0, self.chosen, out=into)


class Outbox:
    """The beginning of the lane ``name`` to ``peer``, which can be used when all have ``begun``. One thread at a time
    sends."""

    def __init__(self, memory: SharedMemory, peer: int, name: str) -> None:
        self._memory, self.peer = memory, peer
        self._lent: dict[int, int] = {}
        self._connection = memory.connect(peer, name)
        memory.borrowers.add(self)

    @torch.no_grad()
    def send(self, columns: Sequence[Rows]) -> None:
        """The bytes alone travel: both ends know shapes and dtypes. What is memory of ``SharedMemory.zeros``, and sent
        alone, stays where it is; anything else may be written again at once. Waits for nobody, unless hundreds of
        messages are on their way."""
        places, size = _placed([(rows.shape, rows.tensor.dtype) for rows in columns])
        alone = len(columns) == 1 and columns[0].chosen is None
        start = self._memory.place_of(columns[0].tensor) if alone else None
        if start is None:
            start = self._memory.lend(size)
            self._lent[start] = size
            for rows, place in zip(columns, places, strict=True):
                if prod(rows.shape):
                    rows.write(self._memory.own(start + place, rows.shape, rows.tensor.dtype))
        try:
            self._connection.sendall(HEADER.pack(start, size, time.perf_counter()))
        except BlockingIOError:
            raise timed_out(self.peer, self._memory.timeout_s) from None
        except ConnectionError as error:
            raise broken(self.peer, error) from None

    def given_back(self) -> list[tuple[int, int]]:
        found = []
        with suppress(OSError):  # nothing has come back, or whoever gives back is gone, which sending will find
            for (start,) in OFFSET.iter_unpack(self._connection.recv(OFFSET.size << 9, socket.MSG_DONTWAIT)):
                if start in self._lent:
                    found.append((start, self._lent.pop(start)))
        return found


class Inbox:
    """The end of the lane ``name`` from ``peer``: what was posted first gets what was sent first, whoever waits."""

    def __init__(self, memory: SharedMemory, peer: int, name: str) -> None:
        self._memory, self.peer = memory, peer
        self._expected = memory.expect(peer, name)
        self._connection: socket.socket | None = None
        self._posted: deque[Arrival] = deque()
        self._reading = threading.Lock()

    def post(self, columns: Sequence[Tensor], add: bool = False) -> "Arrival":
        """``columns``, each contiguous, are what the next message is copied or, if ``add``, added to."""
        arrival = Arrival(self, [into.detach() for into in columns], add)
        self._posted.append(arrival)
        return arrival

    def deadline(self) -> float:
        """Of a wait that begins now."""
        return time.perf_counter() + self._memory.timeout_s

    def read_until(self, arrival: "Arrival", deadline: float) -> None:
        with self._reading:
            while not arrival.here:
                first = self._posted[0]
                first.sent_at = self._read(first.columns, first.add, deadline)
                first.here = True
                self._posted.popleft()

    @torch.no_grad()
    def _read(self, columns: Sequence[Tensor], add: bool, deadline: float) -> float:
        if self._connection is None:
            self._connection = self._expected()
        places, expected = _placed([(into.shape, into.dtype) for into in columns])
        start, size, sent_at = self._header(self._connection, deadline)
        if size != expected:
            raise broken(self.peer, f"it sent {size} bytes where {expected} were to come")
        for into, place in zip(columns, places, strict=True):
            if into.numel():
                content = self._memory.of(self.peer, start + place, into.shape, into.dtype)
                into.add_(content) if add else into.copy_(content)
        with suppress(OSError):  # whoever is gone needs no buffer
            self._connection.send(OFFSET.pack(start))
        return sent_at

    def _header(self, connection: socket.socket, deadline: float) -> tuple[int, int, float]:
        left, usual = deadline - time.perf_counter(), self._memory.timeout_s
        shorter = left < 0.99 * usual
        try:
            if shorter:
                set_timeout(connection, socket.SO_RCVTIMEO, left)
            header = connection.recv(HEADER.size, socket.MSG_WAITALL)
            if shorter:
                set_timeout(connection, socket.SO_RCVTIMEO, usual)
        except BlockingIOError:
            raise timed_out(self.peer, self._memory.timeout_s) from None
        except ConnectionError as error:
            raise broken(self.peer, error) from None
        if len(header) < HEADER.size:
            raise broken(self.peer, "it closed it")
        return HEADER.unpack(header)


class Arrival:
    """A message that is received into ``columns``. ``sent_at``: when it left, once waited for."""

    def __init__(self, inbox: Inbox, columns: Sequence[Tensor], add: bool) -> None:
        self._inbox, self.columns, self.add = inbox, columns, add
        self.here, self.sent_at = False, 0.0

    def wait(self, deadline: float | None = None) -> None:
        """``deadline``: by ``perf_counter``; that of a wait which begins now, unless given."""
        if not self.here:
            self._inbox.read_until(self, self._inbox.deadline() if deadline is None else deadline)


class SharedGroup:
    """``members``, ranks of the world of whom this is one, which ``memory`` joins. Collective over them."""

    def __init__(self, memory: SharedMemory, members: Sequence[int]) -> None:
        self.memory = memory
        rank, name = memory.rank, f"group of {len(members)}, {members[0]} to {members[-1]}"
        self.members, self.position = list(members), list(members).index(rank)
        self._out = {at: Outbox(memory, peer, name) for at, peer in enumerate(members) if peer != rank}
        self._in = {at: Inbox(memory, peer, name) for at, peer in enumerate(members) if peer != rank}

    def send(self, to_each: Sequence[Sequence[Rows]]) -> None:
        """``to_each[m]`` to member m; nothing to oneself."""
        for at, lane in self._out.items():
            lane.send(to_each[at])

    def receive(self, from_each: Sequence[Sequence[Tensor]], add: bool = False) -> Callable[[], float]:
        """What member m sends next is copied or, if ``add``, added to ``from_each[m]``, member by member. The result
        waits for all of it, and tells when the last had left, by ``perf_counter``."""
        posted = [lane.post(from_each[at], add) for at, lane in self._in.items()]

        def finish() -> float:
            deadline = time.perf_counter() + self.memory.timeout_s
            for arrival in posted:
                arrival.wait(deadline)
            return max(arrival.sent_at for arrival in posted)

        return finish


def _placed(columns: Sequence[tuple[Sequence[int], torch.dtype]]) -> tuple[list[int], int]:
    """Where each column begins in a message, and the bytes of them all."""
    places, end = [], 0
    for shape, dtype in columns:
        places.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = places[-1] + prod(shape) * dtype.itemsize
    return places, end
