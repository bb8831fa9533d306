"""Memory that the ranks of a host read from each other, and the connections over which they say what is in it.

Every rank has memory of its own. Some of it is for good, such as gradients and parameters, which all replicas read
where they lie; the rest is lent for messages on their way (``lanes.py``). It has no name, and so nobody has to take it
away: other ranks open it through /proc, and the kernel frees it with the last process that has it mapped. That
process's end also closes its sockets, which is how the others know.

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
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence, Set
from contextlib import suppress
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Layout

HELLO = struct.Struct("=q64s")
"""What a connection begins with: the rank that it comes from, and its name."""
CREDENTIALS = struct.Struct("3i")
TIMEOUT = struct.Struct("ll")
LEAST_BYTES = 4096
RESERVED_BYTES = 1 << 40
"""What a rank's memory could hold: no page of it exists before it is written, and its size never has to change."""


class Borrower(Protocol):
    """Who was lent buffers."""

    def given_back(self) -> list[tuple[int, int]]:
        """(where it begins, bytes that were asked for) of each buffer that is free again."""
        ...


class SharedMemory:
    """The memory of this rank that others may read, and its connections with them. Collective over the world.
    ``nodes``: what node each rank of the world counts as; ``timeout``: how long anything may take. Two ranks reach each
    other that are of one node, and find themselves on one host.

    Everything that is waited for raises RuntimeError, as torch.distributed does, when the time is up or the other rank
    has gone; what this rank lacks itself, memory or file descriptors, raises OSError.
    """

    def __init__(self, nodes: Sequence[Hashable], timeout: timedelta) -> None:
        self._file = -1
        self._files: dict[int, int] = {}
        self.rank, self.timeout_s = dist.get_rank(), timeout.total_seconds()
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
        self._names = [name for _, name, _ in everyone]
        places = [(host, node) for (host, _, _), node in zip(everyone, nodes, strict=True)]
        for rank, (_, _, file) in enumerate(everyone):
            if rank != self.rank and places[rank] == places[self.rank]:
                with suppress(PermissionError):  # a kernel that hides it makes two hosts of one
                    self._files[rank] = os.open(file, os.O_RDWR)
        self._reached: list[Set[int]] = [set()] * len(everyone)
        dist.all_gather_object(self._reached, {self.rank, *self._files})
        self._own: mmap.mmap | None = None
        self._peers: dict[int, mmap.mmap] = {}
        self._kept: list[tuple[Tensor, int]] = []
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0
        self._lock = threading.Lock()
        self.borrowers: weakref.WeakSet[Borrower] = weakref.WeakSet()
        self._of_one_name: Counter[tuple[str, int, str]] = Counter()
        self._connections: dict[tuple[int, str], socket.socket] = {}

    def __del__(self) -> None:
        for file in (self._file, *self._files.values()):
            if file >= 0:
                os.close(file)

    def joins(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks reach each other: every rank of the world has the same answer."""
        return all(self._reached[rank] >= set(ranks) for rank in ranks)

    def connect(self, peer: int, name: str) -> socket.socket:
        """Begin the connection ``name`` to ``peer``, who calls it the same; of several with one name, the first belongs
        to the first."""
        connection = self._timed(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            connection.connect(self._names[peer])
            connection.sendall(HELLO.pack(self.rank, self._numbered("to", peer, name).encode()))
        except ConnectionError as error:
            raise broken(peer, error) from None
        return connection

    def expect(self, peer: int, name: str) -> Callable[[], socket.socket]:
        """The connection that ``peer`` begins, once all have ``begun``."""
        key = peer, self._numbered("from", peer, name)
        return lambda: self._connections.pop(key)

    def begun(self) -> None:
        """Every rank has begun its connections: from here on they can be used. Collective over the world."""
        dist.barrier()
        with suppress(BlockingIOError):  # there is no further one
            while True:
                connection, _ = self._listener.accept()
                begun_by = _begun_by(connection)
                if begun_by is not None:
                    connection.setblocking(True)
                    self._connections[begun_by] = self._timed(connection)

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory of this rank for good, which is sent without being copied: whoever writes to it sees to it that
        nobody reads what was sent any more."""
        size = count * dtype.itemsize
        with self._lock:
            start = self._claim(size)
        content = torch.frombuffer(mmap.mmap(self._file, size, offset=start), dtype=dtype)
        self._kept.append((content, start))
        return content

    def place_of(self, tensor: Tensor) -> int | None:
        """Where it lies in this rank's memory, if all of it does, and in one piece."""
        if tensor.is_contiguous():
            at = tensor.data_ptr()
            for kept, start in self._kept:
                inside = at - kept.data_ptr()
                if 0 <= inside <= kept.nbytes - tensor.nbytes:
                    return start + inside
        return None

    def lend(self, size: int) -> int:
        """Where a buffer of at least so many bytes begins, for a message on its way. It comes back from one of the
        ``borrowers``."""
        size = _rounded(size)
        with self._lock:
            if not self._free[size]:
                for borrower in self.borrowers:
                    for start, lent in borrower.given_back():
                        self._free[_rounded(lent)].append(start)
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
                self._peers[peer] = mmap.mmap(self._files[peer], self._mapped(end))
            return _tensor(self._peers[peer], start, shape, dtype)

    def _claim(self, size: int) -> int:
        start = self._end
        self._end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._end > self._most:
            raise OSError(errno.ENOMEM, f"ulimit -f allows {self._most} bytes, and what ranks share takes more")
        return start

    def _mapped(self, end: int) -> int:
        """How much to map, that it need not be done again too soon."""
        return min(1 << (end - 1).bit_length(), self._most)

    def _numbered(self, way: str, peer: int, name: str) -> str:
        self._of_one_name[way, peer, name] += 1
        return f"{name} {self._of_one_name[way, peer, name]}"

    def _timed(self, connection: socket.socket) -> socket.socket:
        """With the kernel's own timeout, which saves the calls that wait before each call."""
        set_timeout(connection, socket.SO_SNDTIMEO, self.timeout_s)
        set_timeout(connection, socket.SO_RCVTIMEO, self.timeout_s)
        return connection


def _begun_by(connection: socket.socket) -> tuple[int, str] | None:
    """Which rank, and under which name; None for anybody else. Ranks have said it before they met."""
    _, user, _ = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    with suppress(BlockingIOError, UnicodeDecodeError):
        hello = connection.recv(HELLO.size, socket.MSG_DONTWAIT)
        if user == os.geteuid() and len(hello) == HELLO.size:
            rank, text = HELLO.unpack(hello)
            return rank, text.rstrip(b"\0").decode()
    return None


def shared_memory(layout: Layout, device: torch.device, timeout: timedelta) -> SharedMemory | None:
    """What the ranks of a layout share where processors compute, None on a GPU or in a process alone. Ranks of two
    nodes share nothing, even where one host plays both. Collective."""
    if device.type != "cpu" or not dist.is_initialized() or not sys.platform.startswith("linux"):
        return None
    return SharedMemory([layout.node(rank) for rank in range(layout.world_size)], timeout)


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


def set_timeout(connection: socket.socket, way: int, seconds: float) -> None:
    microseconds = max(int(seconds * 1e6), 1)  # zero would be for ever
    connection.setsockopt(socket.SOL_SOCKET, way, TIMEOUT.pack(*divmod(microseconds, 1000000)))


def timed_out(peer: int, seconds: float) -> RuntimeError:
    return RuntimeError(f"Timed out after {seconds:g} s of waiting for rank {peer}")


def broken(peer: int, why: object) -> RuntimeError:
    return RuntimeError(f"Connection with rank {peer} is broken: {why}")
