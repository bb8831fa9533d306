"""Tells a hang from a slow step, from beside the ranks, and says who is to blame.

Every rank writes down what it is doing ten times a second (``parallel/activity.py``), in memory that the launcher
holds. How long nothing may come of that depends on what else there is to see of the rank to blame:

- The kernel has it as stopped by a signal, and it has written nothing for a second: that is no slow step, whatever it
  was doing.
- In a step all others wait, and it computes, as it says; but whenever one looks, all of its threads are asleep. Then it
  does not do the work on a processor that takes its time, and is measured by that: it hangs when it has not come back,
  and no rank further from one slot of the program to the next, for ``recovery.hang_factor`` times the longest that it
  lately computed without a wait, and at least a second.
- Otherwise it may be slow: it works, or waits for a core or a disk, or all wait for each other. It hangs when no rank
  has come further for ``recovery.hang_factor`` times the median step, and at least a second: a step that is long
  because its batch has grown has more slots, and is none.

While all ranks are between steps, as a checkpoint is written or the model validated, nothing but a stopped rank is a
hang: those take as long as they take, and ``train.timeout_seconds`` is their limit. One that is there alone, reading
its batch while others wait for it in the step, is measured by the median step.

Where the ranks are those of several nodes, each launcher sees its own. A rank that is silent it knows without the
others. Otherwise it tells them what its ranks do once none of them comes further (``Elsewhere``); when all have told
that, all judge alike, from the same records, and the rank to blame is ended by the launcher of its node.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from launch.memory_file import MemoryFile
from launch.process_state import ProcessState, state_of
from parallel.activity import COMPUTING, Blame, blame_silent, judge, judge_living

BEAT_SECONDS = 0.1
SHORTEST_SECONDS = 1.0
"""No step hangs sooner than this."""
SILENT_SECONDS = 0.5
"""A rank that wrote nothing for so long is stopped, or does not get to run."""
ASLEEP_SECONDS = 0.5
"""A rank that was asleep at every look for so long does no work on a processor."""
LONGEST_GAP_SECONDS = 0.25
"""Of the time between two looks, no more counts: a watch that was itself stopped, with the ranks or with the whole
machine, has seen nothing."""
ELSEWHERE_SECONDS = 1.0
"""What another node may take to find, and to end, a rank that is silent."""
_RECORD_BYTES = 1024

Readings = Mapping[int, Mapping[str, Any]]


class Elsewhere(Protocol):
    """The launchers of the other nodes."""

    def tell_stuck(self, readings: Readings | None) -> None:
        """What the ranks here do, none of which comes further; None when one does."""

    def stuck_elsewhere(self) -> Readings | None:
        """What all other ranks do, if all nodes have told that none of theirs comes further."""


class Board:
    """A record of each rank, in a file without a name that the kernel frees with its last user. Linux only."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._file = MemoryFile("dualpipe-activity")
        self.path = self._file.path
        self.clear()

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def clear(self) -> None:
        self._file.clear(self.ranks * _RECORD_BYTES)

    def watched(
        self, factor: float, ranks: range, elsewhere: Elsewhere | None = None
    ) -> Callable[[float], "Hang | None"]:
        """Clear it for the ``ranks`` of a new attempt, all of the job or those that are not ``elsewhere`` -> what looks
        at it, at a time in seconds, and sees them hang."""
        self.clear()
        watch = Watch(factor, elsewhere)

        def look(now: float) -> Hang | None:
            readings = self.read(ranks)
            return None if readings is None else watch.look(now, readings)

        return look

    def read(self, ranks: range) -> Readings | None:
        """What each of these, the first ones on this node, wrote last; None before all have, or when one is just being
        written."""
        data = os.pread(self._file.descriptor, len(ranks) * _RECORD_BYTES, 0)
        try:
            records = [json.loads(data[at : at + _RECORD_BYTES]) for at in range(0, len(data), _RECORD_BYTES)]
        except ValueError:
            return None
        return dict(zip(ranks, records, strict=True))


class BoardRecord:
    """A rank's record on the board at ``path``."""

    def __init__(self, path: Path, rank: int) -> None:
        self._file, self._at = os.open(path, os.O_WRONLY), rank * _RECORD_BYTES

    def write(self, text: str) -> None:
        line = text.encode()
        assert len(line) <= _RECORD_BYTES, line
        os.pwrite(self._file, line.ljust(_RECORD_BYTES), self._at)


@dataclass(frozen=True)
class Hang:
    """The ranks whose end ends the hang, as process ids by rank, and why, in words."""

    processes: dict[int, int]
    words: str


@dataclass(frozen=True)
class Limit:
    """How long no rank may come further, and by what measure, in words."""

    seconds: float
    words: str


class Watch:
    """Looks at one attempt of a run, every fraction of a second. ``factor``: ``recovery.hang_factor``. With ranks
    ``elsewhere`` it blames one that waits only when nobody there comes further either; and one that computes only when
    no other node has found one that is silent, which says more. ``state_of`` a process: what the kernel says of it."""

    def __init__(
        self,
        factor: float,
        elsewhere: Elsewhere | None = None,
        state_of: Callable[[int, Collection[int]], ProcessState] = state_of,
    ) -> None:
        self._factor, self._elsewhere, self._state_of = factor, elsewhere, state_of
        self._looked: float | None = None
        self._seen_seconds = 0.0
        self._progress: tuple[Any, ...] = ()
        self._progress_at = 0.0
        self._before: deque[tuple[float, Readings]] = deque()
        self._beats: dict[int, tuple[int, float]] = {}
        self._late: int | None = None
        self._awake_at = 0.0

    def look(self, now: float, readings: Readings) -> Hang | None:
        """``readings``: of all ranks, at ``now``, in seconds of a clock that only goes forward."""
        self._note(now, readings)
        lasted, limit = self._seen_seconds - self._progress_at, self._limit(readings)
        stuck = limit is not None and lasted > limit.seconds
        blame = self._stopped(readings)
        if blame is not None:
            why = f"it wrote nothing for {SHORTEST_SECONDS:g} s"
        elif limit is not None and stuck:
            blame = self._judge(readings, lasted - limit.seconds)
            why = f"no rank came further for {lasted:.1f} s, where {limit.words}"
        here = {rank: readings[rank]["pid"] for rank in (blame.ranks if blame else ()) if rank in readings}
        if self._elsewhere is not None:
            self._elsewhere.tell_stuck(readings if stuck and not here else None)
        return Hang(here, f"{blame.words}; {why}") if blame is not None and here else None

    def _note(self, now: float, readings: Readings) -> None:
        """What is seen at this look."""
        gap = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        self._seen_seconds += min(gap, LONGEST_GAP_SECONDS)
        progress = tuple((record["step"], record["stepping"], record["turns"]) for record in readings.values())
        stepping = any(record["stepping"] for record in readings.values())
        if progress != self._progress or not stepping:
            self._progress, self._progress_at = progress, self._seen_seconds
        self._before.append((self._seen_seconds, readings))
        while len(self._before) > 1 and self._before[1][0] <= self._seen_seconds - SILENT_SECONDS:
            self._before.popleft()
        for rank, record in readings.items():
            if self._beats.get(rank, (None, 0.0))[0] != record["beat"]:
                self._beats[rank] = record["beat"], self._seen_seconds
        self._note_late(readings)

    def _note_late(self, readings: Readings) -> None:
        """The one rank that the others wait for, and when it last was anything but asleep: looked at only where it may
        soon hang."""
        computing = [rank for rank, record in readings.items() if record["operation"] == COMPUTING]
        late = computing[0] if len(computing) == 1 else None
        soon = self._seen_seconds - self._progress_at > SHORTEST_SECONDS - ASLEEP_SECONDS
        if late is None or late != self._late or not soon or self._state(readings[late]) is not ProcessState.ASLEEP:
            self._late, self._awake_at = late, self._seen_seconds

    def _state(self, record: Mapping[str, Any]) -> ProcessState:
        return self._state_of(record["pid"], record["beat_threads"])

    def _stopped(self, readings: Readings) -> Blame | None:
        """The ranks that were stopped long enough, if there are such."""
        silent = self._silent_for(readings, SHORTEST_SECONDS)
        stopped = [rank for rank in silent if self._state(readings[rank]) is ProcessState.STOPPED]
        return blame_silent(stopped, readings, ProcessState.STOPPED.value) if stopped else None

    def _silent_for(self, readings: Readings, seconds: float) -> list[int]:
        return [rank for rank in readings if self._seen_seconds - self._beats[rank][1] > seconds]

    def _limit(self, readings: Readings) -> Limit | None:
        """None where there is nothing to measure by."""
        medians = [m for record in readings.values() if (m := record["median_step_seconds"]) is not None]
        if not medians:
            return None
        step = max(medians)
        by_step = Limit(max(SHORTEST_SECONDS, self._factor * step), f"a step takes {step:.2g} s")
        by_stretch = self._limit_asleep(readings)
        return by_step if by_stretch is None else min(by_stretch, by_step, key=lambda limit: limit.seconds)

    def _limit_asleep(self, readings: Readings) -> Limit | None:
        """By what the late rank usually computes, if it sleeps instead, in a step, and has for that long."""
        if self._late is None or self._seen_seconds - self._awake_at < ASLEEP_SECONDS:
            return None
        late = readings[self._late]
        stretch, silent = late["longest_stretch_seconds"], self._silent_for(readings, SILENT_SECONDS)
        if stretch is None or silent or not late["stepping"]:
            return None
        seconds = max(SHORTEST_SECONDS, self._factor * stretch)
        words = f"it computes {stretch:.2g} s at most without a wait, and it is asleep"
        return Limit(seconds, words) if late["seconds"] > seconds else None

    def _judge(self, readings: Readings, overdue: float) -> Blame | None:
        """Who is to blame, here or elsewhere; None while it cannot be known."""
        blame, everyone = judge(self._before[0][1], readings), readings
        if self._elsewhere is not None and not self._is_here(blame, readings, overdue):
            others = self._elsewhere.stuck_elsewhere()
            if others is None:
                return None
            everyone = {**others, **readings}
            blame = judge_living(everyone)  # one that is silent is known to its own launcher without the others
        if blame is None:
            return Blame(tuple(everyone), "all ranks wait for each other, as if one had left out a message")
        return blame

    def _is_here(self, blame: Blame | None, readings: Readings, overdue: float) -> bool:
        """Whether the rank to blame is on this node for sure: one that waits may wait for another node's."""
        if blame is None:
            return False
        computes = all(readings[rank]["operation"] == COMPUTING for rank in blame.ranks)
        return blame.silent or (computes and overdue > ELSEWHERE_SECONDS)
