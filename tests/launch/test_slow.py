"""A slow rank is told from others by its times, and not for a step or two, nor over and over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.lower import lower
from dualpipe.schedules import generate
from launch.slow import FEWEST_STEPS, WINDOW_STEPS, Change, SlowRanks
from parallel.activity import Activity
from parallel.compute_time import HostComputeTime
from parallel.mesh import Layout
from parallel.worker import alike

FOUR_ALIKE = [[other for other in range(4) if other != rank] for rank in range(4)]
ALONE: list[list[int]] = [[], [], [], []]
NOISE = st.lists(st.floats(0.9, 1.1), min_size=4, max_size=4)


def changes(slow: SlowRanks, steps: list[list[float]]) -> list[tuple[int, Change]]:
    return [(step, change) for step, seconds in enumerate(steps) for change in slow.add(seconds)]


@given(st.lists(NOISE, min_size=12, max_size=30), st.integers(0, 3), st.floats(2.0, 10.0), st.integers(1, 5))
def test_the_slow_rank_is_named_within_a_few_steps_and_nobody_else(
    noise: list[list[float]], rank: int, times: float, begins: int
) -> None:
    steps = [
        [s * (times if r == rank and step >= begins else 1) for r, s in enumerate(of)] for step, of in enumerate(noise)
    ]
    ((when, change),) = changes(SlowRanks(1.5, FOUR_ALIKE), steps)
    assert (change.rank, change.slow) == (rank, True)
    assert begins + 1 <= when <= begins + WINDOW_STEPS // 2 + 1
    assert 1.5 <= change.times < 1.25 * times, "of the steps before, some are in the median"


@given(st.lists(NOISE, min_size=4, max_size=30))
def test_noise_and_single_steps_are_not_reported(noise: list[list[float]]) -> None:
    for step in range(0, len(noise), WINDOW_STEPS):
        noise[step][1] *= 20
    assert not changes(SlowRanks(1.5, FOUR_ALIKE), noise)
    assert not changes(SlowRanks(0.0, FOUR_ALIKE), [[1.0, 9.0, 1.0, 1.0]] * 20), "nobody asked"


def test_a_rank_at_the_border_is_reported_once_and_its_recovery_too() -> None:
    border = [[1.0, 1.0, 1.0, seconds] for seconds in (1.0, *[1.6] * 6, *[1.3] * 6, *[1.6] * 6, *[1.0] * 6)]
    (_, first), (_, second) = changes(SlowRanks(1.5, FOUR_ALIKE), border)
    assert (first.rank, first.slow, second.rank, second.slow) == (3, True, 3, False)
    assert str(first) == "rank 3 is slow: it computes 1.6 times as long as it should, 1.6 s a step"


def test_who_has_more_to_do_than_others_is_measured_against_itself() -> None:
    usual, slow = [1.0, 3.0, 1.0, 1.0], [1.0, 6.0, 1.0, 1.0]
    assert not changes(SlowRanks(1.5, ALONE), [usual] * 20)
    ((when, change),) = changes(SlowRanks(1.5, ALONE), [usual] * 10 + [slow] * 10)
    assert (change.rank, change.times) == (1, 2.0) and when == 10 + WINDOW_STEPS // 2
    grown = [[2 * s for s in usual]] * 10
    assert not changes(SlowRanks(1.5, ALONE), [usual] * 10 + grown), "the batch has grown, for all"
    assert FEWEST_STEPS <= WINDOW_STEPS


def test_ranks_that_hold_the_same_stages_are_compared() -> None:
    layout = Layout(pipeline=4, data=2)
    both_ways = lower(generate("dualpipe", 4, 8, None))
    assert alike(layout, both_ways)[1] == [0, 6, 7], "twins hold the same stages, and so do replicas"
    one_way = lower(generate("1f1b", 4, 8, None))
    assert alike(layout, one_way)[1] == [0] and alike(Layout(pipeline=4), one_way)[1] == []


def test_waiting_for_others_is_no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("parallel.compute_time.time.perf_counter", lambda: now)
    clock = HostComputeTime()
    activity = Activity(compute_time=clock)
    now = 1.0
    clock.begin()
    now = 3.0
    with activity.waiting("dispatch", [1]):
        now = 4.0
        with activity.waiting("dispatch", [1]):
            now = 7.0
    now = 7.5
    assert clock.seconds() == 2.5
