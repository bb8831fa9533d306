"""What a soak draws, when its faults strike, and what it reads from the events of a run."""

import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.drills import inject
from launch.drills.drive import Attempt
from launch.drills.fault import Action, Fault, Plan, Point
from launch.drills.soak import FIRST_STEP, GAP_SECONDS, Late, Ran, _not_named, _taken_again, draw_faults, judge
from launch.drills.verdict import Ending
from launch.run_folder import RunFolder

BEGAN = 1_000_000.0


@given(st.integers(0, 2**31), st.integers(1, 64), st.floats(60, 2000), st.floats(0.05, 30))
def test_faults_are_drawn_at_any_rank_as_far_apart_as_they_shall_be(
    seed: int, ranks: int, seconds: float, step_seconds: float
) -> None:
    faults = draw_faults(random.Random(seed), ranks, seconds, step_seconds)
    assert faults == draw_faults(random.Random(seed), ranks, seconds, step_seconds)
    least, most = GAP_SECONDS
    for fault in faults:
        assert least <= fault.wait_seconds <= max(least + 1, most - step_seconds), "and a step until it is at its point"
        assert 0 <= fault.rank < ranks
    assert sum(fault.wait_seconds for fault in faults) >= seconds, "there are enough of them"
    assert len(set(faults)) == len(faults), "each has a mark of its own"


@given(
    st.lists(st.floats(1, 50), min_size=1, max_size=4, unique=True),
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 30), st.booleans()), max_size=60),
)
def test_a_fault_strikes_at_its_point_once_its_time_has_come_and_steps_were_taken(
    waits: list[float], passes: list[tuple[int, float, bool]]
) -> None:
    """A rank passes the point of all its faults again and again, each time so many steps and seconds later; in some
    cases the ranks were started anew in between. What has struck is compared with the rule, told once more."""
    faults = tuple(Fault(Action.KILL, 0, FIRST_STEP, Point.REDUCE, wait_seconds=wait) for wait in waits)
    struck: list[float] = []
    wanted: list[float] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        plan, now, step, started = Plan(Path(folder, "plan.json"), faults), BEGAN, 1, 1
        patch.setattr(inject.time, "time", lambda: now)
        patch.setattr(inject, "_act", lambda action, here: struck.append(now))
        plan.forwards.write_text(f"{BEGAN!r}\n{BEGAN + 7!r}\n")

        def start() -> Any:
            worker = SimpleNamespace(end=SimpleNamespace(reduce=lambda: None))
            here = inject._Here(0, cast(Any, worker), None, Path(folder), lambda: step, lambda: True)
            for fault in reversed(faults):  # wrapped later, asked earlier: the first of the plan first
                inject._arm(fault, plan, here)
            return worker.end

        end = start()
        end.reduce()
        for steps, seconds, again in passes:
            step, now = step + steps, now + seconds
            if again:
                started, end = step, start()
            end.reduce()
            while len(wanted) < len(faults) and step - started + 1 >= FIRST_STEP:
                if now < (wanted[-1] if wanted else BEGAN) + faults[len(wanted)].wait_seconds:
                    break
                wanted.append(now)
        assert struck == wanted
        plan.spared.touch()
        step, now = step + FIRST_STEP, now + 1000
        end.reduce()
        assert struck == wanted, "nothing strikes once the run is spared"


def test_a_soak_tells_how_far_apart_faults_were_and_what_made_one_late(tmp_path: Path) -> None:
    kinds = (Action.KILL, Action.HANG, Action.STOP, Action.KILL)
    faults = tuple(Fault(kind, 0, FIRST_STEP, Point.FORWARD, wait_seconds=20.0 + n) for n, kind in enumerate(kinds))
    folder = RunFolder(cast(Any, SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)))))
    struck, forwards = [BEGAN + 20, BEGAN + 45, BEGAN + 95, None], [BEGAN, BEGAN + 22, BEGAN + 85, BEGAN + 99]
    attempt = Attempt(BEGAN, BEGAN + 100, None, 143, 0, "")
    soaked = judge(Ran(folder, attempt, faults, struck, forwards, []), Ending([], [], None))
    assert dict(soaked.faults) == {"kill": 1, "hang": 1, "stop": 1}
    assert soaked.gaps_s == [25, 50] and soaked.late == [Late(50.0, "hang", 40.0)]
    told = soaked.as_dict()
    assert told["fault_gaps_s"] == {"least": 25.0, "median": 37.5, "most": 50.0}
    assert told["late_faults"] == [{"gap_s": 50.0, "after": "hang", "forward_s": 40.0}]


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
    assert _not_named([(fault, when)], [{**told, "rank": 1}]) == ["kill of rank 2 at forward was not named"]
    assert len(_not_named([(fault, when)], [])) == 2
    assert _not_named([(fault, when)], [told, told]) == ["2 failures were told of, and 1 happened"]
