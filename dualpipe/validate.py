"""Proves of a program that it is complete, that its data flows, and that it comes to its end.

Each rank is walked once (``walk.py``); then what the ranks do to each other is compared: the two ends of every channel,
the order of the collectives, and last whether all of them come to the end of their slots.
"""

from collections import defaultdict
from itertools import combinations, zip_longest

from dualpipe.collector import paused_collector
from dualpipe.cost import Costs
from dualpipe.dataflow import made, maker, needed
from dualpipe.program import (
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
    Work,
    computed,
    dump_message,
    dump_slot,
)
from dualpipe.progress import Progress, Transport
from dualpipe.walk import LoweredWalk, OrderWalk

__all__ = ["Transport", "validate", "validate_order"]

Channel = tuple[int, int, Kind]
End = list[tuple[int, Slot]]
"""What one end of a channel does, with the indices of the slots."""


@paused_collector()
def validate(program: Program) -> None:
    """Raises ProgramError, naming rank, slot and what is wrong, unless the lowered program

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
    sends: defaultdict[Channel, End] = defaultdict(list)
    receives: defaultdict[Channel, End] = defaultdict(list)
    trains, expected = _trains(program), _works(program)
    steps = any(isinstance(slot, Reduce | Step | Gather) for slots in program.slots for slot in slots)
    for rank, slots in enumerate(program.slots):
        walk = LoweredWalk(program, rank, expected[rank], trains, steps)
        for index, slot in enumerate(slots):
            walk.visit(index, slot)
            match slot:
                case Send(message, peer):
                    sends[rank, peer, message.kind].append((index, slot))
                case Receive(message, peer):
                    receives[peer, rank, message.kind].append((index, slot))
        walk.finish()
    for channel in sends | receives:
        _check_channel(channel, sends[channel], receives[channel])
    _check_collectives(program)
    _check_ends(program)


@paused_collector()
def validate_order(program: Program) -> None:
    """Raises ProgramError, naming rank, slot and what is wrong, unless the compute order, which has no messages yet,
    is complete, has every operation after what it needs on its rank, and lets every rank come to its end when a
    message is there as soon as it is made: ``lower`` can then make a program of it that ``validate`` passes."""
    _check_shape(program)
    trains, expected = _trains(program), _works(program)
    for rank, slots in enumerate(program.slots):
        walk = OrderWalk(program, rank, expected[rank], trains)
        for index, slot in enumerate(slots):
            walk.visit(index, slot)
        walk.finish()
    _check_flow(program)


def _check_shape(program: Program) -> None:
    if program.microbatches < len(program.routes):
        raise ProgramError(f"{program.microbatches} micro-batches on {len(program.routes)} routes: each needs one")
    forwards, slots = program.microbatches * program.stages, sum(map(len, program.slots))
    if forwards > 2 * slots + 1000:  # too many to name the first that is missing
        raise ProgramError(
            f"{program.microbatches} micro-batches need {forwards} forwards, and there are {slots} slots"
        )
    if any(len(route) != program.stages for route in program.routes):
        raise ProgramError("every route names one rank for each stage")
    on_route = {rank for route in program.routes for rank in route}
    if any(not 0 <= rank < program.ranks for rank in on_route):
        raise ProgramError(f"a route names a rank outside of 0..{program.ranks - 1}")
    if idle := sorted(set(range(program.ranks)) - on_route):
        raise ProgramError(f"rank {idle[0]} is on no route: it would hold no stage")


def _trains(program: Program) -> bool:
    return any(c.op is not Op.FORWARD for slots in program.slots for slot in slots for c in computed(slot))


def _works(program: Program) -> list[list[Work]]:
    """What each rank has to run."""
    works: list[list[Work]] = [[] for _ in range(program.ranks)]
    for microbatch in range(program.microbatches):
        for stage, rank in enumerate(program.routes[program.direction(microbatch)]):
            works[rank].append(Work(stage, microbatch))
    return works


def _check_channel(channel: Channel, sends: End, receives: End) -> None:
    """Both ends must name the same messages in the same order."""
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
                        f"this channel is {dump_message(message)}"
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


def _check_ends(program: Program) -> None:
    """Play the program. What ends on rendezvous ends on the other transports too, which let a rank go on earlier:
    there a send holds nobody up, and a wait needs no more than the send. What does not end on rendezvous is reported
    for the transport that asks for the least."""
    free = Costs(0, 0, 0)
    try:
        Progress(program, Transport.RENDEZVOUS, free).play()
    except ProgramError:
        for transport in (Transport.EAGER, Transport.STREAM):
            Progress(program, transport, free).play()
        raise


def _check_flow(program: Program) -> None:
    """Every rank goes through its compute order, and sleeps where a tensor is not made yet: nobody may be left."""
    there: set[Message] = set()
    sleepers: dict[Message, int] = {}  # what a sleeping rank needs
    reached = [0] * program.ranks
    awake = list(range(program.ranks))
    while awake:
        rank = awake.pop()
        slots = program.slots[rank]
        while reached[rank] < len(slots):
            operations = computed(slots[reached[rank]])
            inputs = (needed(program, operation) for operation in operations)
            if missing := next((m for m in inputs if m is not None and m not in there), None):
                sleepers[missing] = rank
                break
            outputs = {message for operation in operations if (message := made(program, operation)) is not None}
            there |= outputs
            awake += [sleepers.pop(message) for message in outputs & sleepers.keys()]
            reached[rank] += 1
    if sleepers:
        message, rank = min(sleepers.items(), key=lambda item: item[1])
        peer = program.rank_of(maker(message))
        raise ProgramError(
            f"rank {rank}, slot {reached[rank]} ({dump_slot(program.slots[rank][reached[rank]])}): deadlock: needs "
            f"{dump_message(message)}, and rank {peer} stands at slot {reached[peer]} "
            f"({dump_slot(program.slots[peer][reached[peer]])}); {len(sleepers)} of {program.ranks} ranks are stuck"
        )
