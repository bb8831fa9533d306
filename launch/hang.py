"""Tells a hang from a slow step, from beside the ranks, and says who is to blame.

Every rank writes down what it is doing ten times a second (``parallel/activity.py``), in memory that the launcher
holds. A hang is a training step in which no rank has come further, from one slot of the program to the next, for
``recovery.hang_factor`` times the median step, and at least a second: a step that is long because its batch has grown
has more slots, and is none. Between steps, while a checkpoint is written or the model validated, nothing is a hang:
those take as long as they take, and ``train.timeout_seconds`` is their limit.

Where the ranks are those of several nodes, each launcher sees its own. A rank that is silent it knows without the
others. Otherwise it tells them what its ranks do once none of them comes further (``Elsewhere``); when all have told
that, all judge alike, from the same records, and the rank to blame is ended by the launcher of its node.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from launch.memory_file import MemoryFile
from parallel.activity import COMPUTING, Blame, judge, judge_living

BEAT_SECONDS = 0.1
SHORTEST_SECONDS = 1.0
"""No step hangs sooner than this."""
SILENT_SECONDS = 0.5
"""A rank that wrote nothing for so long is stopped, or does not get to run."""
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


class Watch:
    """Looks at one attempt of a run, every fraction of a second. ``factor``: ``recovery.hang_factor``. With ranks
    ``elsewhere`` it blames one that waits only when nobody there comes further either; and one that computes only when
    no other node has found one that is silent, which says more."""

    def __init__(self, factor: float, elsewhere: Elsewhere | None = None) -> None:
        self._factor, self._elsewhere = factor, elsewhere
        self._looked: float | None = None
        self._seen_seconds = 0.0
        self._progress: tuple[Any, ...] = ()
        self._progress_at = 0.0
        self._before: deque[tuple[float, Readings]] = deque()

    def look(self, now: float, readings: Readings) -> Hang | None:
        """``readings``: of all ranks, at ``now``, in seconds of a clock that only goes forward."""
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
        medians = [m for record in readings.values() if (m := record["median_step_seconds"]) is not None]
        lasted = self._seen_seconds - self._progress_at
        longest = max(SHORTEST_SECONDS, self._factor * max(medians, default=0.0))
        stuck = bool(medians) and lasted > longest
        blame = self._judge(readings, lasted - longest) if stuck else None
        here = {rank: readings[rank]["pid"] for rank in (blame.ranks if blame else ()) if rank in readings}
        if self._elsewhere is not None:
            self._elsewhere.tell_stuck(readings if stuck and not here else None)
        if blame is None or not here:
            return None
        words = f"{blame.words}; no rank came further for {lasted:.1f} s, where a step takes {max(medians):.2g} s"
        return Hang(here, words)

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
