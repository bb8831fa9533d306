"""Nodes as processes in namespaces of their own: made, connected, run, and gone with whoever made them.

A node holds the other end of a socket to this process, and ends with it (``node.py``). So cleaning up needs nobody:
when this process ends, killed or not, the kernel closes the socket, and then removes processes, links and queues
itself. No namespace has a name, so none can be left over, and none of another run can be met.
"""

import contextlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TextIO

from launch import output, stop
from launch.hosts.links import LinkError, Rate, address, connect

GRACE_SECONDS = 10.0
"""How long the other nodes may take to end when one has failed."""
PORT = 29500
"""Of torchrun's rendezvous on the first node; nobody else uses ports there."""
# Every node has network, host name, mounts and processes of its own. Its first process dies with ``unshare``.
_NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
_FIRST_PROCESS = [sys.executable, "-I", "-S", str(Path(__file__).with_name("node.py"))]


@dataclass(frozen=True)
class Heard:
    """This process got a signal."""

    number: int


@dataclass(frozen=True)
class Ended:
    """The command of a node has ended, and all its output was passed on."""

    node: int
    status: int


@dataclass(frozen=True)
class Unwritable:
    """What a node said could not be written."""

    error: output.OutputError


Event = Heard | Ended | Unwritable


class Node:
    """One node: ``process`` is in its network namespace from ``wait_until_made`` on."""

    def __init__(self, name: str, hosts: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*_NAMESPACES, *_FIRST_PROCESS, str(theirs.fileno()), name, hosts, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C comes through the socket, once
                env=environment,
            )

    def wait_until_made(self) -> None:
        """Raises LinkError when there can be no such node."""
        if not self._control.recv(1):
            _, said = self.process.communicate()
            raise LinkError(f"{self.name} could not be made: {'; '.join(said.decode(errors='replace').splitlines())}")

    def start(self) -> None:
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        """Signal ``number`` to the command; nothing if it has ended."""
        with contextlib.suppress(OSError):
            self._control.send(bytes([number]))

    def end(self) -> None:
        """Kill every process of the node. Once more, it does no harm."""
        self._control.close()


class Cluster:
    """``nodes`` nodes that run ``command`` with ``ranks_per_node`` in its environment; none of them is left behind."""

    def __init__(self, nodes: int, ranks_per_node: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        digits = len(str(nodes - 1))
        self.names = [f"node{n:0{digits}}" for n in range(nodes)]
        """Of one length: the rendezvous of torchrun orders nodes by name."""
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{address(n)} {name}\n::ffff:{address(n)} {name}\n" for n, name in enumerate(self.names)
        )
        rendezvous = {
            "PET_NNODES": str(nodes),
            "PET_NPROC_PER_NODE": str(ranks_per_node),
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": f"{self.names[0]}:{PORT}",
            "PET_RDZV_ID": uuid.uuid4().hex,
        }
        self._made: list[Node] = []
        try:
            self._made.append(Node("switch", hosts, [], environment))
            for n, name in enumerate(self.names):
                there = {**environment, **rendezvous, "NODE_RANK": str(n)}
                self._made.append(Node(name, hosts, command, there))
            for node in self._made:
                node.wait_until_made()
        except BaseException:
            self.close()
            raise
        self.switch, *self.nodes = self._made

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all nodes, and wait until their processes are gone."""
        for node in self._made:
            node.end()
        for node in self._made:
            node.process.wait()

    def connect(self, inter_node: Rate | None, intra_node: Rate | None) -> None:
        """Give every node its address and its links. Raises LinkError."""
        connect(self.switch.process.pid, [node.process.pid for node in self.nodes], inter_node, intra_node)
        for n, node in enumerate(self.nodes):
            print(f"{node.name}: {address(n)}, namespaces of process {node.process.pid}", file=sys.stderr, flush=True)

    def run(self) -> int:
        """Run the command on every node, pass on output and signals. Exit status: 0, or that of the first node that
        failed, or 128 + N when it was signal N that ended them."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def hear(number: int, frame: FrameType | None) -> None:
            events.put(Heard(number))

        for heard in stop.heeded():
            signal.signal(heard, hear)
        for n, node in enumerate(self.nodes):
            node.start()
            threading.Thread(target=_follow, args=(n, node, events), daemon=True).start()
        return self._wait(events)

    def _wait(self, events: "queue.SimpleQueue[Event]") -> int:
        running = set(range(len(self.nodes)))
        asked = failed = deadline = None
        while running:
            try:
                event = events.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                deadline = None
                for n in running:
                    self.nodes[n].end()
                continue
            match event:
                case Heard(number):
                    asked = asked or number
                    for n in running:
                        self.nodes[n].send(number)
                    continue
                case Ended(n, status):
                    running.discard(n)
                    line = f"{self.names[n]} ended with status {status}"
                case Unwritable(error):
                    status, line = 1, str(error)
            if status and failed is None:
                failed = status
                if asked is None:  # whoever asked may ask again; until then the others may take their time
                    deadline = time.monotonic() + GRACE_SECONDS
                    print(f"error: {line}", file=sys.stderr, flush=True)
                    for n in running:
                        self.nodes[n].send(signal.SIGTERM)
        if failed and asked:
            return 128 + asked
        return failed or 0


def _follow(n: int, node: Node, events: "queue.SimpleQueue[Event]") -> None:
    """Pass on what a node says until it has ended."""
    streams = (node.process.stdout, sys.stdout), (node.process.stderr, sys.stderr)
    pumps = [threading.Thread(target=_pump, args=(node.name, *ends, events), daemon=True) for ends in streams]
    for pump in pumps:
        pump.start()
    for pump in pumps:
        pump.join()
    status = node.process.wait()
    events.put(Ended(n, status if status >= 0 else 128 - status))


def _pump(name: str, source: IO[bytes], target: TextIO, events: "queue.SimpleQueue[Event]") -> None:
    """Write every line of ``source`` with the node's name before it, whole."""
    for line in source:
        text = line.decode(errors="backslashreplace").rstrip("\n")
        try:
            target.write(f"{name} | {text}\n")
            target.flush()
        except output.OutputError as error:  # from here on the stream leads nowhere, and takes everything
            events.put(Unwritable(error))
