"""A recorded run in the shape of its simulation: the same spans, at the times at which they happened.

A *recording* holds, for some steps, what every rank executed and when. One execution of the program, by the ranks of
one replica in one step, becomes a ``Simulation``, so that everything that reads a simulation (pictures, traces, tables)
reads a recorded run too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dualpipe.program import Compute, Free, Gather, Message, Op, Overlap, Program, Reduce, Send, Step, Wait, computed
from dualpipe.progress import Span, Waited
from dualpipe.simulate import Causes, Simulation

Run = Sequence[Sequence[Span]]
"""One execution of a program: for each rank the spans of all its slots, messages included, in their order."""

Level = tuple[float, int, float]
"""Memory, as in ``Simulation.memory``: (time, micro-batches alive from then on, their bytes)."""


@dataclass(frozen=True)
class Recording:
    """``steps`` maps the number of a step to the runs of its replicas. Times are in one unit and on one clock."""

    program: Program
    steps: Mapping[int, tuple[Run, ...]]

    def runs(self) -> Iterator[tuple[int, int, Run]]:
        """(step, replica, run) of every execution."""
        for step, replicas in self.steps.items():
            for replica, run in enumerate(replicas):
                yield step, replica, run


@dataclass(frozen=True)
class Transfer:
    """A message as it was seen: its source handed it over at ``sent``; its target waited for it from ``asked`` until
    ``arrived``."""

    wait: Wait
    target: int
    sent: float
    asked: float
    arrived: float

    @property
    def awaited(self) -> bool:
        """Whether the target was waiting already when the message was sent. Otherwise nobody saw when it arrived."""
        return self.asked <= self.sent

    @property
    def duration(self) -> float:
        """How long it took, if it was awaited, and the most that it can have taken otherwise. Clocks of two machines
        may disagree by more than that."""
        return max(self.arrived - self.sent, 0.0)


def transfers(run: Run) -> Iterator[Transfer]:
    """The messages of a run, by target and in the order of its waits."""
    sent = {span.slot.message: span.start for spans in run for span in spans if isinstance(span.slot, Send)}
    for target, spans in enumerate(run):
        for span in spans:
            if isinstance(span.slot, Wait):
                yield Transfer(span.slot, target, sent[span.slot.message], span.start, span.end)


def origin(run: Run) -> float:
    """When the first rank began with its first slot."""
    return min(spans[0].start for spans in run if spans)


def measured(simulated: Simulation, run: Run) -> Simulation:
    """The run, from 0 at its origin to the end of the last slot of any rank. ``simulated``: of the same program.

    A rank's bubble is all the time in which it does not compute. What it spends on messages other than waiting for them
    (sending, posting receives) counts as communication. A step or gather begins when its last rank has come to it.
    """
    zero = origin(run)
    run = [[span._replace(start=span.start - zero, end=span.end - zero) for span in spans] for spans in run]
    run = _met(run)
    sent = {transfer.wait.message: transfer for transfer in transfers(run)}
    makespan = max(spans[-1].end for spans in run if spans)
    tracks = [_track(ours, theirs, sent) for ours, theirs in zip(simulated.spans, run, strict=True)]
    computing = [[span for span in spans if isinstance(span.slot, Compute | Overlap)] for spans in tracks]
    computed_until = max((spans[-1].end for spans in computing if spans), default=0.0)
    busy = tuple(sum(span.end - span.start for span in spans) for spans in computing)
    return replace(
        simulated,
        makespan=makespan,
        busy=busy,
        bubble=tuple(makespan - time for time in busy),
        bubble_by_cause=tuple(_causes(spans, computed_until, makespan) for spans in computing),
        spans=tuple(map(tuple, tracks)),
        memory=tuple(_memory(curve, spans) for curve, spans in zip(simulated.memory, run, strict=True)),
    )


def _met(run: Run) -> Run:
    """The run with the steps and gathers of every rank from the arrival of the last."""
    last: dict[Step | Gather, float] = {}
    for span in (span for spans in run for span in spans):
        if isinstance(span.slot, Step | Gather):
            last[span.slot] = max(last.get(span.slot, span.start), span.start)
    return [
        [
            span._replace(start=min(last[span.slot], span.end)) if isinstance(span.slot, Step | Gather) else span
            for span in spans
        ]
        for spans in run
    ]


def _track(simulated: Sequence[Span], executed: Sequence[Span], sent: Mapping[Message, Transfer]) -> list[Span]:
    """The simulated spans of a rank with the times, waits and arrivals of the executed ones."""
    spans: list[Span] = []
    longest: Transfer | None = None  # waited for since the span before
    for span in executed:
        match span.slot:
            case Wait(message, _):
                transfer = sent[message]
                if longest is None or transfer.arrived - transfer.asked > longest.arrived - longest.asked:
                    longest = transfer
            case Compute() | Overlap() | Reduce() | Step() | Gather():
                inputs = tuple(
                    crossing._replace(sent=sent[crossing.message].sent, arrival=sent[crossing.message].arrived)
                    for crossing in simulated[len(spans)].inputs
                )
                spans.append(Span(span.slot, span.start, span.end, _waited(longest), inputs))
                longest = None
            case _:
                pass
    assert [span.slot for span in spans] == [span.slot for span in simulated]
    return spans


def _waited(transfer: Transfer | None) -> Waited | None:
    if transfer is None:
        return None
    return Waited(transfer.wait, transfer.wait.peer, min(max(transfer.sent, transfer.asked), transfer.arrived))


def _causes(spans: Sequence[Span], computed_until: float, makespan: float) -> Causes:
    """The idle time around and between the computing spans of a rank."""
    if not spans:
        return Causes(computed_until, 0.0, 0.0, 0.0, makespan - computed_until)
    dependency = communication = 0.0
    for before, span in pairwise(spans):
        ready = before.end if span.waited is None else min(max(span.waited.ready, before.end), span.start)
        dependency += ready - before.end
        communication += span.start - ready
    return Causes(spans[0].start, dependency, communication, computed_until - spans[-1].end, makespan - computed_until)


def _memory(
    curve: Sequence[tuple[float, int, float]], executed: Sequence[Span]
) -> tuple[tuple[float, int, float], ...]:
    """The simulated memory over time at the times of the run: it changes with every forward and every free."""
    changes = [
        span.start
        for span in executed
        if isinstance(span.slot, Free) or any(part.op is Op.FORWARD for part in computed(span.slot))
    ]
    return tuple((time, alive, size) for time, (_, alive, size) in zip(changes, curve, strict=True))
