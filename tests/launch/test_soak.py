"""What a soak draws, and what it reads from the events of a run."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from launch.drills.fault import Action, Fault, Point
from launch.drills.soak import FEWEST_STEPS_BETWEEN, GAP_SECONDS, _not_named, _taken_again, draw_faults


@given(st.integers(0, 2**31), st.integers(1, 64), st.floats(60, 2000), st.floats(0.05, 20))
def test_faults_are_drawn_at_any_rank_as_far_apart_as_they_shall_be(
    seed: int, ranks: int, seconds: float, step_seconds: float
) -> None:
    faults = draw_faults(random.Random(seed), ranks, seconds, step_seconds)
    assert faults == draw_faults(random.Random(seed), ranks, seconds, step_seconds)
    steps = [0, *(fault.step for fault in faults)]
    least, most = (max(FEWEST_STEPS_BETWEEN, gap / step_seconds) for gap in GAP_SECONDS)
    for before, after in pairwise(steps):
        assert least - 1 <= after - before <= most + 1, "rounded to whole steps"
    assert steps[-1] + most + 1 > seconds / step_seconds, "there are enough of them"
    assert all(0 <= fault.rank < ranks for fault in faults)


def test_steps_are_lost_between_a_failure_and_where_the_run_went_on() -> None:
    resumed, failed = {"event": "resume", "step": 3}, {"event": "failure", "step": 5}
    assert _taken_again([{"event": "resume", "step": 0}, failed]) == 0
    assert _taken_again([failed, {"event": "resume", "step": 5}, failed, {"event": "recovery"}, resumed]) == 2


def test_a_fault_that_the_run_does_not_tell_of_with_its_rank_is_a_problem() -> None:
    fault = Fault(Action.KILL, 2, 7, Point.FORWARD)
    told = {
        "event": "failure",
        "time": "2026-01-01T00:00:10.000+00:00",
        "rank": 2,
        "cause": "rank 2 was ended by SIGKILL",
    }
    when = 1767225609.5
    assert _not_named([(fault, when)], [told]) == []
    assert _not_named([(fault, when)], [{**told, "rank": 1}]) == ["KILL of rank 2 in step 7 was not named"]
    assert len(_not_named([(fault, when)], [])) == 2
    assert _not_named([(fault, when)], [told, told]) == ["2 failures were told of, and 1 happened"]
