"""Tensors between the ranks of a host, through memory that both ends have mapped: what gloo's sockets are for hosts.

A lane leads from one rank to another and keeps its order. To send, a rank writes rows into a buffer in its memory and
says over a Unix socket where they lie; the other rank copies them out when it wants them, and gives the buffer back. No
thread carries them and no network stack sees them. Gloo has a thread for every group that wakes a hundred times a
second, and two of them on either side for every piece of a message: of eight ranks that train on two cores, that took a
sixteenth of the processors' time.

Gradients and parameters, which all replicas read, lie in such memory themselves, and are not copied to be sent.

The memory has no name, and so nobody has to take it away: other ranks open it through /proc, and the kernel frees it
with the last process that has it mapped. That process's end also closes its sockets, which is how the others know.

Linux only (memfd, abstract socket names). Of a network namespace of its own, a rank sees only the sockets in it.
"""

import errno
import mmap
import os
import resource
import secrets
import socket
import struct
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict, deque
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

HEADER = struct.Struct("=qqd")
"""Of a message: where it begins in the sender's memory, its bytes, when it left."""
OFFSET = struct.Struct("=q")
"""What gives a buffer back: where it begins."""
HELLO = struct.Struct("=q64s")
"""What a lane begins with: the rank that it comes from, and its name."""
CREDENTIALS = struct.Struct("3i")
TIMEOUT = struct.Struct("ll")
LEAST_BYTES = 4096
ALIGNMENT = 64
RESERVED_BYTES = 1 << 40
"""What a rank's memory could hold: no page of it exists before it is written, and its size never has to change."""


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
    """The memory of this rank that others may read, and the lanes to and from them. Collective over the world.
    ``nodes``: what node each rank of the world counts as; ``timeout``: how long anything may take. Two ranks reach each
    other that are of one node, and find themselves on one host.

    Everything that is waited for raises RuntimeError, as torch.distributed does, when the time is up or the other rank
    has gone; what this rank lacks itself, memory or file descriptors, raises OSError.
    """

    def __init__(self, nodes: Sequence[Hashable], timeout: timedelta) -> None:
        self.rank, self.timeout_s = dist.get_rank(), timeout.total_seconds()
        self._file = -1
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"\0dualpipe-{secrets.token_hex(16)}"
        self._listener.bind(name)
        self._listener.listen(socket.SOMAXCONN)
        self._listener.setblocking(False)
        self._file = os.memfd_create("dualpipe", os.MFD_CLOEXEC)
        soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._most = RESERVED_BYTES if soft == resource.RLIM_INFINITY else min(soft, RESERVED_BYTES)
        os.ftruncate(self._file, self._most)
        everyone = [("", "", "")] * dist.get_world_size()
        dist.all_gather_object(everyone, (_host(), name, f"/proc/{os.getpid()}/fd/{self._file}"))
        self._names, self._files = [name for _, name, _ in everyone], [file for _, _, file in everyone]
        self._places = [(host, node) for (host, _, _), node in zip(everyone, nodes, strict=True)]
        self._own: mmap.mmap | None = None
        self._peers: dict[int, mmap.mmap] = {}
        self._kept: list[tuple[int, int, int]] = []
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0
        self._lock = threading.Lock()
        self._outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()
        self._lanes: Counter[tuple[str, int, str]] = Counter()
        self._connections: dict[tuple[int, str], socket.socket] = {}

    def __del__(self) -> None:
        self._listener.close()
        if self._file >= 0:
            os.close(self._file)

    def joins(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks reach each other: every rank of the world has the same answer."""
        return len({self._places[rank] for rank in ranks}) == 1

    def outbox(self, peer: int, name: str) -> "Outbox":
        """The beginning of a lane to ``peer``, where its end has the same ``name``; of several with one name, the first
        belongs to the first."""
        connection = self._timed(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            connection.connect(self._names[peer])
            connection.sendall(HELLO.pack(self.rank, self._numbered("to", peer, name).encode()))
        except ConnectionError as error:
            raise broken(peer, error) from None
        outbox = Outbox(self, connection, peer)
        self._outboxes.add(outbox)
        return outbox

    def inbox(self, peer: int, name: str) -> "Inbox":
        """The end of a lane from ``peer``."""
        return Inbox(self, peer, self._numbered("from", peer, name))

    def begun(self) -> None:
        """Every rank has made its ends of the lanes: from here on they can be used. Collective over the world."""
        dist.barrier()
        with suppress(BlockingIOError):  # there is no further one
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(True)
                self._timed(connection)
                _, user, _ = CREDENTIALS.unpack(
                    connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
                )
                hello = connection.recv(HELLO.size, socket.MSG_WAITALL) if user == os.geteuid() else b""
                if len(hello) == HELLO.size:
                    rank, text = HELLO.unpack(hello)
                    self._connections[rank, text.rstrip(b"\0").decode()] = connection

    def connection(self, peer: int, name: str) -> socket.socket:
        """Of a lane that ``peer`` has begun; once."""
        return self._connections.pop((peer, name))

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory of this rank for good, which is sent without being copied: whoever writes to it sees to it that
        nobody reads what was sent any more."""
        size = count * dtype.itemsize
        with self._lock:
            start = self._claim(size)
        content = torch.frombuffer(mmap.mmap(self._file, size, offset=start), dtype=dtype)
        self._kept.append((content.data_ptr(), size, start))
        return content

    def place_of(self, rows: Rows) -> int | None:
        """Where it lies in this rank's memory, if all of it does, and in one piece."""
        tensor = rows.tensor
        if rows.chosen is None and tensor.is_contiguous():
            at = tensor.data_ptr()
            for first, size, start in self._kept:
                if first <= at and at + tensor.nbytes <= first + size:
                    return start + at - first
        return None

    def lend(self, size: int) -> int:
        """Where a buffer of at least so many bytes begins, for a message on its way."""
        size = _rounded(size)
        with self._lock:
            if not self._free[size]:
                for outbox in self._outboxes:
                    outbox.take_back(self._free)
            return self._free[size].pop() if self._free[size] else self._claim(size)

    def own(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor that lies in this rank's memory from byte ``start`` on."""
        end = start + prod(shape) * dtype.itemsize
        with self._lock:
            if self._own is None or len(self._own) < end:
                self._own = mmap.mmap(self._file, self._mapped(end))
            return _tensor(self._own, start, shape, dtype)

    def of(self, peer: int, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The same of a peer's memory."""
        end = start + prod(shape) * dtype.itemsize
        with self._lock:
            if peer not in self._peers or len(self._peers[peer]) < end:
                file = os.open(self._files[peer], os.O_RDWR)
                self._peers[peer] = mmap.mmap(file, self._mapped(end))
                os.close(file)
            return _tensor(self._peers[peer], start, shape, dtype)

    def _claim(self, size: int) -> int:
        start = self._end
        self._end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._end > self._most:
            words = f"ulimit -f allows {self._most} bytes, and what ranks share takes more"
            raise OSError(errno.EFBIG, words)
        return start

    def _mapped(self, end: int) -> int:
        """How much to map, that it need not be done again too soon."""
        return min(1 << (end - 1).bit_length(), self._most)

    def _numbered(self, way: str, peer: int, name: str) -> str:
        self._lanes[way, peer, name] += 1
        return f"{name} {self._lanes[way, peer, name]}"

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


class Outbox:
    """The beginning of a lane. One thread at a time sends."""

    def __init__(self, memory: SharedMemory, connection: socket.socket, peer: int) -> None:
        self._memory, self._connection, self.peer = memory, connection, peer
        self._lent: dict[int, int] = {}

    def __del__(self) -> None:
        self._connection.close()

    @torch.no_grad()
    def send(self, columns: Sequence[Rows]) -> None:
        """The bytes alone travel: both ends know shapes and dtypes. What is memory of ``SharedMemory.zeros``, and sent
        alone, stays where it is; anything else may be written again at once. Waits for nobody, unless hundreds of
        messages are on their way."""
        places, size = _placed([(rows.shape, rows.tensor.dtype) for rows in columns])
        start = self._memory.place_of(columns[0]) if len(columns) == 1 else None
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

    def take_back(self, free: dict[int, list[int]]) -> None:
        """Add the buffers that were read to those that are free, by size."""
        with suppress(OSError):  # nothing has come back, or whoever gives back is gone, which sending will find
            for (start,) in OFFSET.iter_unpack(self._connection.recv(OFFSET.size << 9, socket.MSG_DONTWAIT)):
                if start in self._lent:
                    free[_rounded(self._lent.pop(start))].append(start)


class Inbox:
    """The end of a lane: what was posted first gets what was sent first, whoever waits for it."""

    def __init__(self, memory: SharedMemory, peer: int, name: str) -> None:
        self._memory, self.peer, self._name = memory, peer, name
        self._connection: socket.socket | None = None
        self._posted: deque[Arrival] = deque()
        self._reading = threading.Lock()

    def __del__(self) -> None:
        if self._connection is not None:
            self._connection.close()

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
            self._connection = self._memory.connection(self.peer, self._name)
        places, expected = _placed([(into.shape, into.dtype) for into in columns])
        start, size, sent_at = self._header(self._connection)
        if size != expected:
            raise broken(self.peer, f"it sent {size} bytes where {expected} were to come")
        for into, place in zip(columns, places, strict=True):
            if into.numel():
                content = self._content(start + place, into)
                into.add_(content) if add else into.copy_(content)
        with suppress(OSError):  # whoever is gone needs no buffer
            self._connection.send(OFFSET.pack(start))
        return sent_at

    def _content(self, start: int, into: Tensor) -> Tensor:
        try:
            return self._memory.of(self.peer, start, into.shape, into.dtype)
        except FileNotFoundError as error:  # of a process that is gone
            raise broken(self.peer, error) from None

    def _header(self, connection: socket.socket) -> tuple[int, int, float]:
        try:
            header = connection.recv(HEADER.size, socket.MSG_WAITALL)
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

    def wait(self) -> None:
        if not self.here:
            self._inbox.read_until(self)


class SharedGroup:
    """``members``, ranks of the world of whom this is one, which ``memory`` joins. Collective over them."""

    def __init__(self, memory: SharedMemory, members: Sequence[int]) -> None:
        self.memory = memory
        rank, name = memory.rank, f"group of {len(members)}, {members[0]} to {members[-1]}"
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


def _placed(columns: Sequence[tuple[Sequence[int], torch.dtype]]) -> tuple[list[int], int]:
    """Where each column begins in a message, and the bytes of them all."""
    places, end = [], 0
    for shape, dtype in columns:
        places.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = places[-1] + prod(shape) * dtype.itemsize
    return places, end


def _rounded(size: int) -> int:
    """A power of two: buffers of nearly one size serve each other's messages."""
    return 1 << (max(size, LEAST_BYTES) - 1).bit_length()


def _tensor(memory: mmap.mmap, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that lies in ``memory`` from byte ``start`` on."""
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=start).view(shape)


def _host() -> str:
    """What two ranks have in common if they can reach each other's sockets and memory: the boot of the machine, the
    namespaces of networks and processes, and the user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join([boot, *(os.readlink(f"/proc/self/ns/{of}") for of in ("net", "pid")), str(os.geteuid())])


def timed_out(peer: int, seconds: float) -> RuntimeError:
    return RuntimeError(f"Timed out after {seconds:g} s of waiting for rank {peer}")


def broken(peer: int, why: object) -> RuntimeError:
    return RuntimeError(f"Connection with rank {peer} is broken: {why}")
