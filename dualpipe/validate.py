"""Proves of a lowered program that it is complete, that its data flows, and that it comes to its end.

Each rank is walked once, then the two ends of every channel are compared, then the collectives, and last the program
is played on each kind of transport.
"""

from collections import defaultdict
from itertools import combinations, zip_longest
from typing import NoReturn

from dualpipe.cost import Costs
from dualpipe.dataflow import made, maker, needed
from dualpipe.program import (
    Compute,
    Free,
    Gather,
    Kind,
    Message,
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
    Work,
    computed,
    dump_slot,
)
from dualpipe.progress import Progress, Transport

__all__ = ["Transport", "validate"]


def validate(program: Program) -> None:
    """Raises ProgramError, naming rank, slot and what is wrong, unless the program

    - runs every micro-batch forward once in each stage, on the stage's rank, and backward once (B, or I and then W),
      or is a forward pass without any backward;
    - uses a tensor only once it was made on the same rank or waited for, waits only for what was posted, sends only
      what was made, once, and to the rank that needs it, and leaves no message unsent or unused;
    - has in every channel (from, to, kind) its k-th send meet its k-th receive;
    - frees every work once, after its last use;
    - either has no end, or reduces each stage after its last backward, steps once and gathers each stage, in an order
      that ranks with two stages in common agree on;
    - comes to its end on every ``Transport``.
    """
    _check_shape(program)
    ends: dict[type, dict[tuple[int, int, Kind], list[tuple[int, Slot]]]] = {
        Send: defaultdict(list),
        Receive: defaultdict(list),
    }
    expected: list[list[Work]] = [[] for _ in range(program.ranks)]
    for microbatch in range(program.microbatches):
        for stage in range(program.stages):
            work = Work(stage, microbatch)
            expected[program.rank_of(work)].append(work)
    trains = any(c.op is not Op.FORWARD for slots in program.slots for slot in slots for c in computed(slot))
    steps = any(isinstance(slot, Reduce | Step | Gather) for slots in program.slots for slot in slots)
    for rank, slots in enumerate(program.slots):
        walk = _Walk(program, rank, expected[rank], trains)
        for index, slot in enumerate(slots):
            walk.visit(index, slot)
            match slot:
                case Send(message, peer):
                    ends[Send][rank, peer, message.kind].append((index, slot))
                case Receive(message, peer):
                    ends[Receive][peer, rank, message.kind].append((index, slot))
        walk.finish(steps)
    for channel in ends[Send] | ends[Receive]:
        _check_channel(channel, ends[Send][channel], ends[Receive][channel])
    _check_collectives(program)
    for transport in Transport:
        Progress(program, transport, Costs(0, 0, 0)).play()


def _check_shape(program: Program) -> None:
    if not program.routes or program.microbatches < 1:
        raise ProgramError("a program needs a route and a micro-batch")
    if any(len(route) != program.stages for route in program.routes):
        raise ProgramError("every route names one rank for each stage")
    if any(not 0 <= rank < program.ranks for route in program.routes for rank in route):
        raise ProgramError(f"a route names a rank outside of 0..{program.ranks - 1}")


class _Walk:
    """One rank's slots in order, and what is true on the rank before each of them."""

    def __init__(self, program: Program, rank: int, expected: list[Work], trains: bool):
        self.program = program
        self.rank = rank
        self.expected = expected
        self.trains = trains
        self.index = -1
        self.slot: Slot | None = None
        self.done: dict[Op, set[Work]] = {op: set() for op in Op}
        self.freed: set[Work] = set()
        self.made: set[Message] = set()
        self.sent: set[Message] = set()
        self.posted: set[Message] = set()
        self.arrived: set[Message] = set()
        self.left = defaultdict[int, int](int)  # stage -> backwards to be completed
        for work in expected:
            self.left[work.stage] += 1
        self.reduced: set[int] = set()
        self.stepped = False
        self.gathered: set[int] = set()

    def visit(self, index: int, slot: Slot) -> None:
        self.index, self.slot = index, slot
        if self.stepped and not isinstance(slot, Gather):
            self._fail("comes after the step; only gathers do")
        match slot:
            case Compute():
                self._check_compute(slot)
                self._compute(slot)
            case Overlap():
                self._overlap(slot)
            case Send(message, peer):
                self._send(message, peer)
            case Receive(message, peer):
                self._receive(message, peer)
            case Wait(message, _):
                self._wait(message)
            case Free(work):
                self._free(work)
            case Reduce(stage):
                self._reduce(stage)
            case Step():
                self._step()
            case Gather(stage):
                self._gather(stage)
            case _:
                raise AssertionError(slot)

    def _overlap(self, pair: Overlap) -> None:
        if pair.forward.microbatch == pair.backward.microbatch:
            self._fail("a pair needs two different micro-batches")
        # Neither half may need the other: both are checked before either is done.
        for operation in computed(pair):
            self._check_compute(operation)
        for operation in computed(pair):
            self._compute(operation)

    def _check_compute(self, operation: Compute) -> None:
        work, done = operation.work, self.done
        self._check_place(work)
        # A use after the free needs no check of its own: a free comes after the last operation, and none runs twice.
        if work in done[operation.op]:
            self._fail(f"{operation.op.value}{_name(work)} is done a second time")
        match operation.op:
            case Op.FORWARD:
                pass
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                if work not in done[Op.FORWARD]:
                    self._fail(f"comes before its forward F{_name(work)}")
                if work in done[Op.BACKWARD] or work in done[Op.BACKWARD_INPUT]:
                    self._fail(f"a second backward of {_name(work)}")
            case Op.BACKWARD_WEIGHT:
                if work not in done[Op.BACKWARD_INPUT]:
                    self._fail(f"comes before I{_name(work)}, which defers it")
            case _:
                raise AssertionError(operation)
        message = needed(self.program, operation)
        if message is not None and message not in self.made and message not in self.arrived:
            local = self.program.rank_of(maker(message)) == self.rank
            self._fail(f"its input {_text(message)} {'is not made' if local else 'has not been waited for'}")

    def _compute(self, operation: Compute) -> None:
        self.done[operation.op].add(operation.work)
        if operation.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            self.left[operation.work.stage] -= 1
        if (message := made(self.program, operation)) is not None:
            self.made.add(message)

    def _send(self, message: Message, peer: int) -> None:
        self._check_message(message)
        if message not in self.made:
            self._fail(f"{_text(message)} is not made yet")
        if message in self.sent:
            self._fail(f"{_text(message)} is sent a second time")
        if maker(message) in self.freed:
            self._fail(f"sends {_text(message)} after {_name(maker(message))}, which made it, was freed")
        if peer == self.rank or peer != self.program.rank_of(message.work):
            self._fail(f"{_text(message)} is needed on rank {self.program.rank_of(message.work)}")
        self.sent.add(message)

    def _receive(self, message: Message, peer: int) -> None:
        self._check_message(message)
        self._check_place(message.work)
        source = self.program.rank_of(maker(message))
        if peer == self.rank or peer != source:
            self._fail(f"{_text(message)} is made on rank {source}")
        if message in self.posted:
            self._fail(f"the receive of {_text(message)} is posted a second time")
        self.posted.add(message)

    def _wait(self, message: Message) -> None:
        if message not in self.posted:
            self._fail(f"the receive of {_text(message)} is not posted")
        if message in self.arrived:
            self._fail(f"{_text(message)} is waited for a second time")
        assert isinstance(self.slot, Wait)
        if self.slot.peer != self.program.rank_of(maker(message)):
            self._fail(f"the receive of {_text(message)} is posted from another rank")
        self.arrived.add(message)

    def _free(self, work: Work) -> None:
        if work in self.freed:
            self._fail("frees a second time")
        if work not in self.done[Op.FORWARD]:
            self._fail(f"comes before its forward F{_name(work)}")
        if self.trains and not self._complete(work):
            self._fail(f"comes before the backward of {_name(work)} is complete")
        self.freed.add(work)

    def _reduce(self, stage: int) -> None:
        self._check_held(stage)
        if not self.trains:
            self._fail("a forward pass has no gradients")
        if stage in self.reduced:
            self._fail("reduces a second time")
        if self.left[stage]:
            self._fail(f"comes before the last {self.left[stage]} backwards of stage {stage}")
        self.reduced.add(stage)

    def _step(self) -> None:
        if missing := set(self.left) - self.reduced:
            self._fail(f"comes before reduce:{min(missing)}")
        self.stepped = True

    def _gather(self, stage: int) -> None:
        self._check_held(stage)
        if not self.stepped:
            self._fail("comes before the step")
        if stage in self.gathered:
            self._fail("gathers a second time")
        self.gathered.add(stage)

    def finish(self, steps: bool) -> None:
        """What must be true at the end of the rank's slots; ``steps`` when the program has an end of the step."""
        self.index, self.slot = self.index + 1, None
        for work in self.expected:
            if work not in self.done[Op.FORWARD]:
                self._fail(f"F{_name(work)} is missing")
            if self.trains and not self._complete(work):
                part = "W" if work in self.done[Op.BACKWARD_INPUT] else "B"
                self._fail(f"{part}{_name(work)} is missing")
            if work not in self.freed:
                self._fail(f"free:{_name(work)} is missing")
        for message in sorted(self.made - self.sent, key=_text):
            if (peer := self.program.rank_of(message.work)) != self.rank:
                self._fail(f"send:{_text(message)}>{peer} is missing")
        for message in sorted(self.posted - self.arrived, key=_text):
            self._fail(f"wait:{_text(message)}<{self.program.rank_of(maker(message))} is missing")
        if steps and not self.stepped:
            self._fail("step is missing")
        if steps and (missing := set(self.left) - self.gathered):
            self._fail(f"gather:{min(missing)} is missing")

    def _complete(self, work: Work) -> bool:
        return work in self.done[Op.BACKWARD] or work in self.done[Op.BACKWARD_WEIGHT]

    def _check_message(self, message: Message) -> None:
        """Both ends of the message must exist."""
        self._check_exists(message.work)
        self._check_exists(maker(message))

    def _check_place(self, work: Work) -> None:
        self._check_exists(work)
        if (rank := self.program.rank_of(work)) != self.rank:
            self._fail(f"stage {work.stage} of micro-batch {work.microbatch} is on rank {rank}")

    def _check_exists(self, work: Work) -> None:
        if not (0 <= work.stage < self.program.stages and 0 <= work.microbatch < self.program.microbatches):
            self._fail(f"there is no stage {work.stage} of micro-batch {work.microbatch}")

    def _check_held(self, stage: int) -> None:
        if stage not in self.left:
            self._fail(f"the rank does not hold stage {stage}")

    def _fail(self, why: str) -> NoReturn:
        where = "end" if self.slot is None else dump_slot(self.slot)
        raise ProgramError(f"rank {self.rank}, slot {self.index} ({where}): {why}")


def _check_channel(
    channel: tuple[int, int, Kind], sends: list[tuple[int, Slot]], receives: list[tuple[int, Slot]]
) -> None:
    """Sends and receives, with their slots' indices, must name the same messages in the same order."""
    source, target, _ = channel
    for k, (sent, posted) in enumerate(zip_longest(sends, receives)):
        match sent, posted:
            case (index, Send() as send), None:
                raise ProgramError(f"rank {source}, slot {index} ({dump_slot(send)}): rank {target} never receives it")
            case None, (index, Receive() as receive):
                raise ProgramError(f"rank {target}, slot {index} ({dump_slot(receive)}): rank {source} never sends it")
            case (_, Send(message)), (index, Receive(wanted) as receive):
                if message != wanted:
                    raise ProgramError(
                        f"rank {target}, slot {index} ({dump_slot(receive)}): message {k} that rank {source} sends on "
                        f"this channel is {_text(message)}"
                    )
            case _:
                raise AssertionError((sent, posted))


def _check_collectives(program: Program) -> None:
    """Two ranks with stages in common must start the collectives on them in the same order, or they wait crosswise."""
    common: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for stage in range(program.stages):
        holders = sorted({route[stage] for route in program.routes})
        for pair in combinations(holders, 2):
            common[pair].add(stage)
    for verb in (Reduce, Gather):
        orders = [[slot for slot in slots if isinstance(slot, verb)] for slots in program.slots]
        for (one, other), stages in common.items():
            ours, theirs = ([slot for slot in orders[rank] if slot.stage in stages] for rank in (one, other))
            for here, there in zip(ours, theirs, strict=True):
                if here != there:
                    index = program.slots[other].index(there)
                    raise ProgramError(
                        f"rank {other}, slot {index} ({dump_slot(there)}): rank {one} starts {dump_slot(here)} first"
                    )


def _name(work: Work) -> str:
    return f"{work.stage}.{work.microbatch}"


def _text(message: Message) -> str:
    return f"{message.kind.value}{_name(message.work)}"
