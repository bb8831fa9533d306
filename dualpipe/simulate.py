"""A lowered program and the costs of its operations -> when everything happens, idle time, and peak memory."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dualpipe.cost import Costs
from dualpipe.program import Compute, Free, Op, Overlap, Program, Slot, computed
from dualpipe.progress import Progress, Span, Transport

OPERATIONS = ("F", "B", "I", "W", "FB")


@dataclass(frozen=True)
class Simulation:
    """What a program takes. Times are in the unit of the costs; every tuple has one entry for each rank."""

    schedule: str
    ranks: int
    microbatches: int
    makespan: float
    busy: tuple[float, ...]  # time in computing slots
    bubble: tuple[float, ...]  # makespan - busy
    peak_activations: tuple[int, ...]  # micro-batches, each in one stage
    operations: tuple[dict[str, int], ...]  # counts of F, B, I, W and FB; a pair counts as FB only
    spans: tuple[tuple[Span, ...], ...]  # computing slots and collectives, by start

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time that is idle."""
        return sum(self.bubble) / (self.ranks * self.makespan) if self.makespan else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object that ``simulate --json`` prints: everything but the spans."""
        return {
            "schedule": self.schedule,
            "ranks": self.ranks,
            "microbatches": self.microbatches,
            "makespan": self.makespan,
            "busy": list(self.busy),
            "bubble": list(self.bubble),
            "bubble_fraction": self.bubble_fraction,
            "peak_activations": list(self.peak_activations),
            "operations": list(self.operations),
        }


def simulate(program: Program, costs: Costs, transport: Transport = Transport.EAGER) -> Simulation:
    """Play a lowered program. Raises ProgramError when it cannot come to its end.

    A message arrives ``costs.message`` after its send, a send takes none of its rank's time, and a reduction runs
    beside the slots that follow it. ``transport`` says what else a message needs.
    """
    progress = Progress(program, transport, costs)
    progress.play()
    makespan = max([*progress.clock, *progress.reduced], default=0.0)
    busy = tuple(
        sum(span.end - span.start for span in spans if isinstance(span.slot, Compute | Overlap))
        for spans in progress.spans
    )
    return Simulation(
        schedule=program.schedule,
        ranks=program.ranks,
        microbatches=program.microbatches,
        makespan=makespan,
        busy=busy,
        bubble=tuple(makespan - time for time in busy),
        peak_activations=tuple(map(peak_activations, program.slots)),
        operations=tuple(map(_count, program.slots)),
        spans=tuple(map(tuple, progress.spans)),
    )


def peak_activations(slots: tuple[Slot, ...]) -> int:
    """The most micro-batches a rank holds: each from the start of its forward until it is freed.

    Both halves of a pair are alive while it runs.
    """
    alive = peak = 0
    for slot in slots:
        alive += sum(operation.op is Op.FORWARD for operation in computed(slot))
        peak = max(peak, alive)
        alive -= isinstance(slot, Free)
    return peak


def _count(slots: tuple[Slot, ...]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for slot in slots:
        if isinstance(slot, Overlap):
            counts["FB"] += 1
        elif isinstance(slot, Compute):
            counts[slot.op.value] += 1
    return {name: counts[name] for name in OPERATIONS}
