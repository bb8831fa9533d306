"""Plays a lowered program: each rank goes through its slots in order, and waits where its transport makes it wait.

One pass answers whether the program comes to its end (``validate``) and when (``simulate``). A rank that cannot go on
sleeps until the slot it needs is played elsewhere, so the work is linear in the number of slots.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum

from dualpipe.cost import Costs
from dualpipe.program import (
    Compute,
    Free,
    Gather,
    Kind,
    Message,
    Overlap,
    Program,
    ProgramError,
    Receive,
    Reduce,
    Send,
    Slot,
    Step,
    Wait,
    dump_slot,
)


class Transport(Enum):
    """What a message needs to get across. On each channel (from, to, kind) the k-th send meets the k-th receive.

    EAGER       the send: messages are buffered on their way
    RENDEZVOUS  a send holds its rank until the receive is posted (gloo)
    STREAM      both, and every earlier message of the channel; a send does not hold its rank (NCCL, one communicator
                a channel)
    """

    EAGER = "eager"
    RENDEZVOUS = "rendezvous"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class Span:
    """A slot that takes time on its rank, and when."""

    slot: Slot
    start: float
    end: float


@dataclass(slots=True)
class _Channel:
    sent: list[float] = field(default_factory=list)  # when the k-th send was started
    posted: list[float] = field(default_factory=list)
    place: dict[Message, int] = field(default_factory=dict)  # of a posted message in the channel's order
    crossed: list[float] = field(default_factory=list)  # STREAM: when the k-th message had arrived
    sleeper: int | None = None  # the rank that waits for the other end


class Progress:
    """The state of a play; ``spans`` and ``clock`` (per rank) hold the outcome once ``play`` has returned."""

    def __init__(self, program: Program, transport: Transport, costs: Costs):
        self.program = program
        self.transport = transport
        self.costs = costs
        self.clock = [0.0] * program.ranks
        self.spans: list[list[Span]] = [[] for _ in range(program.ranks)]
        self.reduced = [0.0] * program.ranks  # when the reductions that a rank has started are done
        self._next = [0] * program.ranks
        self._channels: defaultdict[tuple[int, int, Kind], _Channel] = defaultdict(_Channel)
        self._met: defaultdict[Slot, list[int]] = defaultdict(list)
        self._awake = list(reversed(range(program.ranks)))
        self._holders: defaultdict[int, set[int]] = defaultdict(set)
        for route in program.routes:
            for stage, rank in enumerate(route):
                self._holders[stage].add(rank)

    def play(self) -> None:
        """Play to the end. Raises ProgramError, naming the first rank that cannot go on and what it needs."""
        while self._awake:
            rank = self._awake.pop()
            slots = self.program.slots[rank]
            while self._next[rank] < len(slots) and self._passes(rank, slots[self._next[rank]]):
                self._next[rank] += 1
        stuck = [rank for rank, slots in enumerate(self.program.slots) if self._next[rank] < len(slots)]
        if stuck:
            index = self._next[stuck[0]]
            slot = self.program.slots[stuck[0]][index]
            raise ProgramError(
                f"rank {stuck[0]}, slot {index} ({dump_slot(slot)}): deadlock on {self.transport.value} transport: "
                f"{self._lacks(stuck[0], slot)}; {len(stuck)} of {self.program.ranks} ranks are stuck"
            )

    def _passes(self, rank: int, slot: Slot) -> bool:
        """Play one slot; False when its rank has to sleep."""
        match slot:
            case Compute() | Overlap():
                start = self.clock[rank]
                self.clock[rank] = start + self.costs.duration(slot)
                self.spans[rank].append(Span(slot, start, self.clock[rank]))
                return True
            case Send(message, peer):
                return self._send(rank, self._channels[rank, peer, message.kind])
            case Receive(message, peer):
                self._post(rank, self._channels[peer, rank, message.kind], message)
                return True
            case Wait(message, peer):
                return self._wait(rank, self._channels[peer, rank, message.kind], message)
            case Free():
                return True
            case Reduce():
                # Runs beside the slots that follow, and holds only the step.
                span = Span(slot, self.clock[rank], self.clock[rank] + self.costs.reduce)
                self.spans[rank].append(span)
                self.reduced[rank] = max(self.reduced[rank], span.end)
                return True
            case Step():
                return self._meet(rank, slot, self.program.ranks, self.costs.step)
            case Gather(stage):
                return self._meet(rank, slot, len(self._holders[stage]), self.costs.gather)
            case _:
                raise AssertionError(slot)

    def _send(self, rank: int, channel: _Channel) -> bool:
        k = len(channel.sent)
        if self.transport is Transport.RENDEZVOUS:
            if k >= len(channel.posted):
                channel.sleeper = rank
                return False
            self.clock[rank] = max(self.clock[rank], channel.posted[k])
        channel.sent.append(self.clock[rank])
        self._wake(channel)
        return True

    def _post(self, rank: int, channel: _Channel, message: Message) -> None:
        channel.place[message] = len(channel.posted)
        channel.posted.append(self.clock[rank])
        self._wake(channel)

    def _wait(self, rank: int, channel: _Channel, message: Message) -> bool:
        k = channel.place.get(message)
        if k is None or k >= len(channel.sent):
            channel.sleeper = rank
            return False
        if self.transport is Transport.STREAM:
            arrival = self._crossing(channel, k)
        else:
            arrival = channel.sent[k] + self.costs.message
        self.clock[rank] = max(self.clock[rank], arrival)
        return True

    def _crossing(self, channel: _Channel, k: int) -> float:
        """When message k has crossed: each starts with the later of its two ends, and after the one before it."""
        while len(channel.crossed) <= k:
            i = len(channel.crossed)
            before = channel.crossed[-1] if channel.crossed else 0.0
            channel.crossed.append(max(channel.sent[i], channel.posted[i], before) + self.costs.message)
        return channel.crossed[k]

    def _wake(self, channel: _Channel) -> None:
        if channel.sleeper is not None:
            self._awake.append(channel.sleeper)
            channel.sleeper = None

    def _meet(self, rank: int, slot: Step | Gather, size: int, cost: float) -> bool:
        """The last rank to come takes all of them past the slot."""
        met = self._met[slot]
        met.append(rank)
        if len(met) < size:
            return False
        start = max(max(self.clock[r], self.reduced[r]) for r in met)
        for r in met:
            self.spans[r].append(Span(slot, start, start + cost))
            self.clock[r] = start + cost
            if r != rank:
                self._next[r] += 1
                self._awake.append(r)
        del self._met[slot]
        return True

    def _lacks(self, rank: int, slot: Slot) -> str:
        match slot:
            case Send(_, peer):
                return f"rank {peer} has not posted the receive"
            case Wait(message, peer):
                posted = message in self._channels[peer, rank, message.kind].place
                return f"rank {peer} has not sent it" if posted else "its receive is not posted"
            case Step() | Gather():
                holders = range(self.program.ranks) if isinstance(slot, Step) else sorted(self._holders[slot.stage])
                missing = [other for other in holders if other not in self._met[slot]]
                return f"ranks {missing[:4]} have not come to it" if missing else "a rank came that does not belong"
            case _:
                raise AssertionError(slot)
