"""Which ranks are slow, from how long each of them computed in every step. They are reported and left alone: a rank
that is slow still does its work, and who replaces it costs more than it does, or not.

A rank is measured against the others that hold the same stages, and so compute as much: by the median of their times.
One that has no such others is measured against all others, and because it may have more to compute than they, only what
it adds to its own first measure counts. A rank is slow when the median of its last few measures is above
``recovery.slow_factor``, and no longer slow when it is below half way back to 1: a rank at the border is not reported
over and over. Experts that many tokens choose make their rank slow, too; the load is beside it in ``metrics.jsonl``.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_STEPS = 5
"""The measures that the median is taken of."""
FEWEST_STEPS = 3
"""Below so many nothing is said."""


@dataclass(frozen=True)
class Change:
    """A rank that became slow, or is not any more (``slow``). It computes ``seconds`` a step, ``times`` as long as it
    should: medians of the last steps."""

    rank: int
    slow: bool
    times: float
    seconds: float

    def __str__(self) -> str:
        measure = f"it computes {self.times:.1f} times as long as it should, {self.seconds:.2g} s a step"
        return f"rank {self.rank} is {'slow' if self.slow else 'no longer slow'}: {measure}"


class SlowRanks:
    """``factor``: ``recovery.slow_factor``, 0 for never. ``alike``: for each rank the others that hold its stages."""

    def __init__(self, factor: float, alike: Sequence[Sequence[int]]) -> None:
        self._factor = factor
        everyone = range(len(alike))
        self._measured_against = [others or [r for r in everyone if r != rank] for rank, others in enumerate(alike)]
        self._usual: list[float | None] = [1.0 if others else None for others in alike]
        self._measures: list[deque[tuple[float, float]]] = [deque(maxlen=WINDOW_STEPS) for _ in alike]
        self._warm = False
        self.slow: set[int] = set()

    def add(self, seconds: Sequence[float]) -> list[Change]:
        """``seconds``: how long each rank computed in the step after those before -> whose state changed by it. The
        first step warms up and counts for nothing."""
        if not self._factor or len(seconds) < 2 or not self._warm:
            self._warm = True
            return []
        changes = [self._measure(rank, seconds) for rank in range(len(seconds))]
        return [change for change in changes if change is not None]

    def _measure(self, rank: int, seconds: Sequence[float]) -> Change | None:
        others = statistics.median(seconds[other] for other in self._measured_against[rank])
        measures = self._measures[rank]
        measures.append((seconds[rank] / others, seconds[rank]))
        if len(measures) < FEWEST_STEPS:
            return None
        ratio, own = (statistics.median(values) for values in zip(*measures, strict=True))
        usual = self._usual[rank]
        if usual is None:
            if len(measures) == WINDOW_STEPS:
                self._usual[rank] = ratio
            return None
        times, was = ratio / usual, rank in self.slow
        if times >= self._factor and not was:
            self.slow.add(rank)
        elif times <= (1 + self._factor) / 2 and was:
            self.slow.remove(rank)
        else:
            return None
        return Change(rank, not was, times, own)
