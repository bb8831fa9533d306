"""Which nodes reach each other over the network that ranks use, while all of them still see the roster's folder.

Every node connects to its neighbour in the ring of places, beat by beat; a cut through the nodes cuts two links of that
ring. When a link fails twice, all nodes are asked to try all others, and once all have told whom they do not reach,
the roster decides which of them go on (``quorum``). Only a node that was reached before counts as one that is not:
where names cannot be resolved, or ports are blocked, nothing is known and nobody is cut off.
"""

import socket
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.nodes.member import Member
    from launch.nodes.roster import Roster

CONNECT_SECONDS = 1.0
MISSES = 2
_THREADS = 32
_AGAIN_BEATS = 4
"""Between two checks that a node asks for which is cut off and reaches another."""

Address = tuple[str, int]


def quorum(missing: Mapping[str, Collection[str]], order: Sequence[str]) -> list[str]:
    """The nodes that go on, of those in ``order``: all of them reach each other, and no other reaches all of them.
    ``missing``: whom each node does not reach. Of a network in parts the largest goes on, and of equal ones that with
    the first node."""
    lacks = {name: {other for other in order if other in missing[name] or name in missing[other]} for name in order}
    best_connected = sorted(order, key=lambda name: len(lacks[name]))
    sides: list[list[str]] = []
    for seed in order:
        if any(seed in side for side in sides):
            continue
        side = [seed]
        for name in best_connected:
            if name != seed and lacks[name].isdisjoint(side):
                side.append(name)
        sides.append(side)
    largest = max(map(len, sides), default=0)
    return next((sorted(side, key=order.index) for side in sides if len(side) == largest), [])


class Listener:
    """A port that answers others as long as this process lives. A context manager. Raises OSError."""

    def __init__(self, host: str) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self.address: Address = host, self._socket.getsockname()[1]
        threading.Thread(target=self._run, name="reached", daemon=True).start()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                self._socket.accept()[0].close()


class Reach:
    """The thread that looks whom ``member`` reaches. A context manager."""

    def __init__(self, member: "Member") -> None:
        self._member = member
        self._tried: set[str] = set()
        self._reached: set[str] = set()
        """Those that were, at any time."""
        self._misses, self._again = 0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reach", daemon=True)

    def __enter__(self) -> "Reach":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._member.beat_seconds):
            with suppress(OSError):  # without the file the others give this node up
                self._look(self._member.view)

    def _look(self, view: "Roster") -> None:
        name = self._member.name
        me = view.members.get(name)
        if me is None or view.closed:
            return
        others = {other: m.address for other, m in view.members.items() if other != name and m.address is not None}
        if me.checked < view.check:
            missing = self._reached & (others.keys() - self._connect(others))
            self._misses = 0
            self._member.settle(lambda roster: roster.report(name, missing))
            return
        self._reached |= self._connect({other: at for other, at in others.items() if other not in self._tried})
        self._tried |= others.keys()
        neighbour = view.neighbour(name)
        if neighbour not in self._reached:
            return
        there = bool(self._connect({neighbour: others[neighbour]}))
        self._misses = 0 if there else self._misses + 1
        if (there and me.cut and time.monotonic() > self._again) or (self._misses >= MISSES and not me.cut):
            self._again = time.monotonic() + _AGAIN_BEATS * self._member.beat_seconds
            self._member.look(lambda roster: roster.suspect())

    def _connect(self, others: Mapping[str, Address]) -> set[str]:
        """Those that are reached."""
        if not others:
            return set()
        with ThreadPoolExecutor(min(_THREADS, len(others))) as pool:
            found = dict(zip(others, pool.map(_answers, others.values()), strict=True))
        return {name for name, there in found.items() if there}


def _answers(address: Address) -> bool:
    try:
        socket.create_connection(address, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
