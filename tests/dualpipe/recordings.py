"""Recordings made up from simulations: what the ranks of a run would have recorded, had it gone as simulated."""

from dualpipe.program import Compute, Gather, Overlap, Program, Reduce, Step, Wait
from dualpipe.progress import Span
from dualpipe.simulate import Simulation


def as_run(program: Program, result: Simulation) -> list[list[Span]]:
    """The spans of every slot. Sends, posts and frees take no time; a wait lasts until its message arrives, and a step
    or gather begins when its rank comes to it."""
    arrivals = {c.message: c.arrival for spans in result.spans for span in spans for c in span.inputs}
    run = []
    for slots, spans in zip(program.slots, result.spans, strict=True):
        clock, played, left = 0.0, [], iter(spans)
        for slot in slots:
            start = clock
            match slot:
                case Compute() | Overlap():
                    span = next(left)
                    start, clock = span.start, span.end
                case Step() | Gather():
                    clock = next(left).end
                case Reduce():
                    next(left)
                case Wait(message, _):
                    clock = max(clock, arrivals[message])
                case _:
                    pass
            played.append(Span(slot, start, clock))
        run.append(played)
    return run
