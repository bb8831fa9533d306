"""What every picture shows: the spans of a simulation in words and colours."""

from typing import NamedTuple

from dualpipe.program import Compute, Gather, Kind, Overlap, Reduce, Send, Step, Wait, Work, dump_message, dump_slot
from dualpipe.progress import Span, Waited
from dualpipe.simulate import Simulation

# Of the Okabe-Ito palette, which stays apart for readers who do not see all colours.
COLOURS = {
    "F": "#56b4e9",
    "B": "#009e73",
    "I": "#66d0a8",
    "W": "#e69f00",
    "FB": "#9a8fd0",
    "step": "#999999",
}
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward for inputs",
    "W": "weight gradients",
    "FB": "overlapped pair",
    "step": "reduce, step, gather",
}


class Box(NamedTuple):
    """A span to be drawn. ``label`` is short (the micro-batches), ``text`` the slot, ``beside`` a span that runs beside
    the rank's other slots."""

    kind: str
    label: str
    text: str
    start: float
    end: float
    beside: bool
    span: Span


def boxes(result: Simulation) -> list[list[Box]]:
    """The boxes of each rank, by start: every computing slot, and the collectives that take time."""
    rows = [[_box(span) for span in spans] for spans in result.spans]
    return [[box for box in row if box.kind != "step" or box.end > box.start] for row in rows]


def _box(span: Span) -> Box:
    slot = span.slot
    match slot:
        case Compute(op, work):
            kind, label = op.value, str(work.microbatch)
        case Overlap(forward, backward):
            kind, label = "FB", f"{forward.microbatch}&{backward.microbatch}"
        case Reduce() | Step() | Gather():
            kind, label = "step", dump_slot(slot)
        case _:
            raise AssertionError(slot)
    return Box(kind, label, dump_slot(slot), span.start, span.end, isinstance(slot, Reduce), span)


def describe(box: Box) -> list[str]:
    """The box in a few lines: the operation, what it works on, when, and what it waited for."""
    match box.span.slot:
        case Compute(_, work):
            lines = [f"{box.text}: {NAMES[box.kind]}", _place(work)]
        case Overlap(forward, backward):
            lines = [f"{box.text}: {NAMES[box.kind]}", f"forward: {_place(forward)}", f"backward: {_place(backward)}"]
        case _:
            lines = [box.text]
    return [*lines, f"start {box.start:g}, end {box.end:g}", _waited(box.span.waited, box.start)]


def _place(work: Work) -> str:
    return f"stage {work.stage}, micro-batch {work.microbatch}"


def _waited(waited: Waited | None, start: float) -> str:
    if waited is None:
        return "waited for nothing: its rank was busy until then" if start else "waited for nothing"
    match waited.slot:
        case Wait(message, peer):
            what = "activation" if message.kind is Kind.ACTIVATION else "gradient"
            times = f"sent at {waited.ready:g}, arrived at {start:g}"
            return f"waited for the {what} {dump_message(message)} from rank {peer}: {times}"
        case Send(_, peer):
            return f"waited for rank {peer} to post a receive ({dump_slot(waited.slot)}), until {start:g}"
        case _:
            return f"waited for rank {waited.peer}, the last to come to it, until {start:g}"
