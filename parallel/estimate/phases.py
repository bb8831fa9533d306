"""A run of several phases: ramps of the batch, longer contexts, and hours that are only stated.

A step takes a + b M seconds for M micro-batches, exactly so once the pipeline is full, so that two simulations price a
whole ramp, and none is longer than ``LONGEST`` micro-batches a rank: over T tokens in which M rises evenly from m to n,
the time of a token is the mean of (a + b M) / M, that is b + a ln(n / m) / (n - m). Where M is below what the schedule
allows, the fastest other schedule that fits runs.

A sequence longer than the workload's is cut into pieces of the workload's length, which attend to all before them: the
core grows with the context, and everything else stays. Moving keys and values between pieces is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, log

from dualpipe import schedules
from parallel.estimate.fit import DoesNotFit, check
from parallel.estimate.hardware import Cluster
from parallel.estimate.plan import Plan, Run, make_plan
from parallel.estimate.workload import Workload

LONGEST = 16


class PhaseError(ValueError):
    """A phase that does not run on the workload's layout; one line with its name, key and rule."""


@dataclass(frozen=True)
class RunPhase:
    """``batch``: sequences a step, at its beginning and at its end; ``gpu_hours``: stated instead of planned."""

    name: str
    tokens: float = 0.0
    sequence_length: int = 0
    batch: tuple[float, float] = (0.0, 0.0)
    gpu_hours: float | None = None


@dataclass(frozen=True)
class Part:
    """A stretch of a phase with one schedule; ``microbatches`` at its beginning and at its end, of each replica."""

    schedule: str
    tokens: float
    microbatches: tuple[float, float]
    gpu_hours: float


@dataclass(frozen=True)
class PricedPhase:
    """``parts`` is empty for a phase whose hours are stated."""

    phase: RunPhase
    parts: tuple[Part, ...]

    @property
    def gpu_hours(self) -> float:
        if self.phase.gpu_hours is not None:
            return self.phase.gpu_hours
        return sum(part.gpu_hours for part in self.parts)


def price(phases: Sequence[RunPhase], workload: Workload, cluster: Cluster, run: Run) -> list[PricedPhase]:
    """Every phase on the workload's layout. Raises PhaseError for one that does not run there, or does not fit."""
    return [
        PricedPhase(phase, () if phase.gpu_hours is not None else tuple(_parts(phase, workload, cluster, run)))
        for phase in phases
    ]


def _parts(phase: RunPhase, workload: Workload, cluster: Cluster, run: Run) -> list[Part]:
    pieces = phase.sequence_length / workload.sequence_length
    own = replace(workload, context_length=phase.sequence_length if pieces > 1 else 0)
    if pieces < 1:
        raise PhaseError(
            f"phase {phase.name}: sequence_length={phase.sequence_length} must be at least train.sequence_length "
            f"({workload.sequence_length})"
        )
    each = pieces / (workload.layout.data * workload.micro_batch_size)
    first, last = phase.batch[0] * each, phase.batch[1] * each
    least = fewest(own.schedule, own.layout.pipeline)
    if first < 1:  # a batch never falls
        longer = f" x train.sequence_length / {phase.sequence_length}" if pieces > 1 else ""
        raise PhaseError(
            f"phase {phase.name}: global_batch_size={phase.batch[0]:g} must be at least layout.data x "
            f"train.micro_batch_size{longer} ({1 / each:g}), a micro-batch for each replica"
        )
    cut = min(max(first, least), last) if last > first else first
    parts: list[Part] = []
    for start, end in ((first, cut), (cut, last)):
        if start < end or (start == end == first == last and not parts):
            share = (end - start) / (last - first) if last > first else 1.0
            low = start < least
            parts.append(_part(phase.name, own, cluster, run, phase.tokens * share, (start, end), low))
    return parts


def _part(
    name: str,
    workload: Workload,
    cluster: Cluster,
    run: Run,
    tokens: float,
    microbatches: tuple[float, float],
    low: bool,
) -> Part:
    """``low``: too few micro-batches for the workload's own schedule."""
    candidates = [each for each in schedules.SCHEDULES if each != workload.schedule] if low else [workload.schedule]
    lines = [line for each in candidates if (line := _line(workload, each, microbatches, cluster, run)) is not None]
    if not lines:
        raise PhaseError(
            f"phase {name}: global_batch_size leaves {microbatches[0]:g} micro-batches for each replica, too few for "
            f"every schedule on layout.pipeline={workload.layout.pipeline} ranks"
        )
    seconds = {line: line.seconds_per_microbatch(microbatches) for line in lines}
    best = min(lines, key=lambda line: (not line.plan.fits, seconds[line]))
    try:
        check(best.plan)
    except DoesNotFit as error:
        raise PhaseError(f"phase {name}: {error}") from None
    w = workload
    rate = w.tokens * w.layout.data  # tokens of one micro-batch of every replica
    hours = tokens / rate * seconds[best] * w.layout.world_size / 3600
    return Part(best.plan.workload.schedule, tokens, microbatches, hours)


@dataclass(frozen=True, eq=False)
class _Line:
    """The step in dependence on the number of micro-batches: two plans."""

    plan: Plan
    other: Plan

    @cached_property
    def slope(self) -> float:
        more = self.other.workload.microbatches - self.plan.workload.microbatches
        return (self.other.step_seconds - self.plan.step_seconds) / more

    @property
    def fixed(self) -> float:
        return self.plan.step_seconds - self.slope * self.plan.workload.microbatches

    def seconds_per_microbatch(self, microbatches: tuple[float, float]) -> float:
        """The mean of step over micro-batches, for as many tokens at each number."""
        first, last = microbatches
        inverse = 1 / first if last == first else log(last / first) / (last - first)
        return self.slope + self.fixed * inverse


def _line(
    workload: Workload, schedule: str, microbatches: tuple[float, float], cluster: Cluster, run: Run
) -> _Line | None:
    """None for a schedule that refuses these numbers, or that the model has too few layers for."""
    pipeline = workload.layout.pipeline
    least = fewest(schedule, pipeline)
    if microbatches[0] < least or schedules.stages(schedule, pipeline) > workload.model.num_hidden_layers:
        return None
    longest = LONGEST * pipeline
    start = _runnable(schedule, pipeline, min(round(microbatches[0]), longest))
    end = _runnable(schedule, pipeline, max(min(round(microbatches[1]), 2 * longest), start + 1))
    own = workload if schedule == workload.schedule else replace(workload, schedule=schedule, chunks=None)
    plans = [make_plan(replace(own, microbatches=m), cluster, run) for m in (start, end)]
    return _Line(*plans)


def _runnable(schedule: str, ranks: int, microbatches: int) -> int:
    """The next number of micro-batches from this one on that the schedule runs."""
    while not schedules.runs(schedule, ranks, microbatches):
        microbatches += 1
    return microbatches


def fewest(schedule: str, ranks: int) -> float:
    """The fewest micro-batches that a schedule runs on so many ranks."""
    return next((m for m in range(1, 4 * ranks + 1) if schedules.runs(schedule, ranks, m)), inf)
