"""One rank's slots in order, and what must be true before each of them. ``validate`` walks every rank.

``OrderWalk`` walks compute order, whose messages are still to be derived; ``LoweredWalk`` walks what ``lower`` returns.
Both raise ProgramError, naming the rank, the slot and the rule.
"""

from collections import defaultdict
from typing import NoReturn

from dualpipe.dataflow import made, maker, needed
from dualpipe.program import (
    Compute,
    Free,
    Gather,
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
    dump_message,
    dump_slot,
)


class OrderWalk:
    """``expected``: the rank's works; ``trains``: the program has backwards. What other ranks make counts as there."""

    def __init__(self, program: Program, rank: int, expected: list[Work], trains: bool):
        self.program = program
        self.rank = rank
        self.expected = expected
        self.trains = trains
        self.index = -1
        self.slot: Slot | None = None
        self.done: dict[Op, set[Work]] = {op: set() for op in Op}
        self.made: set[Message] = set()
        self.left = defaultdict[int, int](int)  # stage -> backwards to be completed
        for work in expected:
            self.left[work.stage] += 1

    def visit(self, index: int, slot: Slot) -> None:
        self.index, self.slot = index, slot
        match slot:
            case Compute():
                self._check_compute(slot)
                self._compute(slot)
            case Overlap():
                self._overlap(slot)
            case _:
                self._other(slot)

    def finish(self) -> None:
        """What must be true at the end of the rank's slots."""
        self.index, self.slot = self.index + 1, None
        for work in self.expected:
            if work not in self.done[Op.FORWARD]:
                self._fail(f"F{_name(work)} is missing")
            if self.trains and not self._complete(work):
                part = "W" if work in self.done[Op.BACKWARD_INPUT] else "B"
                self._fail(f"{part}{_name(work)} is missing")

    def _other(self, slot: Slot) -> None:
        self._fail("is not compute order: messages, frees and the end of the step are not written yet")

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
        if (message := needed(self.program, operation)) is not None:
            self._check_input(message)

    def _check_input(self, message: Message) -> None:
        if message not in self.made and self.program.rank_of(maker(message)) == self.rank:
            self._fail(f"its input {dump_message(message)} is not made")

    def _compute(self, operation: Compute) -> None:
        self.done[operation.op].add(operation.work)
        if operation.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            self.left[operation.work.stage] -= 1
        if (message := made(self.program, operation)) is not None:
            self.made.add(message)

    def _complete(self, work: Work) -> bool:
        return work in self.done[Op.BACKWARD] or work in self.done[Op.BACKWARD_WEIGHT]

    def _check_place(self, work: Work) -> None:
        self._check_exists(work)
        if (rank := self.program.rank_of(work)) != self.rank:
            self._fail(f"stage {work.stage} of micro-batch {work.microbatch} is on rank {rank}")

    def _check_exists(self, work: Work) -> None:
        if not self.program.has(work):
            self._fail(f"there is no stage {work.stage} of micro-batch {work.microbatch}")

    def _fail(self, why: str) -> NoReturn:
        where = "end" if self.slot is None else dump_slot(self.slot)
        raise ProgramError(f"rank {self.rank}, slot {self.index} ({where}): {why}")


class LoweredWalk(OrderWalk):
    """``steps``: the program has an end of the step. What other ranks make is there once it was waited for."""

    def __init__(self, program: Program, rank: int, expected: list[Work], trains: bool, steps: bool):
        super().__init__(program, rank, expected, trains)
        self.steps = steps
        self.freed: set[Work] = set()
        self.sent: set[Message] = set()
        self.posted: set[Message] = set()
        self.arrived: set[Message] = set()
        self.reduced: set[int] = set()
        self.stepped = False
        self.gathered: set[int] = set()

    def visit(self, index: int, slot: Slot) -> None:
        self.index, self.slot = index, slot
        if self.stepped and not isinstance(slot, Gather):
            self._fail("comes after the step; only gathers do")
        super().visit(index, slot)

    def finish(self) -> None:
        super().finish()
        for work in self.expected:
            if work not in self.freed:
                self._fail(f"free:{_name(work)} is missing")
        for message in sorted(self.made - self.sent, key=dump_message):
            if (peer := self.program.rank_of(message.work)) != self.rank:
                self._fail(f"send:{dump_message(message)}>{peer} is missing")
        for message in sorted(self.posted - self.arrived, key=dump_message):
            self._fail(f"wait:{dump_message(message)}<{self.program.rank_of(maker(message))} is missing")
        if self.steps and not self.stepped:
            self._fail("step is missing")
        if self.steps and (missing := set(self.left) - self.gathered):
            self._fail(f"gather:{min(missing)} is missing")

    def _other(self, slot: Slot) -> None:
        match slot:
            case Send(message, peer):
                self._send(message, peer)
            case Receive(message, peer):
                self._receive(message, peer)
            case Wait(message, peer):
                self._wait(message, peer)
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

    def _check_input(self, message: Message) -> None:
        super()._check_input(message)
        if message not in self.made and message not in self.arrived:
            self._fail(f"its input {dump_message(message)} has not been waited for")

    def _send(self, message: Message, peer: int) -> None:
        self._check_message(message)
        if message not in self.made:
            self._fail(f"{dump_message(message)} is not made yet")
        if message in self.sent:
            self._fail(f"{dump_message(message)} is sent a second time")
        if maker(message) in self.freed:
            self._fail(f"sends {dump_message(message)} after {_name(maker(message))}, which made it, was freed")
        if peer == self.rank or peer != self.program.rank_of(message.work):
            self._fail(f"{dump_message(message)} is needed on rank {self.program.rank_of(message.work)}")
        self.sent.add(message)

    def _receive(self, message: Message, peer: int) -> None:
        self._check_message(message)
        self._check_place(message.work)
        source = self.program.rank_of(maker(message))
        if peer == self.rank or peer != source:
            self._fail(f"{dump_message(message)} is made on rank {source}")
        if message in self.posted:
            self._fail(f"the receive of {dump_message(message)} is posted a second time")
        self.posted.add(message)

    def _wait(self, message: Message, peer: int) -> None:
        if message not in self.posted:
            self._fail(f"the receive of {dump_message(message)} is not posted")
        if message in self.arrived:
            self._fail(f"{dump_message(message)} is waited for a second time")
        if peer != self.program.rank_of(maker(message)):
            self._fail(f"the receive of {dump_message(message)} is posted from another rank")
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

    def _check_message(self, message: Message) -> None:
        """Both ends of the message must exist."""
        self._check_exists(message.work)
        self._check_exists(maker(message))

    def _check_held(self, stage: int) -> None:
        if stage not in self.left:
            self._fail(f"the rank does not hold stage {stage}")


def _name(work: Work) -> str:
    return f"{work.stage}.{work.microbatch}"
