"""A hang is told from a slow step, a pause and a rest between steps; and the right rank is named."""

import itertools
import json
import os
from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.hang import (
    ASLEEP_SECONDS,
    ELSEWHERE_SECONDS,
    LONGEST_GAP_SECONDS,
    SHORTEST_SECONDS,
    Board,
    BoardRecord,
    Hang,
    Readings,
    Watch,
)
from launch.nodes import stuck
from launch.process_state import ProcessState
from parallel.activity import COMPUTING, Activity

LOOK_SECONDS = 0.05
RANKS = 3
StateOf = Callable[[int, Collection[int]], ProcessState]


def at_work(process: int, besides: Collection[int]) -> ProcessState:
    return ProcessState.AT_WORK


def only(process: int, state: ProcessState) -> StateOf:
    return lambda other, besides: state if other == process else ProcessState.AT_WORK


class Node:
    """A launcher of several, through what the roster holds."""

    def __init__(self, ranks: range = range(RANKS)) -> None:
        self.ranks, self.told = ranks, ""
        self.other: Node | None = None

    def tell_stuck(self, readings: Readings | None) -> None:
        self.told = "" if readings is None else stuck.pack(3, readings)

    def stuck_elsewhere(self) -> Readings | None:
        return None if self.other is None else stuck.merge(3, [self.other.told])


def record(beat: int, step: int = 7, operation: str = "dispatch", **changes: Any) -> dict[str, Any]:
    return {
        "beat": beat,
        "pid": 100,
        "beat_threads": [],
        "step": step,
        "stepping": True,
        "turns": 0,
        "median_step_seconds": 0.2,
        "longest_stretch_seconds": 0.02,
        "computing": "F1.0",
        "operation": operation,
        "peers": [],
        "seconds": 0.1 * beat,
        **changes,
    }


def watched(
    seconds: float, readings: Any, factor: float = 10.0, watch: Watch | None = None, state_of: StateOf = at_work
) -> tuple[float, Hang] | None:
    """What the watch sees in so many seconds: when, and what. ``readings(beat)``: of all ranks."""
    watch = watch or Watch(factor, state_of=state_of)
    for look in range(int(seconds / LOOK_SECONDS)):
        now = look * LOOK_SECONDS
        found = watch.look(now, readings(int(10 * now)))
        if found is not None:
            return now, found
    return None


def everyone(beat: int, **changes: Any) -> dict[int, dict[str, Any]]:
    return {rank: record(beat, pid=100 + rank, **changes) for rank in range(RANKS)}


def test_a_silent_rank_is_named_after_ten_median_steps() -> None:
    def readings(beat: int) -> Readings:
        return everyone(beat) | {2: record(3, pid=102, computing="B0.4")}

    found = watched(10, readings)
    assert found is not None
    when, hang = found
    assert 2.0 < when < 2.3
    assert hang.processes == {2: 102}
    assert "rank 2 is silent, dead or stopped, last heard of in dispatch (B0.4, step 7)" in hang.words


def test_a_rank_that_computes_while_others_wait_is_named_and_a_quick_step_hangs_after_a_second() -> None:
    def readings(beat: int) -> Readings:
        late = {0: record(beat, pid=100, operation=COMPUTING, seconds=0.1 * beat, median_step_seconds=0.01)}
        return everyone(beat, median_step_seconds=0.01) | late

    found = watched(10, readings)
    assert found is not None
    assert SHORTEST_SECONDS < found[0] < SHORTEST_SECONDS + 0.3
    assert found[1].processes == {0: 100} and "rank 0 did not come" in found[1].words


@pytest.mark.parametrize(
    "where",
    [{}, {"median_step_seconds": None, "longest_stretch_seconds": None}, {"stepping": False}],
    ids=["in a step", "in its first steps", "between steps"],
)
def test_a_rank_that_the_kernel_has_as_stopped_is_named_after_a_second(where: dict[str, Any]) -> None:
    def readings(beat: int) -> Readings:
        return everyone(beat, turns=beat, **where) | {2: record(min(beat, 3), pid=102, computing="B0.4", **where)}

    found = watched(10, readings, state_of=only(102, ProcessState.STOPPED))
    assert found is not None
    when, hang = found
    assert 0.3 + SHORTEST_SECONDS < when < 0.3 + SHORTEST_SECONDS + 3 * LOOK_SECONDS
    assert hang.processes == {2: 102}
    assert hang.words.startswith("rank 2 is silent, stopped by a signal, last heard of in dispatch (B0.4, step 7)")
    assert watched(10, readings) is None, "it may only not have got to run"


def test_a_rank_that_is_stopped_again_and_again_is_no_hang() -> None:
    def readings(beat: int) -> Readings:
        return everyone(beat) | {2: record(beat // 8, pid=102, turns=beat // 8)}

    assert watched(60, readings, state_of=only(102, ProcessState.STOPPED)) is None


ASLEEP = only(100, ProcessState.ASLEEP)


def late(beat: int, **changes: Any) -> Readings:
    """All wait for rank 0, which computes since the beginning."""
    return everyone(beat) | {0: record(beat, pid=100, operation=COMPUTING, **changes)}


@pytest.mark.parametrize(
    ("stretch", "step", "hangs_after"),
    [(0.02, 0.2, SHORTEST_SECONDS), (0.15, 20.0, 1.5), (0.5, 20.0, 5.0), (5.0, 2.0, 20.0)],
)
def test_a_late_rank_that_sleeps_is_measured_by_what_it_usually_computes(
    stretch: float, step: float, hangs_after: float
) -> None:
    def readings(beat: int) -> Readings:
        return late(beat, longest_stretch_seconds=stretch, median_step_seconds=step)

    found = watched(60, readings, state_of=ASLEEP)
    assert found is not None
    assert hangs_after < found[0] < hangs_after + 0.3, "never later than by the step"
    assert found[1].processes == {0: 100} and "rank 0 did not come" in found[1].words


def at_times() -> StateOf:
    """At work whenever it has nearly been asleep for long enough."""
    asleep = int(ASLEEP_SECONDS / LOOK_SECONDS) - 1
    states = itertools.cycle([ProcessState.ASLEEP] * asleep + [ProcessState.AT_WORK])
    return lambda process, besides: next(states)


@pytest.mark.parametrize(
    ("why", "readings", "state_of"),
    [
        ("it works", late, at_work),
        ("it works at times", late, at_times()),
        ("not yet in the step", lambda beat: late(beat, stepping=False), ASLEEP),
        ("nothing to measure by", lambda beat: late(beat, longest_stretch_seconds=None), ASLEEP),
        ("it just began", lambda beat: late(beat, seconds=0.5), ASLEEP),
        ("another computes too", lambda beat: late(beat) | {1: record(beat, operation=COMPUTING)}, ASLEEP),
        ("another is silent", lambda beat: late(beat) | {2: record(0, pid=102)}, ASLEEP),
        ("it waits", everyone, ASLEEP),
    ],
)
def test_without_proof_that_it_sleeps_for_nobody_a_step_is_the_measure(
    why: str, readings: Callable[[int], Readings], state_of: StateOf
) -> None:
    found = watched(10, readings, state_of=state_of)
    assert found is not None and 2.0 < found[0] < 2.3, why


@given(
    st.lists(st.tuples(st.floats(0.01, 60), st.sampled_from(ProcessState)), min_size=1, max_size=30),
    st.floats(0.2, 3),
    st.floats(0.001, 0.2),
    st.floats(2, 20),
)
def test_no_operation_within_its_limit_is_a_hang_whatever_the_kernel_says(
    operations: list[tuple[float, ProcessState]], step: float, stretch: float, factor: float
) -> None:
    """Rank 0 computes for so long, all others wait; it writes down what it does all the while."""
    by_step, by_stretch = max(SHORTEST_SECONDS, factor * step), max(SHORTEST_SECONDS, factor * min(stretch, step))
    most = [by_stretch if state is ProcessState.ASLEEP else by_step for _, state in operations]
    lasts = [min(seconds, limit - 0.15) for (seconds, _), limit in zip(operations, most, strict=True)]
    ends = [sum(lasts[: n + 1]) for n in range(len(lasts))]
    measures = {"median_step_seconds": step, "longest_stretch_seconds": stretch}

    def at(now: float) -> int:
        return sum(end <= now for end in ends)

    def readings(beat: int) -> Readings:
        turns = at(0.1 * beat)
        began = ends[turns - 1] if turns else 0.0
        return everyone(beat, **measures) | {
            0: record(beat, pid=100, operation=COMPUTING, turns=turns, seconds=0.1 * beat - began, **measures)
        }

    now = 0.0

    def state_of(process: int, besides: Collection[int]) -> ProcessState:
        return operations[min(at(now), len(operations) - 1)][1]

    watch = Watch(factor, state_of=state_of)
    while now < min(ends[-1], 120.0):
        assert watch.look(now, readings(int(10 * now + 1e-9))) is None
        now += LOOK_SECONDS


def test_where_part_of_the_job_is_seen_only_who_is_here_for_sure_is_named() -> None:
    def stopped(beat: int) -> Readings:
        return everyone(beat) | {2: record(3, pid=102)}

    def computing(beat: int) -> Readings:
        return everyone(beat) | {0: record(beat, pid=100, operation=COMPUTING, seconds=0.1 * beat)}

    assert watched(60, everyone, watch=Watch(10.0, Node(), at_work)) is None, "they wait for a rank of another node"
    found = watched(10, stopped, watch=Watch(10.0, Node(), at_work))
    assert found is not None and found[0] < 2.3 and found[1].processes == {2: 102}
    found = watched(10, computing, watch=Watch(10.0, Node(), at_work))
    assert found is not None and found[0] > 2.0 + ELSEWHERE_SECONDS and found[1].processes == {0: 100}


@pytest.mark.parametrize("culprit", range(4))
def test_where_all_wait_the_launcher_of_the_rank_to_blame_ends_it_and_no_other_does(culprit: int) -> None:
    nodes = Node(range(2)), Node(range(2, 4))
    for node, other in (nodes, nodes[::-1]):
        node.other = other
    watches = [Watch(10.0, node, at_work) for node in nodes]

    def readings(beat: int) -> Readings:
        others = [rank for rank in range(4) if rank != culprit]
        left_out = record(beat, pid=100 + culprit, operation="dispatch", peers=others[:1])
        gather = {rank: record(beat, pid=100 + rank, operation="gather", peers=[culprit]) for rank in others}
        return {rank: gather.get(rank, left_out) for rank in range(4)}

    found: dict[int, Hang] = {}
    for look in range(100):
        seen = readings(int(10 * LOOK_SECONDS * look))
        for number, (node, watch) in enumerate(zip(nodes, watches, strict=True)):
            hang = watch.look(LOOK_SECONDS * look, {rank: seen[rank] for rank in node.ranks})
            if hang is not None:
                found.setdefault(number, hang)
    ((number, hang),) = found.items()
    assert number == culprit // 2 and hang.processes == {culprit: 100 + culprit}
    assert hang.words.startswith(f"rank {culprit} left out what others wait for: 3 ranks wait in gather")


def test_ranks_that_wait_are_not_to_blame_while_any_elsewhere_comes_further() -> None:
    here, there = Node(range(2)), Node(range(2, 4))
    here.other, there.other = there, here
    watches = Watch(10.0, here, at_work), Watch(10.0, there, at_work)
    for look in range(1000):
        now, beat = LOOK_SECONDS * look, int(10 * LOOK_SECONDS * look)
        assert watches[0].look(now, {rank: record(beat, pid=rank) for rank in here.ranks}) is None
        busy = {2: record(beat, pid=2, operation=COMPUTING, turns=beat // 15), 3: record(beat, pid=3)}
        assert watches[1].look(now, busy) is None


def test_nobody_is_spared_when_all_wait_for_each_other() -> None:
    found = watched(10, everyone)
    assert found is not None and found[1].processes == {rank: 100 + rank for rank in range(RANKS)}


@given(st.lists(st.floats(0.05, 1.9), min_size=1, max_size=20))
def test_steps_below_the_limit_are_no_hang(durations: list[float]) -> None:
    ends = [sum(durations[: n + 1]) for n in range(len(durations))]

    def readings(beat: int) -> Readings:
        return everyone(beat, step=sum(end <= 0.1 * beat for end in ends))

    assert watched(ends[-1], readings) is None


def test_a_step_that_has_grown_is_no_hang_while_some_rank_comes_further() -> None:
    def readings(beat: int) -> Readings:
        return everyone(beat) | {1: record(beat, pid=101, operation=COMPUTING, turns=beat // 15)}

    assert watched(60, readings) is None


def test_what_is_no_step_or_has_no_measure_yet_is_no_hang() -> None:
    assert watched(60, lambda beat: everyone(3, stepping=False)) is None
    assert watched(60, lambda beat: everyone(3, median_step_seconds=None)) is None


def test_a_watch_that_was_stopped_with_the_ranks_blames_nobody() -> None:
    watch = Watch(10.0, state_of=at_work)
    assert watched(1, everyone, watch=watch) is None
    # The machine slept for an hour; then all go on.
    for look in range(10):
        assert watch.look(3600 + look * LOOK_SECONDS, everyone(10 + look)) is None
    assert 10 * LOOK_SECONDS + LONGEST_GAP_SECONDS < 1.0


def test_the_board_has_what_a_rank_does() -> None:
    with Board(2) as board:
        assert board.read(range(2)) is None, "nobody has written yet"
        first, second = Activity(0), Activity(1)
        for rank, activity in enumerate((first, second)):
            BoardRecord(board.path, rank).write(json.dumps(activity.record(1)))
        second.computes("F1.0")
        with second.in_step(5), second.waiting("dispatch", range(1000)):
            BoardRecord(board.path, 1).write(json.dumps(second.record(2)))
        readings = board.read(range(2))
        assert readings is not None
        assert readings[0]["operation"] == COMPUTING and not readings[0]["stepping"]
        assert (readings[1]["operation"], readings[1]["turns"], readings[1]["step"]) == ("dispatch", 2, 5)
        assert readings[1]["stepping"] and readings[1]["pid"] == os.getpid()
        assert list(board.read(range(6, 7)) or ()) == [6], "a smaller layout has fewer ranks on a node"
        assert board.watched(10.0, range(2))(0.0) is None and board.read(range(2)) is None, (
            "cleared for the next attempt"
        )
