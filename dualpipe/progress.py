"""Plays a lowered program: each rank goes through its slots in order, and waits where its transport makes it wait.

One pass answers whether the program comes to its end (``validate``) and when (``simulate``). A rank that cannot go on
sleeps until the slot it needs is played elsewhere, so the work is linear in the number of slots. Every time is the
maximum of sums of costs along the order that the program fixes; that is why no cost can shorten a step by growing.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from dualpipe.cost import Costs, CostTable
from dualpipe.holdings import Codes, Crossing, Holdings
from dualpipe.program import (
    Compute,
    Free,
    Gather,
    Op,
    Overlap,
    Program,
    ProgramError,
    Receive,
    Reduce,
    Send,
    Slot,
    Step,
    Wait,
    computed,
    dump_slot,
)


class Transport(Enum):
    """What a message needs to get across. On each channel (from, to, kind) the k-th send meets the k-th receive.

    EAGER       the send: messages are buffered on their way
    RENDEZVOUS  a send holds its rank until the receive is posted (gloo)
    STREAM      both, and every earlier message of the channel; a send does not hold its rank (NCCL, one communicator
                a channel)

    Messages from one rank to another share a link, which each occupies for a while, in the order of the sends. On
    STREAM, where each channel keeps an order of its own, each is a link of its own.
    """

    EAGER = "eager"
    RENDEZVOUS = "rendezvous"
    STREAM = "stream"


class Waited(NamedTuple):
    """What held a rank longest before a span could start.

    ``slot`` is the wait or the rendezvous send in question, or the collective itself; ``peer`` the rank that came last
    to it. From ``ready`` on, when the peer had done its part, only the communication was missing.
    """

    slot: Slot
    peer: int
    ready: float


class Span(NamedTuple):
    """A slot that takes time on its rank, and when.

    ``waited`` is None when the rank did not have to wait before it; ``inputs`` are the messages that it works on.
    """

    slot: Slot
    start: float
    end: float
    waited: Waited | None = None
    inputs: tuple[Crossing, ...] = ()


@dataclass(slots=True)
class _Link:
    occupied: float  # by one message
    latency: float
    free: float = 0.0  # from when on


@dataclass(slots=True)
class _Channel:
    link: _Link
    codes: list[int] = field(default_factory=list)  # of the messages, in the order of the sends
    makers: list[int] = field(default_factory=list)  # the spans that made them
    sent: list[float] = field(default_factory=list)  # when the k-th send was started
    arrived: list[float] = field(default_factory=list)  # when the k-th message arrives, as far as that is known
    posted: list[float] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)  # posted and not yet waited for -> place in the order
    sleeper: int | None = None  # the rank that waits for the other end


class Progress:
    """The state of a play. ``spans``, ``holdings`` (with the memory over time) and ``clock``, one entry for each rank,
    hold the outcome once ``play`` has returned."""

    def __init__(self, program: Program, transport: Transport, costs: Costs | CostTable):
        self.program = program
        self.transport = transport
        self.costs = costs if isinstance(costs, CostTable) else CostTable(costs, program)
        self.clock = [0.0] * program.ranks
        self.spans: list[list[Span]] = [[] for _ in range(program.ranks)]
        self.reduced = [0.0] * program.ranks  # when the reductions that a rank has started are done
        self._codes = Codes(program)
        trains = any(c.op is not Op.FORWARD for slots in program.slots for slot in slots for c in computed(slot))
        self.holdings = [
            Holdings(self._codes, rank, trains, self.costs.activation_bytes) for rank in range(program.ranks)
        ]
        self._next = [0] * program.ranks
        self._waited: list[Waited | None] = [None] * program.ranks
        self._links: dict[tuple[int, int], _Link] = {}
        self._channels: dict[tuple[int, int, int], _Channel] = {}
        self._met: defaultdict[Slot, list[int]] = defaultdict(list)
        self._awake = list(reversed(range(program.ranks)))
        self._holders: defaultdict[int, set[int]] = defaultdict(set)
        for route in program.routes:
            for stage, rank in enumerate(route):
                self._holders[stage].add(rank)

    def play(self) -> None:
        """Play to the end. Raises ProgramError, naming rank and slot, for a slot whose rank does not have what it
        needs, and for the first rank that cannot go on."""
        # A table instead of a match: the number of slots is the cost of a play.
        passes: dict[type, Callable[[int, Any], bool]] = {
            Compute: self._compute,
            Overlap: self._overlap,
            Send: self._send,
            Receive: self._post,
            Wait: self._wait,
            Free: self._free,
            Reduce: self._reduce,
            Step: self._step,
            Gather: self._gather,
        }
        while self._awake:
            rank = self._awake.pop()
            slots, index = self.program.slots[rank], self._next[rank]
            try:
                while index < len(slots) and passes[type(slots[index])](rank, slots[index]):
                    index += 1
            except ProgramError as error:
                raise ProgramError(f"rank {rank}, slot {index} ({dump_slot(slots[index])}): {error}") from None
            self._next[rank] = index
        self._check_end()

    def _compute(self, rank: int, slot: Compute) -> bool:
        start, spans, work = self.clock[rank], self.spans[rank], slot.work
        crossing = self.holdings[rank].compute(slot.op, self._codes.work(work), start, len(spans))
        self._spend(rank, slot, self.costs.of[slot.op][work.stage], (crossing,) if crossing is not None else ())
        return True

    def _overlap(self, rank: int, pair: Overlap) -> bool:
        forward, backward, holdings = pair.forward, pair.backward, self.holdings[rank]
        start, index = self.clock[rank], len(self.spans[rank])
        # The backward first: a pair of one micro-batch with itself finds no forward done.
        gradient = holdings.compute(Op.BACKWARD, self._codes.work(backward), start, index)
        activation = holdings.compute(Op.FORWARD, self._codes.work(forward), start, index)
        inputs = tuple(crossing for crossing in (activation, gradient) if crossing is not None)
        self._spend(rank, pair, self.costs.pair(forward.stage, backward.stage), inputs)
        return True

    def _spend(self, rank: int, slot: Slot, duration: float, inputs: tuple[Crossing, ...]) -> None:
        start = self.clock[rank]
        self.clock[rank] = end = start + duration
        self.spans[rank].append(Span(slot, start, end, self._waited[rank], inputs))
        self._waited[rank] = None

    def _send(self, rank: int, slot: Send) -> bool:
        code = self._codes.message(slot.message)
        channel = self._channel(rank, slot.peer, code)
        if self.transport is Transport.RENDEZVOUS:
            if len(channel.sent) >= len(channel.posted):
                channel.sleeper = rank
                return False
            self._hold(rank, slot, slot.peer, channel.posted[len(channel.sent)], self.clock[rank])
        channel.makers.append(self.holdings[rank].send(code, slot.peer))
        channel.codes.append(code)
        channel.sent.append(self.clock[rank])
        if self.transport is not Transport.STREAM:
            self._cross(channel, self.clock[rank])
        self._wake(channel)
        return True

    def _post(self, rank: int, slot: Receive) -> bool:
        code = self._codes.message(slot.message)
        channel = self._channel(slot.peer, rank, code)
        if code in channel.place:
            raise ProgramError("is posted a second time")
        channel.place[code] = len(channel.posted)
        channel.posted.append(self.clock[rank])
        self._wake(channel)
        return True

    def _wait(self, rank: int, slot: Wait) -> bool:
        code = self._codes.message(slot.message)
        channel = self._channel(slot.peer, rank, code)
        if code not in channel.place:
            raise ProgramError("the receive is not posted, or was waited for before")
        k = channel.place[code]
        if k >= len(channel.sent):
            channel.sleeper = rank
            return False
        if channel.codes[k] != code:
            raise ProgramError(self._mismatch(rank, slot, k, self._codes.message_name(channel.codes[k])))
        del channel.place[code]
        while len(channel.arrived) <= k:
            i = len(channel.arrived)
            self._cross(channel, max(channel.sent[i], channel.posted[i]))
        sent, arrival = channel.sent[k], channel.arrived[k]
        self.holdings[rank].arrive(code, Crossing(slot.message, slot.peer, rank, channel.makers[k], sent, arrival))
        self._hold(rank, slot, slot.peer, arrival, sent)
        return True

    def _free(self, rank: int, slot: Free) -> bool:
        self.holdings[rank].free(self._codes.work(slot.work), self.clock[rank])
        return True

    def _reduce(self, rank: int, slot: Reduce) -> bool:
        """Runs beside the slots that follow, after the reductions before it, and holds only the step."""
        self.holdings[rank].reduce(slot.stage)
        start = max(self.clock[rank], self.reduced[rank])
        self.reduced[rank] = start + self.costs.costs.reduce
        self.spans[rank].append(Span(slot, start, self.reduced[rank]))
        return True

    def _step(self, rank: int, slot: Step) -> bool:
        self.holdings[rank].step()
        return self._meet(rank, slot, self.program.ranks, self.costs.costs.step)

    def _gather(self, rank: int, slot: Gather) -> bool:
        self.holdings[rank].gather(slot.stage)
        return self._meet(rank, slot, len(self._holders[slot.stage]), self.costs.costs.gather)

    def _meet(self, rank: int, slot: Step | Gather, size: int, cost: float) -> bool:
        """The last rank to come takes all of them past the slot."""
        met = self._met[slot]
        met.append(rank)
        if len(met) < size:
            return False
        start, last = max((max(self.clock[r], self.reduced[r]), r) for r in met)
        for r in met:
            self._hold(r, slot, last, start, start)
            self._spend(r, slot, cost, ())
            if r != rank:
                self._next[r] += 1
                self._awake.append(r)
        del self._met[slot]
        return True

    def _channel(self, source: int, target: int, code: int) -> _Channel:
        key = (source, target, code & 1)
        channel = self._channels.get(key)
        if channel is None:
            link = self._links.get(key[:2])
            if link is None or self.transport is Transport.STREAM:
                link = self._links[key[:2]] = _Link(*self.costs.transfer(source, target))
            channel = self._channels[key] = _Channel(link)
        return channel

    def _cross(self, channel: _Channel, ready: float) -> None:
        """Put the channel's next message on its link, as soon as both are ready."""
        link = channel.link
        link.free = max(ready, link.free) + link.occupied
        channel.arrived.append(link.free + link.latency)

    def _hold(self, rank: int, slot: Slot, peer: int, until: float, ready: float) -> None:
        if until > self.clock[rank]:
            self.clock[rank] = until
            self._waited[rank] = Waited(slot, peer, ready)

    def _wake(self, channel: _Channel) -> None:
        if channel.sleeper is not None:
            self._awake.append(channel.sleeper)
            channel.sleeper = None

    def _check_end(self) -> None:
        """All ranks have come to their end, and nothing is left over."""
        stuck = [rank for rank, slots in enumerate(self.program.slots) if self._next[rank] < len(slots)]
        if stuck:
            index = self._next[stuck[0]]
            slot = self.program.slots[stuck[0]][index]
            raise ProgramError(
                f"rank {stuck[0]}, slot {index} ({dump_slot(slot)}): deadlock on {self.transport.value} transport: "
                f"{self._lacks(stuck[0], slot)}; {len(stuck)} of {self.program.ranks} ranks are stuck"
            )
        for rank, holdings in enumerate(self.holdings):
            try:
                holdings.finish()
            except ProgramError as error:
                raise ProgramError(f"rank {rank}, slot {self._next[rank]} (end): {error}") from None
        for (source, target, _), channel in self._channels.items():
            for code in channel.place:
                name = self._codes.message_name(code)
                raise ProgramError(f"rank {target}, slot {self._next[target]} (end): wait:{name}<{source} is missing")
            if len(channel.sent) > len(channel.posted):
                name = self._codes.message_name(channel.codes[len(channel.posted)])
                raise ProgramError(f"rank {target}, slot {self._next[target]} (end): recv:{name}<{source} is missing")

    def _mismatch(self, rank: int, slot: Wait, k: int, name: str) -> str:
        """Why a wait finds another message in its place: the channel is in another order, or lacks this one."""
        order = f"message {k} that rank {slot.peer} sends on this channel is {name}"
        if Send(slot.message, rank) in self.program.slots[slot.peer]:
            return order
        return f"deadlock on {self.transport.value} transport: rank {slot.peer} has not sent it; {order}"

    def _lacks(self, rank: int, slot: Slot) -> str:
        match slot:
            case Send(_, peer):
                return f"rank {peer} has not posted the receive"
            case Wait(_, peer):
                return f"rank {peer} has not sent it"
            case Step() | Gather():
                holders = range(self.program.ranks) if isinstance(slot, Step) else sorted(self._holders[slot.stage])
                missing = [other for other in holders if other not in self._met[slot]]
                return f"ranks {missing[:4]} have not come to it" if missing else "a rank came that does not belong"
            case _:
                raise AssertionError(slot)
