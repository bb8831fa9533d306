"""Tensors between the ranks of a host, through memory that both ends have mapped: what gloo's sockets are for hosts.

A lane leads from one rank to another and keeps its order. To send, a rank writes rows into a buffer of the lane and
says over a Unix socket where they lie, which never waits for anybody; the other rank copies them out when it wants
them, and gives the buffer back. No thread carries them and no network stack sees them. Gloo has a thread for every
group that wakes a hundred times a second, and two of them on either side for every piece of a message: of eight ranks
that train on two cores, that took a sixteenth of the processors' time.

The memory has no name, and so nobody has to take it away: its file descriptor goes over the socket, and the kernel
frees it with the last process that has it. That process's end also closes its sockets, which is how the others know.

Linux only (memfd, abstract socket names). Of a network namespace of its own, a rank sees only the sockets in it.
"""

import mmap
import os
import resource
import secrets
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Layout

HEADER = struct.Struct("=qqqd")
"""Of a message: where its buffer begins, its bytes, the bytes of memory up to its end, when it left."""
OFFSET = struct.Struct("=q")
"""What gives a buffer back: where it begins."""
HELLO = struct.Struct("=q64s")
"""What a lane begins with: the rank that it comes from and its name, beside the file descriptor of its memory."""
TIMEOUT = struct.Struct("ll")
LEAST_BYTES = 4096
ALIGNMENT = 64
RESERVED_BYTES = 1 << 40
"""What a lane's memory could hold: no page of it exists before it is written, and its size never has to change."""


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


class SharedMemory:
    """The lanes of this rank. Collective over the world. ``nodes``: what node each rank of the world counts as;
    ``timeout``: how long anything may take. Two ranks reach each other that are of one node, and find themselves on
    one host.

    Everything that is waited for raises RuntimeError, as torch.distributed does, when the time is up or the other rank
    has gone.
    """

    def __init__(self, nodes: Sequence[Hashable], timeout: timedelta) -> None:
        self._rank, self.timeout_s = dist.get_rank(), timeout.total_seconds()
        self._lanes: Counter[tuple[str, int, str]] = Counter()
        self._arrived: dict[tuple[int, str], tuple[socket.socket, int]] = {}
        self._accepting = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"\0dualpipe-{secrets.token_hex(16)}"
        self._listener.bind(name)
        self._listener.listen(socket.SOMAXCONN)
        self._listener.settimeout(self.timeout_s)
        everyone = [("", "")] * dist.get_world_size()
        dist.all_gather_object(everyone, (_host(), name))
        self._places = [(host, node) for (host, _), node in zip(everyone, nodes, strict=True)]
        self._names = [name for _, name in everyone]

    def __del__(self) -> None:
        self._listener.close()
        for connection, file in self._arrived.values():
            connection.close()
            os.close(file)

    def joins(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks reach each other: every rank of the world has the same answer."""
        return len({self._places[rank] for rank in ranks}) == 1

    def begun(self) -> None:
        """Wait until every rank has begun its lanes: who leaves after that is not missed by one that begins them.
        Collective over the world."""
        dist.barrier()

    def outbox(self, peer: int, name: str) -> "Outbox":
        """The beginning of a lane to ``peer``, where its end has the same ``name``; of several with one name, the first
        belongs to the first. Waits for nobody."""
        connection = self._timed(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            connection.connect(self._names[peer])
        except OSError as error:
            raise _broken(peer, error) from None
        return Outbox(connection, peer, HELLO.pack(self._rank, self._numbered("to", peer, name).encode()))

    def inbox(self, peer: int, name: str) -> "Inbox":
        """The end of a lane from ``peer``, who is waited for when something is."""
        return Inbox(self, peer, self._numbered("from", peer, name))

    def _numbered(self, way: str, peer: int, name: str) -> str:
        self._lanes[way, peer, name] += 1
        return f"{name} {self._lanes[way, peer, name]}"

    def accept(self, peer: int, name: str) -> tuple[socket.socket, int]:
        """The connection of a lane and the file descriptor of its memory, once ``peer`` has begun it."""
        with self._accepting:
            while (peer, name) not in self._arrived:
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    raise _timed_out(peer, self.timeout_s) from None
                self._timed(connection)
                hello, files, _, _ = socket.recv_fds(connection, HELLO.size, 1)
                if len(hello) == HELLO.size and len(files) == 1:
                    rank, text = HELLO.unpack(hello)
                    self._arrived[rank, text.rstrip(b"\0").decode()] = connection, files[0]
            return self._arrived.pop((peer, name))

    def _timed(self, connection: socket.socket) -> socket.socket:
        """With the kernel's own timeout, which saves the calls that wait before each call."""
        seconds, rest = divmod(self.timeout_s, 1)
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, way, TIMEOUT.pack(int(seconds), int(rest * 1e6)))
        return connection


def shared_memory(layout: Layout, device: torch.device, timeout: timedelta) -> SharedMemory | None:
    """What the ranks of a layout share where processors compute, None on a GPU or in a process alone. Ranks of two
    nodes share nothing, even where one host plays both. Collective."""
    if device.type != "cpu" or not dist.is_initialized() or not sys.platform.startswith("linux"):
        return None
    return SharedMemory([layout.node(rank) for rank in range(layout.world_size)], timeout)


@dataclass
class _Buffer:
    start: int
    size: int
    free: bool = True


class Outbox:
    """The beginning of a lane. One thread at a time sends."""

    def __init__(self, connection: socket.socket, peer: int, hello: bytes) -> None:
        self._connection, self.peer = connection, peer
        self._memory: mmap.mmap | None = None
        self._buffers: dict[int, _Buffer] = {}
        self._end = 0
        self._most = _largest_file()
        self._file = os.memfd_create("dualpipe-lane", os.MFD_CLOEXEC)
        os.ftruncate(self._file, self._most)
        socket.send_fds(connection, [hello], [self._file])

    def __del__(self) -> None:
        self._connection.close()
        os.close(self._file)

    @torch.no_grad()
    def send(self, columns: Sequence[Rows]) -> None:
        """Their memory may be written again at once. The bytes alone travel: both ends know shapes and dtypes."""
        places, size = _placed([(rows.shape, rows.tensor.dtype) for rows in columns])
        buffer = self._free_buffer(size)
        for rows, place in zip(columns, places, strict=True):
            if prod(rows.shape):
                assert self._memory is not None
                rows.write(_tensor(self._memory, buffer.start + place, rows.shape, rows.tensor.dtype))
        header = HEADER.pack(buffer.start, size, buffer.start + buffer.size, time.perf_counter())
        try:
            self._connection.sendall(header)
        except OSError as error:
            raise _broken(self.peer, error) from None
        buffer.free = False

    def _free_buffer(self, size: int) -> _Buffer:
        """The smallest free one that is large enough, or a new one, of a power of two."""
        with suppress(OSError):  # nothing has come back, or whoever gives back is gone, which sending will find
            for (start,) in OFFSET.iter_unpack(self._connection.recv(OFFSET.size << 9, socket.MSG_DONTWAIT)):
                self._buffers[start].free = True
        fitting = [buffer for buffer in self._buffers.values() if buffer.free and buffer.size >= size]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.size)
        buffer = _Buffer(self._end, 1 << (max(size, LEAST_BYTES) - 1).bit_length())
        self._end += buffer.size
        if self._end > self._most:
            raise RuntimeError(f"shared memory of {self._end} bytes is more than ulimit -f allows: {self._most}")
        self._memory = mmap.mmap(self._file, self._end)
        self._buffers[buffer.start] = buffer
        return buffer


class Inbox:
    """The end of a lane: what was posted first gets what was sent first, whoever waits for it."""

    def __init__(self, memory: SharedMemory, peer: int, name: str) -> None:
        self._lanes, self.peer, self._name = memory, peer, name
        self._connection: socket.socket | None = None
        self._file = -1
        self._memory: mmap.mmap | None = None
        self._posted: deque[Arrival] = deque()
        self._reading = threading.Lock()

    def __del__(self) -> None:
        if self._connection is not None:
            self._connection.close()
            os.close(self._file)

    def post(self, columns: Sequence[Tensor], add: bool = False) -> "Arrival":
        """``columns``, each contiguous, are what the next message is copied or, if ``add``, added to."""
        arrival = Arrival(self, [into.detach() for into in columns], add)
        self._posted.append(arrival)
        return arrival

    def read_until(self, arrival: "Arrival") -> None:
        with self._reading:
            while not arrival.here:
                first = self._posted[0]
                first.sent_at = self._read(first.columns, first.add)
                first.here = True
                self._posted.popleft()

    @torch.no_grad()
    def _read(self, columns: Sequence[Tensor], add: bool) -> float:
        if self._connection is None:
            self._connection, self._file = self._lanes.accept(self.peer, self._name)
        places, expected = _placed([(into.shape, into.dtype) for into in columns])
        start, size, end, sent_at = self._header(self._connection)
        if size != expected:
            raise _broken(self.peer, f"it sent {size} bytes where {expected} were to come")
        if self._memory is None or end > len(self._memory):
            self._memory = mmap.mmap(self._file, end)
        for into, place in zip(columns, places, strict=True):
            if into.numel():
                content = _tensor(self._memory, start + place, into.shape, into.dtype)
                into.add_(content) if add else into.copy_(content)
        with suppress(OSError):  # whoever is gone needs no buffer
            self._connection.send(OFFSET.pack(start))
        return sent_at

    def _header(self, connection: socket.socket) -> tuple[int, int, int, float]:
        try:
            header = connection.recv(HEADER.size, socket.MSG_WAITALL)
        except BlockingIOError:
            raise _timed_out(self.peer, self._lanes.timeout_s) from None
        except OSError as error:
            raise _broken(self.peer, error) from None
        if len(header) < HEADER.size:
            raise _broken(self.peer, "it closed it")
        return HEADER.unpack(header)


class Arrival:
    """A message that is received into ``columns``. ``sent_at``: when it left, once waited for."""

    def __init__(self, inbox: Inbox, columns: Sequence[Tensor], add: bool) -> None:
        self._inbox, self.columns, self.add = inbox, columns, add
        self.here, self.sent_at = False, 0.0

    def wait(self) -> None:
        if not self.here:
            self._inbox.read_until(self)


class SharedGroup:
    """``members``, ranks of the world of whom this is one, which ``memory`` joins. Collective over them."""

    def __init__(self, memory: SharedMemory, members: Sequence[int]) -> None:
        rank, name = dist.get_rank(), f"group of {len(members)}, {members[0]} to {members[-1]}"
        self.members, self.position = list(members), list(members).index(rank)
        self._out = {at: memory.outbox(peer, name) for at, peer in enumerate(members) if peer != rank}
        self._in = {at: memory.inbox(peer, name) for at, peer in enumerate(members) if peer != rank}

    def send(self, to_each: Sequence[Sequence[Rows]]) -> None:
        """``to_each[m]`` to member m; nothing to oneself."""
        for at, lane in self._out.items():
            lane.send(to_each[at])

    def receive(self, from_each: Sequence[Sequence[Tensor]], add: bool = False) -> Callable[[], float]:
        """What member m sends next is copied or, if ``add``, added to ``from_each[m]``, member by member. The result
        waits for all of it, and tells when the last had left, by ``perf_counter``."""
        posted = [lane.post(from_each[at], add) for at, lane in self._in.items()]

        def finish() -> float:
            for arrival in posted:
                arrival.wait()
            return max(arrival.sent_at for arrival in posted)

        return finish


def _largest_file() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return RESERVED_BYTES if soft == resource.RLIM_INFINITY else min(soft, RESERVED_BYTES)


def _placed(columns: Sequence[tuple[Sequence[int], torch.dtype]]) -> tuple[list[int], int]:
    """Where each column begins in a message, and the bytes of them all."""
    places, end = [], 0
    for shape, dtype in columns:
        places.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = places[-1] + prod(shape) * dtype.itemsize
    return places, end


def _tensor(memory: mmap.mmap, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that lies in ``memory`` from byte ``start`` on."""
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=start).view(shape)


def _host() -> str:
    """What two ranks have in common if they can reach each other's sockets: the boot of the machine, and the network
    namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def _timed_out(peer: int, seconds: float) -> RuntimeError:
    return RuntimeError(f"Timed out after {seconds:g} s of waiting for rank {peer}")


def _broken(peer: int, why: object) -> RuntimeError:
    return RuntimeError(f"Connection with rank {peer} is broken: {why}")
