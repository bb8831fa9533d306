"""What every rank is doing, known to all of them, so that a rank that waits in vain can say for whom.

A rank keeps one record: the operation that it is in, and the ranks that it waits for in it, none while it computes.
A thread publishes the record in the job's store, under ``activity/RANK`` as one JSON object, a few times in every
timeout; the number of the ``beat`` in it grows as long as the process runs. Whoever can reach the store can read it.
A launcher that watches its ranks (``launch/hang.py``) has them published where it can look more often.

When a collective or a message fails, each rank judges by these records. A rank whose beat stands still is dead or
stopped. Otherwise the one that computes while others wait did not come: it is too slow, or hangs in what it computes.
The first verdict is the whole job's: who fails only because others have given up repeats it.
"""

import json
import os
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

from parallel.compute_time import ComputeTime, HostComputeTime

BEATS = 20
"""In one timeout, but at least one a second."""
SILENT_BEATS = 4
"""A rank that published nothing for so long is dead or stopped."""
COMPUTING = "computing"
STEPS_KEPT = 32
"""Of the last so many steps the median is published; the first, which warms up, is none of them."""
PEERS_PUBLISHED = 16
COMMUNICATION = ("onnection", "gloo", "NCCL")
"""Of which an error of torch.distributed has one in its words."""


def beat_seconds(timeout_s: float) -> float:
    return min(1.0, timeout_s / BEATS)


def collective_timeout(timeout_s: float) -> timedelta:
    """What a collective may take when ranks are to have ended, with a verdict, within ``timeout_s``."""
    return timedelta(seconds=timeout_s - (SILENT_BEATS + 1) * beat_seconds(timeout_s))


class LostPeer(RuntimeError):
    """A collective or message of this rank failed. ``timed_out``: nobody came in time; otherwise a connection broke, or
    its end was closed by a rank that had given up."""

    def __init__(self, operation: str, peers: Sequence[int], timed_out: bool, verdict: str | None) -> None:
        self.operation, self.peers, self.timed_out, self.verdict = operation, tuple(peers), timed_out, verdict
        cause = "nobody came in time" if timed_out else "the connection broke"
        names = "ranks" if len(peers) > 1 else "rank"
        whom = (
            f" with {names} {', '.join(map(str, peers))}"
            if len(peers) <= PEERS_PUBLISHED
            else f" with {len(peers)} ranks"
        )
        super().__init__(f"{operation}{whom if peers else ''}: {verdict or cause}")


@dataclass(frozen=True)
class Record:
    """``since``: seconds of ``time.monotonic`` in this process."""

    operation: str
    peers: tuple[int, ...]
    since: float


class Activity:
    """This rank's record. Without a ``store`` nobody else knows it, and a failure has no verdict. ``describe`` names
    what is computed (a slot of the program, say) when the record is published, which is seldom. ``compute_time`` counts
    the time in which the rank does not wait."""

    def __init__(
        self,
        rank: int = 0,
        ranks: Sequence[int] = (),
        store: Store | None = None,
        timeout_s: float = 600.0,
        describe: Callable[[Any], str] = str,
        compute_time: ComputeTime | None = None,
    ) -> None:
        self.compute_time = HostComputeTime() if compute_time is None else compute_time
        self.rank, self.ranks, self._store = rank, tuple(ranks), store
        self._beat_s = beat_seconds(timeout_s)
        self._computing: Any = "starting"
        self._describe = describe
        self._waiting: Record | None = None
        self._since = time.monotonic()
        self._turns = 0
        self._step_seconds: deque[float] = deque(maxlen=STEPS_KEPT)
        self._longest_stretches: deque[float] = deque(maxlen=STEPS_KEPT)
        self._longest_stretch = 0.0
        self._beat_threads: list[int] = []
        self._steps = 0
        self.step, self.stepping = 0, False
        self.ending = threading.Event()
        """Set when somebody else knows who is to blame, and ends this process: then there is no verdict to wait for."""
        if store is not None:
            key = _key(rank)
            self.publish(lambda text: store.set(key, text), self._beat_s)

    @contextmanager
    def in_step(self, step: int) -> Iterator[None]:
        """In the context this rank takes a training step, which takes about as long as the others."""
        start = time.monotonic()
        self.computes("the start of the step")
        self.step, self.stepping, self._longest_stretch = step, True, 0.0
        yield
        self._end_stretch(time.monotonic())
        self.stepping = False
        self._steps += 1
        if self._steps > 1:
            self._step_seconds.append(time.monotonic() - start)
            self._longest_stretches.append(self._longest_stretch)

    def computes(self, what: Any) -> None:
        """From here on this rank is in ``what``, until it waits or is in something else."""
        self._end_stretch(time.monotonic())
        self._computing = what
        self._turns += 1

    def _end_stretch(self, now: float) -> None:
        """A stretch is what a rank computes without a wait, and without turning to something else."""
        self._longest_stretch = max(self._longest_stretch, now - self._since)
        self._since = now

    @contextmanager
    def waiting(self, operation: str, peers: Sequence[int]) -> Iterator[None]:
        """In the context this rank waits for other ranks. Raises LostPeer for what torch.distributed raises in it."""
        outer, others, now = self._waiting, tuple(peer for peer in peers if peer != self.rank), time.monotonic()
        if outer is None:
            self._end_stretch(now)
        self._waiting = Record(operation, others, now)
        try:
            with self.compute_time.waits() if outer is None else nullcontext():
                yield
        except LostPeer:
            raise
        except RuntimeError as error:
            raise self._lost(operation, others, error) from error
        finally:
            if outer is None:
                self._since = time.monotonic()
            self._waiting = outer

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """What fails in the context for want of a peer, outside ``waiting``, is a LostPeer too."""
        try:
            yield
        except LostPeer:
            raise
        except RuntimeError as error:
            if not any(word in str(error) for word in COMMUNICATION):
                raise
            raise self._lost(self._describe(self._computing), (), error) from error

    def _lost(self, operation: str, peers: Sequence[int], error: RuntimeError) -> LostPeer:
        text = str(error).lower()
        return LostPeer(operation, peers, "timed out" in text or "timeout" in text, self._verdict())

    def read(self) -> dict[int, dict[str, Any]]:
        """Every rank's published record."""
        assert self._store is not None
        found = self._store.multi_get([_key(rank) for rank in self.ranks])
        return {rank: json.loads(text) for rank, text in zip(self.ranks, found, strict=True)}

    def publish(self, write: Callable[[str], object], seconds: float) -> None:
        """Write the record at once, and from a thread every so many ``seconds`` for as long as this object lives, or
        until ``write`` raises RuntimeError or OSError: then the job is at its end."""
        write(json.dumps(self.record(0)))
        over = threading.Event()
        record = weakref.WeakMethod(self.record)
        thread = threading.Thread(target=_beat, args=(record, write, over, seconds), daemon=True)
        thread.start()
        assert thread.native_id is not None
        self._beat_threads.append(thread.native_id)
        weakref.finalize(self, over.set)

    def record(self, beat: int) -> dict[str, Any]:
        """What is published. ``beat_threads``: of the process ``pid``, those that publish; ``turns``: how often the
        rank has turned to another computation; ``seconds``: in ``operation``, for one that computes since it turned to
        that or last waited; ``peers``: the first of them; ``median_step_seconds``, and ``longest_stretch_seconds``, the
        most that it computed without a wait: of the last steps, None before the third."""
        waiting, computing, now = self._waiting, self._computing, time.monotonic()
        steps, stretches = list(self._step_seconds), list(self._longest_stretches)
        return {
            "beat": beat,
            "pid": os.getpid(),
            "beat_threads": list(self._beat_threads),
            "step": self.step,
            "stepping": self.stepping,
            "turns": self._turns,
            "median_step_seconds": statistics.median(steps) if len(steps) > 1 else None,
            "longest_stretch_seconds": round(max(stretches), 6) if len(stretches) > 1 else None,
            "computing": self._describe(computing),
            "operation": COMPUTING if waiting is None else waiting.operation,
            "peers": [] if waiting is None else waiting.peers[:PEERS_PUBLISHED],
            "seconds": round(now - (self._since if waiting is None else waiting.since), 3),
        }

    def _verdict(self) -> str | None:
        """Who is to blame, in words; None when it cannot be known: not without a store, or one that is gone."""
        if self._store is None:
            return None
        with suppress(RuntimeError):
            known = self._store.compare_set("activity/verdict", "", "").decode()
            if not known:
                before = self.read()
                ended = self.ending.wait(SILENT_BEATS * self._beat_s)
                found = None if ended else judge(before, self.read(), self.rank)
                # A rank that is told to end may take a verdict that another has come to meanwhile.
                known = self._store.compare_set("activity/verdict", "", found.words if found else "").decode()
            return known or None
        return None


@dataclass(frozen=True)
class Blame:
    """The ranks that keep the others waiting, and what is known of them, in words. ``silent``: whether that is that
    they are."""

    ranks: tuple[int, ...]
    words: str
    silent: bool = False


def judge(
    before: Mapping[int, Mapping[str, Any]], after: Mapping[int, Mapping[str, Any]], reader: int | None = None
) -> Blame | None:
    """Who keeps the others waiting, from two readings of all records, ``SILENT_BEATS`` beats apart; None when everyone
    lives and waits, and none can be told from the others. ``reader``: the rank that reads, which is no silent one even
    if it was stopped until now."""
    silent = tuple(rank for rank in after if rank != reader and after[rank]["beat"] == before[rank]["beat"])
    return blame_silent(silent, after, "dead or stopped") if silent else judge_living(after)


def blame_silent(silent: Sequence[int], records: Mapping[int, Mapping[str, Any]], why: str) -> Blame:
    """``records``: what they wrote last."""
    last = records[silent[0]]
    seen = f"{last['operation']} ({last['computing']}, step {last['step']})"
    names = f"ranks {', '.join(map(str, silent))} are" if len(silent) > 1 else f"rank {silent[0]} is"
    return Blame(tuple(silent), f"{names} silent, {why}, last heard of in {seen}", silent=True)


def judge_living(after: Mapping[int, Mapping[str, Any]]) -> Blame | None:
    """As ``judge``, where none is silent."""
    computing = [rank for rank in after if after[rank]["operation"] == COMPUTING]
    if not computing:
        return _missed(after)
    slowest = max(computing, key=lambda rank: float(after[rank]["seconds"]))
    last = after[slowest]
    words = f"it has been in {last['computing']} of step {last['step']} for {last['seconds']:.1f} s"
    return Blame((slowest,), f"rank {slowest} did not come: {words}")


def _missed(records: Mapping[int, Mapping[str, Any]]) -> Blame | None:
    """Where everyone waits, the rank that more of the others wait for than for anyone else, in an operation that it is
    not in: it left that one out, or never comes to it. None where there are several such."""
    waiting_for: dict[int, list[int]] = {rank: [] for rank in records}
    for rank, record in records.items():
        for peer in record["peers"]:
            if peer in records and records[peer]["operation"] != record["operation"]:
                waiting_for[peer].append(rank)
    most = max(len(waiting) for waiting in waiting_for.values())
    missed = [rank for rank, waiting in waiting_for.items() if len(waiting) == most]
    if most == 0 or len(missed) > 1:
        return None
    own, waiting = records[missed[0]], waiting_for[missed[0]]
    who = f"{len(waiting)} ranks wait" if len(waiting) > 1 else f"rank {waiting[0]} waits"
    operation, place = records[waiting[0]]["operation"], f"it is in {own['operation']} of step {own['step']}"
    return Blame((missed[0],), f"rank {missed[0]} left out what others wait for: {who} in {operation}, and {place}")


def _key(rank: int) -> str:
    return f"activity/{rank}"


def _beat(
    record: "weakref.WeakMethod[Callable[[int], dict[str, Any]]]",
    write: Callable[[str], object],
    over: threading.Event,
    seconds: float,
) -> None:
    beat = 0
    while not over.wait(seconds):
        beat += 1
        read = record()
        if read is None:
            return
        text = json.dumps(read(beat))
        del read
        try:
            write(text)
        except (RuntimeError, OSError):
            return
