"""A lowered program and its costs -> when everything happens, idle time and its causes, peak memory."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from dualpipe.collector import paused_collector
from dualpipe.cost import Costs
from dualpipe.program import Compute, Overlap, Program, Slot
from dualpipe.progress import Progress, Span, Transport

OPERATIONS = ("F", "B", "I", "W", "FB")


@dataclass(frozen=True)
class Causes:
    """Where the bubble of a rank comes from; the five add up to it. Times are in the unit of the costs.

    ``dependency`` and ``communication`` split the gaps between two computing slots by the message that held the rank
    longest: until its sender handed it over, the sender's work was missing; from then on only the transfer.
    """

    warmup: float  # before the rank's first computing slot
    dependency: float  # waiting for an operation on another rank
    communication: float  # waiting for a message on its way, or for a rendezvous
    drain: float  # after the rank's last computing slot, until the last one of any rank
    step_end: float  # what reductions, step and gathers add after all computing


@dataclass(frozen=True)
class Simulation:
    """What a program takes. Times are in the unit of the costs; every tuple has one entry for each rank."""

    schedule: str
    ranks: int
    stages: int
    microbatches: int
    makespan: float
    busy: tuple[float, ...]  # time in computing slots
    bubble: tuple[float, ...]  # makespan - busy
    bubble_by_cause: tuple[Causes, ...]
    peak_activations: tuple[int, ...]  # micro-batches, each in one stage
    peak_bytes: tuple[float, ...] | None  # None without the bytes of an activation
    operations: tuple[dict[str, int], ...]  # counts of F, B, I, W and FB; a pair counts as FB only
    spans: tuple[tuple[Span, ...], ...]  # computing slots and collectives, by start
    memory: tuple[tuple[tuple[float, int, float], ...], ...]  # (time, micro-batches alive from then on, their bytes)

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time that is idle."""
        return sum(self.bubble) / (self.ranks * self.makespan) if self.makespan else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object that ``simulate --json`` prints: everything but the spans and the memory over time."""
        answer = {
            "schedule": self.schedule,
            "ranks": self.ranks,
            "stages": self.stages,
            "microbatches": self.microbatches,
            "makespan": self.makespan,
            "busy": list(self.busy),
            "bubble": list(self.bubble),
            "bubble_fraction": self.bubble_fraction,
            "bubble_by_cause": [asdict(causes) for causes in self.bubble_by_cause],
            "peak_activations": list(self.peak_activations),
            "operations": list(self.operations),
        }
        return answer if self.peak_bytes is None else {**answer, "peak_bytes": list(self.peak_bytes)}


@paused_collector()
def simulate(program: Program, costs: Costs, transport: Transport = Transport.EAGER) -> Simulation:
    """Play a lowered program.

    A message occupies its link for ``costs.link``, after the messages before it, and arrives ``costs.message`` later; a
    send takes none of its rank's time, and a reduction runs beside the slots that follow it. ``transport`` says what
    else a message needs. A micro-batch is alive in a stage from the start of its forward to its free, both halves of a
    pair while it runs.

    Raises ProgramError, with rank and slot, when a slot lacks what it needs or the program cannot come to its end, and
    ValueError for costs of a stage or link that the program does not have.
    """
    progress = Progress(program, transport, costs)
    progress.play()
    return outcome(progress)


def outcome(progress: Progress) -> Simulation:
    """What ``simulate`` returns, of a play that has come to its end."""
    program = progress.program
    makespan = max([*progress.clock, *progress.reduced], default=0.0)
    computing = [[span for span in spans if isinstance(span.slot, Compute | Overlap)] for spans in progress.spans]
    computed_until = max((spans[-1].end for spans in computing if spans), default=0.0)
    busy = tuple(sum(span.end - span.start for span in spans) for spans in computing)
    curves = tuple(tuple(holdings.curve) for holdings in progress.holdings)
    peak_bytes = tuple(max((size for _, _, size in curve), default=0.0) for curve in curves)
    return Simulation(
        schedule=program.schedule,
        ranks=program.ranks,
        stages=program.stages,
        microbatches=program.microbatches,
        makespan=makespan,
        busy=busy,
        bubble=tuple(makespan - time for time in busy),
        bubble_by_cause=tuple(_causes(spans, computed_until, makespan) for spans in computing),
        peak_activations=tuple(max((alive for _, alive, _ in curve), default=0) for curve in curves),
        peak_bytes=peak_bytes if progress.costs.knows_bytes else None,
        operations=tuple(map(_count, program.slots)),
        spans=tuple(map(tuple, progress.spans)),
        memory=curves,
    )


def _causes(spans: Sequence[Span], computed_until: float, makespan: float) -> Causes:
    """The idle time around and between the computing spans of a rank."""
    if not spans:
        return Causes(computed_until, 0.0, 0.0, 0.0, makespan - computed_until)
    dependency = communication = 0.0
    for before, span in pairwise(spans):
        if span.start > before.end:
            # Only a wait or a rendezvous can have moved the clock between two computing slots.
            assert span.waited is not None, span
            ready = min(max(span.waited.ready, before.end), span.start)
            dependency += ready - before.end
            communication += span.start - ready
    last = spans[-1].end
    return Causes(spans[0].start, dependency, communication, computed_until - last, makespan - computed_until)


def _count(slots: tuple[Slot, ...]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for slot in slots:
        if isinstance(slot, Overlap):
            counts["FB"] += 1
        elif isinstance(slot, Compute):
            counts[slot.op.value] += 1
    return {name: counts[name] for name in OPERATIONS}
