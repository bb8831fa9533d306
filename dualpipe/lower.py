"""Compute order -> the whole step: messages, lifetimes of activations, and the end of the step, for any schedule.

A send stands right after the slot that made the tensor, a wait right before the slot that needs it. Receives are
posted ahead: on each channel (from, to, kind) the first ``window`` at the start of the program, the next one after
each wait, so that a message finds its buffer waiting and no channel holds more than ``window`` of them.
"""

from collections import defaultdict
from itertools import accumulate

from dualpipe.collector import paused_collector
from dualpipe.dataflow import made, maker, needed
from dualpipe.program import (
    Free,
    Gather,
    Kind,
    Message,
    Op,
    Program,
    ProgramError,
    Receive,
    Reduce,
    Send,
    Slot,
    Step,
    Wait,
    computed,
    dump_message,
    dump_slot,
)

Channel = tuple[int, int, Kind]


class _Inbox:
    """The receiving end of one channel: which messages are posted and which have been waited for."""

    def __init__(self, peer: int, queue: list[Message], window: int):
        self.peer = peer
        self.queue = queue  # in the order in which the peer sends
        self.place = {message: k for k, message in enumerate(queue)}
        self.window = window
        self.posted = 0
        self.waited = 0

    def refill(self) -> list[Slot]:
        return self._post(self.waited + self.window)

    def wait(self, message: Message) -> list[Slot]:
        """The wait, and the receives around it. A message that the peer sends later than this rank wants others of
        the channel may lie beyond the window: the window then gives way, because a wait must find its receive posted.
        """
        before = self._post(self.place[message] + 1)
        self.waited += 1
        return [*before, Wait(message, self.peer), *self.refill()]

    def _post(self, until: int) -> list[Slot]:
        until = min(until, len(self.queue))
        posts: list[Slot] = [Receive(message, self.peer) for message in self.queue[self.posted : until]]
        self.posted = max(self.posted, until)
        return posts


@paused_collector()
def lower(program: Program, window: int = 2, training: bool = True) -> Program:
    """The program with sends, receives, waits and frees and, when ``training``, the reduce, step and gather at its end.

    ``window`` is the number of receive buffers of a channel. A program without a backward is a forward pass: its
    activations die with their forward, and it ends without a step. Raises ProgramError when ``program`` does not hold
    computing slots of their own rank only, or when an input is never made or an output never used.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: a message needs a buffer to arrive in")
    sends, waits = _channels(program)
    for channel in sends | waits:
        _check_channel(channel, sends.get(channel, []), waits.get(channel, []))
    forward_only = all(c.op is Op.FORWARD for slots in program.slots for slot in slots for c in computed(slot))
    reduces = [[]] * program.ranks if forward_only or not training else _reduces(program)
    slots = []
    for rank in range(program.ranks):
        inboxes = {(peer, kind): _Inbox(peer, sends[peer, to, kind], window) for peer, to, kind in waits if to == rank}
        slots.append(tuple(_lower_rank(program, rank, inboxes, forward_only, reduces[rank])))
    return Program(program.schedule, program.microbatches, program.routes, tuple(slots))


def _lower_rank(
    program: Program,
    rank: int,
    inboxes: dict[tuple[int, Kind], _Inbox],
    forward_only: bool,
    reduces: list[tuple[int, int]],
) -> list[Slot]:
    out: list[Slot] = [receive for inbox in inboxes.values() for receive in inbox.refill()]
    starting: defaultdict[int, list[Slot]] = defaultdict(list)
    for index, stage in reduces:
        starting[index].append(Reduce(stage))
    for index, slot in enumerate(program.slots[rank]):
        operations = computed(slot)
        for operation in operations:
            if (message := needed(program, operation)) is not None:
                peer = program.rank_of(maker(message))
                out += inboxes[peer, message.kind].wait(message) if peer != rank else []
        out.append(slot)
        for operation in operations:
            if (message := made(program, operation)) is not None:
                peer = program.rank_of(message.work)
                out += [Send(message, peer)] if peer != rank else []
        out += [Free(operation.work) for operation in operations if _ends_life(operation.op, forward_only)]
        out += starting.get(index, [])
    return [*out, Step(), *(Gather(stage) for _, stage in reduces)] if reduces else out


def _ends_life(op: Op, forward_only: bool) -> bool:
    match op:
        case Op.FORWARD:
            return forward_only
        case Op.BACKWARD | Op.BACKWARD_WEIGHT:
            return True
        case Op.BACKWARD_INPUT:
            return False
        case _:
            raise AssertionError(op)


def _reduces(program: Program) -> list[list[tuple[int, int]]]:
    """For each rank, the slots after which it reduces its stages: (index, stage), in one order that all ranks agree on.

    The order is that in which the stages' gradients are complete on the last of their ranks. A rank that has a stage's
    earlier than those before it in the order holds it back: ranks that share two stages would wait crosswise.
    """
    complete: list[dict[int, int]] = [
        {
            operation.work.stage: index
            for index, slot in enumerate(slots)
            for operation in computed(slot)
            if operation.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
        }
        for slots in program.slots
    ]
    everywhere = {s: max(own.get(s, 0) for own in complete) for s in range(program.stages)}
    reduces = []
    for own in complete:
        order = sorted(own, key=lambda stage: (everywhere[stage], stage))
        reduces.append(list(zip(accumulate((own[stage] for stage in order), max), order, strict=True)))
    return reduces


def _channels(program: Program) -> tuple[dict[Channel, list[Message]], dict[Channel, list[Message]]]:
    """The messages of every channel, in the order of the sender's slots and in the order of the receiver's."""
    sends: dict[Channel, list[Message]] = {}
    waits: dict[Channel, list[Message]] = {}
    for rank, slots in enumerate(program.slots):
        for index, slot in enumerate(slots):
            operations = computed(slot)
            if not operations:
                raise ProgramError(f"rank {rank}, slot {index} ({dump_slot(slot)}): not compute order, lowered already")
            for operation in operations:
                if not program.has(operation.work) or program.rank_of(operation.work) != rank:
                    where = f"stage {operation.work.stage} of micro-batch {operation.work.microbatch}"
                    raise ProgramError(f"rank {rank}, slot {index} ({dump_slot(slot)}): {where} is not on this rank")
                wanted, output = needed(program, operation), made(program, operation)
                if wanted is not None and (peer := program.rank_of(maker(wanted))) != rank:
                    waits.setdefault((peer, rank, wanted.kind), []).append(wanted)
                if output is not None and (peer := program.rank_of(output.work)) != rank:
                    sends.setdefault((rank, peer, output.kind), []).append(output)
    return sends, waits


def _check_channel(channel: Channel, sends: list[Message], waits: list[Message]) -> None:
    source, target, _ = channel
    if len(set(sends)) < len(sends) or len(set(waits)) < len(waits):
        raise ProgramError(f"rank {source} to rank {target}: an operation that sends or needs a message is there twice")
    if missing := sorted(set(waits) - set(sends), key=lambda message: message.work):
        raise ProgramError(f"rank {target} needs {dump_message(missing[0])}, which rank {source} never makes")
    if unused := sorted(set(sends) - set(waits), key=lambda message: message.work):
        raise ProgramError(f"rank {source} makes {dump_message(unused[0])}, which rank {target} never uses")
