"""Pipeline messages. Every channel (source, destination, kind) is a FIFO of its own.

Between ranks whose processors share memory a channel is a lane (``lanes.py``). On gloo it is a tag. On NCCL it
is a communicator with its own stream, made eagerly: operations on one communicator complete in issue order, so that a
receive posted early on a shared one would hold up the sends behind it.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.program import Kind, Message, Program, Receive, Send, dump_message
from parallel.activity import Activity
from parallel.lanes import Arrival, Inbox, Outbox, Rows
from parallel.mesh import Layout
from parallel.shared_memory import SharedMemory

Channel = tuple[int, int, Kind]
"""(source, destination, kind), ranks as pipeline positions."""


def channels(programs: Iterable[Program]) -> list[Channel]:
    """Every channel that the programs use, in an order that all ranks agree on."""
    used = {
        (rank, slot.peer, slot.message.kind) if isinstance(slot, Send) else (slot.peer, rank, slot.message.kind)
        for program in programs
        for rank, slots in enumerate(program.slots)
        for slot in slots
        if isinstance(slot, Send | Receive)
    }
    return sorted(used, key=lambda channel: (channel[0], channel[1], channel[2].value))


def channel_groups(
    layout: Layout, used: Iterable[Channel], timeout: timedelta | None = None
) -> dict[tuple[int, Channel], dist.ProcessGroup]:
    """A communicator for every channel of every replica, keyed by (data index, channel). Collective: every rank of
    the world makes all of them in the same order."""
    groups = {}
    for channel in used:
        for data in range(layout.data):
            source, destination, _ = channel
            ranks = [layout.rank(source, data), layout.rank(destination, data)]
            groups[data, channel] = dist.new_group(ranks, timeout=timeout)
    return groups


@dataclass(frozen=True)
class Lanes:
    """This rank's ends of the channels that are lanes, by (peer, kind)."""

    out: Mapping[tuple[int, Kind], Outbox] = field(default_factory=dict)
    into: Mapping[tuple[int, Kind], Inbox] = field(default_factory=dict)


def lanes_of(memory: SharedMemory, layout: Layout, rank: int, used: Iterable[Channel]) -> Lanes:
    """Lanes for those channels of this rank's replica whose ends ``memory`` joins. Collective over the world."""
    out, into = {}, {}
    position, data = layout.pipeline_index(rank), layout.data_index(rank)
    for source, destination, kind in used:
        if position not in (source, destination):
            continue
        peer = destination if position == source else source
        of_world = layout.rank(peer, data)
        if not memory.joins([rank, of_world]):
            continue
        if position == source:
            out[peer, kind] = Outbox(memory, of_world, kind.name)
        else:
            into[peer, kind] = Inbox(memory, of_world, kind.name)
    memory.begun()
    return Lanes(out, into)


class PipelineTransport:
    """One rank's messages. All have the shape and dtype of ``like``. ``groups`` as from ``channel_groups``, or None to
    tell channels apart by tag on the default group; ``lanes`` serve their channels instead. Raises LostPeer when a peer
    does not come."""

    def __init__(
        self,
        layout: Layout,
        rank: int,
        like: Tensor,
        groups: Mapping[tuple[int, Channel], dist.ProcessGroup] | None = None,
        activity: Activity | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._layout, self._like, self._groups = layout, like, groups
        self._lanes = Lanes() if lanes is None else lanes
        self._pipeline, self._data = layout.pipeline_index(rank), layout.data_index(rank)
        self._activity = Activity(rank) if activity is None else activity
        self._posted: dict[Message, tuple[dist.Work | Arrival, Tensor]] = {}
        self._leaving: deque[tuple[dist.Work, Tensor, Message, int]] = deque()
        self.bytes_sent = 0

    def send(self, message: Message, peer: int, tensor: Tensor) -> None:
        assert tensor.shape == self._like.shape and tensor.dtype == self._like.dtype, (message, tensor.shape)
        self.bytes_sent += tensor.nbytes
        to, lane = self._layout.rank(peer, self._data), self._lanes.out.get((peer, message.kind))
        if lane is not None:
            with self._activity.waiting(f"sending {_name(message)}", [to]):
                lane.send([Rows(tensor)])
            return
        outgoing = tensor.contiguous()
        group, tag = self._route(self._pipeline, peer, message.kind)
        with self._activity.waiting(f"sending {_name(message)}", [to]):
            work = dist.isend(outgoing, to, group=group, tag=tag)
        assert work is not None
        self._leaving.append((work, outgoing, message, to))
        while self._leaving and self._leaving[0][0].is_completed():
            self._leaving.popleft()

    def receive(self, message: Message, peer: int) -> None:
        buffer = torch.empty_like(self._like)
        lane = self._lanes.into.get((peer, message.kind))
        if lane is not None:
            self._posted[message] = lane.post([buffer]), buffer
            return
        group, tag = self._route(peer, self._pipeline, message.kind)
        source = self._layout.rank(peer, self._data)
        with self._activity.waiting(f"receiving {_name(message)}", [source]):
            work = dist.irecv(buffer, source, group=group, tag=tag)
        assert work is not None
        self._posted[message] = work, buffer

    def wait(self, message: Message, peer: int) -> Tensor:
        work, buffer = self._posted.pop(message)
        with self._activity.waiting(f"receiving {_name(message)}", [self._layout.rank(peer, self._data)]):
            work.wait()
        return buffer

    def flush(self) -> None:
        while self._leaving:
            work, _, message, to = self._leaving.popleft()
            with self._activity.waiting(f"sending {_name(message)}", [to]):
                work.wait()

    def _route(self, source: int, destination: int, kind: Kind) -> tuple[dist.ProcessGroup | None, int]:
        if self._groups is None:
            return None, list(Kind).index(kind)
        return self._groups[self._data, (source, destination, kind)], 0


def _name(message: Message) -> str:
    return f"{message.kind.name.lower()} {dump_message(message)}"
