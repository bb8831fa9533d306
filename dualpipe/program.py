"""A schedule as a value: what every rank does in one step, in order, as plain data.

A *program* gives each rank a list of *slots*. A generator (``schedules/``) writes the computing slots only; ``lower``
adds messages, lifetimes and the end of the step; validator, simulator and runtime read the result. Stages are the
pieces of the model in order, 0 .. S-1. A micro-batch travels along one *route*, the ranks that run its stages: DualPipe
has two routes, one entering at rank 0 and one at rank P-1; the other schedules have one. A rank that runs several
stages is named several times by a route.

The text form is one line for the program and one for each rank, and is strict: ``parse(dump(p)) == p``, and anything
else is refused with its line number.

    program dualpipe stages=2 microbatches=4 routes=0,1/1,0
    0: F0.0 F1.2 F0.1&B1.2 ...

    F0.3  forward of stage 0, micro-batch 3          send:A1.3>1   send the activation that enters stage 1
    B0.3  backward, inputs and weights               recv:G0.3<1   post the receive of the gradient of stage 0's output
    I0.3  backward for the inputs only               wait:G0.3<1   wait for it to arrive
    W0.3  the weight gradients that I0.3 deferred    free:0.3      the micro-batch's activations in stage 0 are dead
    F0.5&B1.2  a pair whose halves overlap           reduce:0  step  gather:0   the end of the step
"""

import re
from dataclasses import dataclass
from enum import Enum

from dualpipe.collector import paused_collector


class Op(Enum):
    """What a computing slot does with one micro-batch in one stage."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"

    __hash__ = object.__hash__  # Enum's own hashes the name, in Python: a large program asks for it millions of times


class Kind(Enum):
    """What a message carries: an activation into a stage, or the gradient of a stage's output."""

    ACTIVATION = "A"
    GRADIENT = "G"

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, order=True)
class Work:
    """One micro-batch in one stage: the key under which a stage keeps its activations."""

    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Compute:
    op: Op
    work: Work


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a full backward of different micro-batches, run as one pair so that each hides the other's
    communication."""

    forward: Work
    backward: Work


@dataclass(frozen=True, slots=True)
class Message:
    """A tensor on its way between two ranks. ``work`` is the *receiver's*: the stage that the tensor is an input of."""

    kind: Kind
    work: Work


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending; the rank goes on at once."""

    message: Message
    peer: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Post the receive: its buffer exists from here on."""

    message: Message
    peer: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until the posted message has arrived."""

    message: Message
    peer: int


@dataclass(frozen=True, slots=True)
class Free:
    """The activations that the stage kept for this work are dead."""

    work: Work


@dataclass(frozen=True, slots=True)
class Reduce:
    """Start summing a stage's gradients over its replica group."""

    stage: int


@dataclass(frozen=True, slots=True)
class Step:
    """Clip by the global norm and update the owned shards, once every reduction has arrived."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Gather a stage's updated parameters over its replica group."""

    stage: int


Slot = Compute | Overlap | Send | Receive | Wait | Free | Reduce | Step | Gather


@dataclass(frozen=True)
class Program:
    """Every rank's slots. ``routes[d][s]`` is the rank that runs stage s for direction d; ``slots[r]`` is rank r's."""

    schedule: str
    microbatches: int
    routes: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[Slot, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.slots)

    @property
    def stages(self) -> int:
        return len(self.routes[0])

    def direction(self, microbatch: int) -> int:
        """The route of a micro-batch: the routes share them out evenly, direction 0 taking the first part."""
        return microbatch * len(self.routes) // self.microbatches

    def rank_of(self, work: Work) -> int:
        """The rank that runs this work."""
        return self.routes[self.direction(work.microbatch)][work.stage]

    def has(self, work: Work) -> bool:
        """Whether there is such a stage and such a micro-batch."""
        return 0 <= work.stage < self.stages and 0 <= work.microbatch < self.microbatches

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, in the order of the routes that bring them there."""
        return tuple(dict.fromkeys(s for route in self.routes for s, r in enumerate(route) if r == rank))


class ProgramError(ValueError):
    """A program, or its text, breaks a rule; the message names the rank and slot, or the line."""


def computed(slot: Slot) -> tuple[Compute, ...]:
    """What a slot computes, one operation at a time: a pair's forward comes before its backward."""
    match slot:
        case Compute():
            return (slot,)
        case Overlap(forward, backward):
            return (Compute(Op.FORWARD, forward), Compute(Op.BACKWARD, backward))
        case _:
            return ()


def dump_message(message: Message) -> str:
    return f"{message.kind.value}{message.work.stage}.{message.work.microbatch}"


def dump_slot(slot: Slot) -> str:
    match slot:
        case Compute(op, w):
            return f"{op.value}{w.stage}.{w.microbatch}"
        case Overlap(f, b):
            return f"F{f.stage}.{f.microbatch}&B{b.stage}.{b.microbatch}"
        case Send(m, peer):
            return f"send:{dump_message(m)}>{peer}"
        case Receive(m, peer):
            return f"recv:{dump_message(m)}<{peer}"
        case Wait(m, peer):
            return f"wait:{dump_message(m)}<{peer}"
        case Free(w):
            return f"free:{w.stage}.{w.microbatch}"
        case Reduce(stage):
            return f"reduce:{stage}"
        case Step():
            return "step"
        case Gather(stage):
            return f"gather:{stage}"
        case _:
            raise AssertionError(slot)


def dump(program: Program) -> str:
    """The text form; ``parse`` reads it back."""
    routes = "/".join(",".join(map(str, route)) for route in program.routes)
    head = f"program {program.schedule} stages={program.stages} microbatches={program.microbatches} routes={routes}"
    lines = [f"{rank}: {' '.join(map(dump_slot, slots))}".rstrip() for rank, slots in enumerate(program.slots)]
    return "\n".join([head, *lines]) + "\n"


# A number has one spelling, or the text of a program would not be one text.
_N = "(0|[1-9][0-9]{0,8})"
_HEAD = re.compile(rf"program ([a-z0-9][a-z0-9_-]*) stages={_N} microbatches={_N} routes=({_N}(?:[,/]{_N})*)")
_PAIR = re.compile(rf"F{_N}\.{_N}&B{_N}\.{_N}")
_COMPUTE = re.compile(rf"([FBIW]){_N}\.{_N}")
_MESSAGE = re.compile(rf"(?:(send):([AG]){_N}\.{_N}>|(recv|wait):([AG]){_N}\.{_N}<){_N}")
_FREE = re.compile(rf"free:{_N}\.{_N}")
_COLLECTIVE = re.compile(rf"(reduce|gather):{_N}")
_VERBS: dict[str, type[Send] | type[Receive] | type[Wait]] = {"send": Send, "recv": Receive, "wait": Wait}


def parse_slot(text: str) -> Slot:
    """One slot from its text. Raises ProgramError when the text is not exactly one."""
    if found := _PAIR.fullmatch(text):
        fs, fm, bs, bm = map(int, found.groups())
        return Overlap(Work(fs, fm), Work(bs, bm))
    if found := _COMPUTE.fullmatch(text):
        return Compute(Op(found[1]), Work(int(found[2]), int(found[3])))
    if found := _MESSAGE.fullmatch(text):
        verb, kind, stage, microbatch = (g for g in found.groups()[:8] if g is not None)
        message = Message(Kind(kind), Work(int(stage), int(microbatch)))
        return _VERBS[verb](message, int(found[9]))
    if found := _FREE.fullmatch(text):
        return Free(Work(int(found[1]), int(found[2])))
    if found := _COLLECTIVE.fullmatch(text):
        return Reduce(int(found[2])) if found[1] == "reduce" else Gather(int(found[2]))
    if text == "step":
        return Step()
    raise ProgramError(f"{text!r} is not a slot (F0.3, F0.5&B1.2, send:A1.3>1, wait:G0.3<1, free:0.3, reduce:0, step)")


@paused_collector()
def parse(text: str) -> Program:
    """A program from its text form. Raises ProgramError with the line number and what was expected there."""
    lines = text.splitlines()
    head = _HEAD.fullmatch(lines[0]) if lines else None
    if head is None:
        raise ProgramError("line 1: expected 'program NAME stages=S microbatches=M routes=0,1/1,0'")
    routes = tuple(tuple(map(int, route.split(","))) for route in head[4].split("/"))
    if any(len(route) != int(head[2]) for route in routes):
        raise ProgramError(f"line 1: every route names one rank for each of the stages={head[2]}")
    slots: list[tuple[Slot, ...]] = []
    for number, line in enumerate(lines[1:], start=2):
        rank, colon, rest = line.partition(":")
        if not colon or rank != str(len(slots)):
            raise ProgramError(f"line {number}: expected '{len(slots)}: ...', the slots of rank {len(slots)}")
        if rest and (not rest.startswith(" ") or rest != " " + " ".join(rest.split())):
            raise ProgramError(f"line {number}: expected slots separated by one space, nothing after the last")
        try:
            slots.append(tuple(parse_slot(word) for word in rest.split()))
        except ProgramError as error:
            raise ProgramError(f"line {number}: {error}") from None
    if len(slots) <= max(rank for route in routes for rank in route):
        raise ProgramError(f"line {len(lines) + 1}: expected '{len(slots)}: ...', the slots of rank {len(slots)}")
    return Program(head[1], int(head[3]), routes, tuple(slots))
