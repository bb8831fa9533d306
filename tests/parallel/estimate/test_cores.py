"""Ranks that share cores: the fluid picture, whose sums are known."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.estimate.hardware import Cluster
from parallel.estimate.plan import Plan, make_plan
from parallel.mesh import Layout
from tests.parallel.estimate.published import H800, RUN, smaller

SCHEDULES = st.sampled_from(["dualpipe", "1f1b", "zbv"])


def shared(cores: int, ranks: int = 8, **changes: float) -> Cluster:
    return replace(H800, cores_per_node=float(cores), ranks_per_node=float(ranks), **changes)


def plan(cluster: Cluster, schedule: str = "dualpipe", data: int = 2) -> Plan:
    return make_plan(smaller(layout=Layout(4, data, data), schedule=schedule), cluster, RUN)


def work(of: Plan) -> float:
    """Seconds of cores, of a plan whose ranks have one each."""
    return of.workload.layout.data * sum(of.step_seconds - rank.bubble_s for rank in of.seconds)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), SCHEDULES)
def test_a_step_is_no_shorter_than_its_work_over_the_cores_and_no_longer_than_both_bounds(
    cores: int, schedule: str
) -> None:
    apart, together = plan(shared(8), schedule), plan(shared(cores), schedule)
    least = max(apart.step_seconds, work(apart) / cores)
    assert least * (1 - 1e-9) <= together.step_seconds <= (apart.step_seconds + work(apart) / cores) * (1 + 1e-9)
    for rank in together.seconds:
        assert sum(asdict(rank).values()) == pytest.approx(together.step_seconds)
        assert min(asdict(rank).values()) >= -1e-12


def test_one_core_is_never_idle() -> None:
    assert plan(shared(1)).step_seconds == pytest.approx(work(plan(shared(8))), rel=0.01)


def test_cores_that_are_idle_now_and_then_stretch_what_they_share_alone() -> None:
    whole, idle = (plan(shared(1, cores_busy=busy)).step_seconds for busy in (1.0, 0.8))
    assert idle == pytest.approx(whole / 0.8, rel=0.01)
    assert plan(shared(8, cores_busy=0.8)).step_seconds == plan(shared(8)).step_seconds


def test_as_many_cores_as_ranks_change_nothing_but_where_communication_is() -> None:
    assert plan(shared(8)).step_seconds == pytest.approx(plan(shared(1000)).step_seconds)
    # Nothing hides on a core: every second of an exchange is in the operations.
    assert plan(shared(8)).step_seconds > plan(replace(H800, ranks_per_node=8.0)).step_seconds


def test_ranks_of_another_node_have_cores_of_their_own() -> None:
    links = {"ib_gb_per_s": 1e6, "nvlink_gb_per_s": 1e6}  # so that another node costs nothing
    assert plan(shared(2, 4, **links)).step_seconds < 0.6 * plan(shared(2, 8, **links)).step_seconds


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 7), SCHEDULES)
def test_fewer_cores_never_make_a_step_faster(cores: int, schedule: str) -> None:
    assert plan(shared(cores), schedule).step_seconds >= plan(shared(cores + 1), schedule).step_seconds * (1 - 1e-12)
