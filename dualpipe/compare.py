"""A recorded run laid over its simulation: how far they agree, and where they differ most."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dualpipe.cost import Costs
from dualpipe.derive import derive
from dualpipe.program import Compute, Gather, Overlap, Reduce, Slot, Step, Wait, dump_slot
from dualpipe.progress import Span
from dualpipe.recorded import Recording, Run, measured, origin, transfers
from dualpipe.simulate import Simulation, simulate


@dataclass(frozen=True)
class Difference:
    """A slot that took another time than simulated. Starts count from the run's first slot; a message starts with its
    send and takes until its arrival, and its rank is the one that waits for it."""

    step: int
    replica: int
    rank: int
    slot: Slot
    measured_start: float
    measured: float
    simulated_start: float
    simulated: float

    @property
    def excess(self) -> float:
        return self.measured - self.simulated

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "slot": dump_slot(self.slot), "excess": self.excess}


@dataclass(frozen=True)
class Comparison:
    """``measured`` is the run of median length among those recorded, and ``step`` and ``replica`` say which it is.
    ``differences``: the largest of all runs, by how much longer or shorter a slot was, the largest first."""

    costs: Costs
    step: int
    replica: int
    runs: int
    measured: Simulation
    simulated: Simulation
    handling: tuple[float, ...]  # of each rank of the run: neither computing nor waiting
    differences: tuple[Difference, ...]

    @property
    def difference(self) -> float:
        """The measured step against the simulated one, as a fraction of it."""
        return self.measured.makespan / self.simulated.makespan - 1 if self.simulated.makespan else 0.0


def compare(recording: Recording, most: int = 10) -> Comparison:
    """Derive costs from a recording, simulate its program with them, and list up to ``most`` differences."""
    program, costs = recording.program, derive(recording)
    simulated = simulate(program, costs)
    runs = sorted(recording.runs(), key=lambda entry: _length(entry[2]))
    step, replica, run = runs[(len(runs) - 1) // 2]
    found = (d for number, copy, spans in recording.runs() for d in _differences(number, copy, spans, simulated))
    return Comparison(
        costs,
        step,
        replica,
        len(runs),
        measured(simulated, run),
        simulated,
        tuple(map(_handling, run)),
        tuple(heapq.nlargest(most, found, key=lambda difference: abs(difference.excess))),
    )


def _length(run: Run) -> float:
    return max(spans[-1].end for spans in run if spans) - origin(run)


def _handling(spans: Sequence[Span]) -> float:
    """What a rank spends between its slots, and in those that neither compute nor wait for another rank."""
    used = (Compute, Overlap, Wait, Step, Gather)
    total = spans[-1].end - spans[0].start if spans else 0.0
    return total - sum(span.end - span.start for span in spans if isinstance(span.slot, used))


def _differences(step: int, replica: int, run: Run, simulated: Simulation) -> Iterator[Difference]:
    """Every slot of a run that the simulation gives a time, and every message whose arrival somebody waited for."""
    zero, met = origin(run), set[Slot]()
    for rank, (ours, theirs) in enumerate(zip(measured(simulated, run).spans, simulated.spans, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            # A reduction runs beside others, and only its start is on the rank; a step or gather is one on all ranks.
            if not isinstance(one.slot, Reduce) and one.slot not in met:
                met |= {one.slot} if isinstance(one.slot, Step | Gather) else set()
                times = (one.start, one.end - one.start, other.start, other.end - other.start)
                yield Difference(step, replica, rank, one.slot, *times)
    expected = {crossing.message: crossing for spans in simulated.spans for span in spans for crossing in span.inputs}
    for seen in transfers(run):
        if seen.awaited:
            crossing = expected[seen.wait.message]
            times = (seen.sent - zero, seen.duration, crossing.sent, crossing.arrival - crossing.sent)
            yield Difference(step, replica, seen.target, seen.wait, *times)
