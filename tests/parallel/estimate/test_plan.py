"""Plans: the published run, sums that must hold, and what more or less of something must do."""

from dataclasses import asdict, replace
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import Recompute
from parallel.estimate.fit import DoesNotFit, check
from parallel.estimate.hardware import Cluster
from parallel.estimate.memory import layer_activation_bytes
from parallel.estimate.plan import Plan, make_plan
from parallel.estimate.run import faults
from parallel.estimate.search import ClosedForm, layouts, search
from parallel.estimate.workload import SELECTIVE, Precision, Workload, recomputes
from parallel.mesh import Layout
from tests.parallel.estimate.published import H800, PUBLISHED, RUN, smaller

SHALLOW = replace(PUBLISHED.model, num_hidden_layers=8)


@pytest.fixture(scope="module")
def published() -> Plan:
    return make_plan(PUBLISHED, H800, RUN)


def test_the_published_hours_of_deepseek_v3(published: Plan) -> None:
    """180K H800 hours per trillion tokens (DeepSeek-V3 report, 1), within 3 %."""
    assert published.gpu_hours_per_trillion_tokens == pytest.approx(180e3, rel=0.03)
    assert published.fits  # it ran


def test_ranks_count_the_same_operations_as_the_published_schedule(published: Plan) -> None:
    """97 + h pairs on rank h of the outer half, 103 in the middle, whose first pair is apart; 120 of each in all."""
    pairs = [counts["FB"] for counts in published.result.operations]
    assert pairs[:8] == [97, 98, 99, 100, 101, 102, 103, 103]
    assert pairs[8:] == pairs[7::-1]


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "gpipe", "1f1b", "interleaved", "zb1p", "zbv"])
def test_the_seconds_of_every_rank_add_up_to_the_step(schedule: str) -> None:
    plan = make_plan(smaller(schedule=schedule), H800, RUN)
    for rank in plan.seconds:
        assert sum(asdict(rank).values()) == pytest.approx(plan.step_seconds)
        assert min(asdict(rank).values()) >= 0
    assert sum(plan.to_json()["bubble_by_cause"].values()) == pytest.approx(
        sum(rank.bubble_s for rank in plan.seconds) / 4
    )


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(["dualpipe", "1f1b", "zb1p"]), st.lists(st.sampled_from([8, 10, 12, 14]), min_size=1, unique=True)
)
def test_a_ramp_costs_what_its_steps_do(schedule: str, levels: list[int]) -> None:
    workload = smaller(schedule=schedule, microbatches=16)
    ramp = tuple((3, 64 * microbatches) for microbatches in levels)
    plan = make_plan(workload, H800, replace(RUN, steps=100, ramp=ramp))
    steps = [make_plan(replace(workload, microbatches=m), H800, RUN).step_seconds for m in levels]
    # The fewest micro-batches that DualPipe runs are just below the line through the others.
    expected = 3 * sum(steps) + (100 - 3 * len(levels)) * plan.step_seconds
    assert plan.run_seconds == pytest.approx(expected, rel=2e-4)
    assert plan.gpu_hours == pytest.approx(expected * 256 / 3600, rel=2e-4)
    full = plan.run.in_full_batches(1024)
    tokens = sum(3 * 64 * m for m in levels) + (100 - 3 * len(levels)) * 1024
    assert full.ramp == () and 0 <= full.steps * 1024 - tokens < 1024


SLOWER = st.sampled_from(["nvlink_gb_per_s", "ib_gb_per_s", "memory_gb_per_s", "bf16_tflops", "fp8_tflops"])


@settings(max_examples=25, deadline=None)
@given(SLOWER, st.floats(0.05, 1.0), st.sampled_from([8, 64]), st.sampled_from(["dualpipe", "1f1b", "zbv"]))
def test_less_of_a_rate_never_makes_a_step_faster(key: str, share: float, expert: int, schedule: str) -> None:
    workload = smaller(layout=Layout(pipeline=4, data=64, expert=expert), schedule=schedule)
    slower = replace(H800, **{key: getattr(H800, key) * share})
    assert _step(workload, slower) >= _step(workload, H800) * (1 - 1e-12)


@settings(max_examples=10, deadline=None)
@given(st.floats(1.0, 4.0))
def test_imbalance_and_waiting_never_make_a_step_faster(factor: float) -> None:
    waiting = replace(H800, combine_forward_skew_us=H800.combine_forward_skew_us * factor)
    assert _step(smaller(imbalance=factor), H800) >= _step(smaller(), H800)
    assert _step(smaller(), waiting) >= _step(smaller(), H800)


def test_more_memory_never_makes_fewer_layouts_feasible() -> None:
    workload = smaller(model=SHALLOW, layout=Layout(pipeline=4, data=4, expert=4), microbatches=8)
    feasible: set[Workload] = set()
    closed = ClosedForm(H800)
    for size in (150.0, 300.0, 600.0):
        found = search(workload, replace(H800, memory_gb=size), RUN, simulated=0)
        every = list(layouts(workload, 8))
        assert found.tried == len(every) == len(set(every))
        larger = {candidate.workload for candidate in found.candidates}
        usable = size * 1e9 * H800.usable_memory
        assert larger == {each for each in every if closed.memory_bytes(each) <= usable}  # none is left out unseen
        assert feasible <= larger
        feasible = larger
    assert feasible


def test_the_search_finds_no_layout_slower_than_the_one_given() -> None:
    given = smaller(model=SHALLOW, layout=Layout(pipeline=4, data=4, expert=4), microbatches=16)
    found = search(given, replace(H800, memory_gb=600.0), RUN, simulated=3)
    assert found.plans[0].step_seconds <= _step(given, H800)
    assert found.plans == sorted(found.plans, key=lambda plan: plan.step_seconds)
    closed = {candidate.workload: candidate.step_seconds for candidate in found.candidates}
    for plan in found.plans:
        assert plan.step_seconds == pytest.approx(closed[plan.workload], rel=0.2)


@pytest.mark.parametrize(("schedule", "chunks"), [("interleaved", 3), ("zbv", None), ("gpipe", None)])
@pytest.mark.parametrize("recompute", [(), "full"])
def test_closed_form_and_plan_hold_the_same(schedule: str, chunks: int | None, recompute: Recompute) -> None:
    workload = smaller(schedule=schedule, chunks=chunks, microbatches=20).recomputing(recompute)
    plan = make_plan(workload, H800, RUN)
    assert ClosedForm(H800).memory_bytes(workload) == pytest.approx(plan.memory[plan.fullest_rank].total, rel=1e-12)


def test_making_all_again_saves_memory_and_takes_the_forward_once_more() -> None:
    none, selective, full = (make_plan(smaller().recomputing(policy), H800, RUN) for policy in ((), SELECTIVE, "full"))
    for cheaper, dearer in ((full, selective), (selective, none)):
        assert all(a.activations < b.activations for a, b in zip(cheaper.memory, dearer.memory, strict=True))
    assert none.step_seconds < full.step_seconds < none.step_seconds * 4 / 3


def test_more_than_a_thousand_layouts_a_second_are_ranked() -> None:
    """In CPU time; of the published run's layouts more than 500 fit, and some of them leave spare nodes."""
    start = process_time()
    found = search(PUBLISHED, H800, RUN, simulated=0)
    assert found.tried / (process_time() - start) > 1000
    assert len(found.candidates) >= 500
    used = {c.workload.layout.world_size for c in found.candidates}
    assert max(used) == 2048 and 1920 <= min(used) < 2048
    ways = {(c.workload, c.workload.hierarchical): c.step_seconds for c in found.candidates}
    flat = [(w, step) for (w, hierarchical), step in ways.items() if not hierarchical]
    assert all(
        step >= ways[replace(w, hierarchical=True), True] for w, step in flat
    )  # no token has more nodes than ranks


@pytest.mark.parametrize(("precision", "count"), [("fp8", 5), ("bf16", 9)])
def test_a_search_tries_every_recomputation_that_keeps_something_else(precision: Precision, count: int) -> None:
    """In FP8, whose layers make SwiGLU's output again anyway, three of them would be another's copy."""
    policies = recomputes(precision)
    assert len(policies) == len(set(policies)) == count
    kept = {layer_activation_bytes(smaller(precision=precision).recomputing(policy), True) for policy in policies}
    assert len(kept) == count
    own = smaller(precision=precision).recomputing(SELECTIVE)
    assert layer_activation_bytes(own, True) in kept


def test_a_layout_that_does_not_fit_says_where_by_how_much_and_what_would_help() -> None:
    """Of the policies that fit the fastest; every other schedule that fits is slower than that."""
    workload, cluster = smaller(precision="bf16").recomputing(()), replace(H800, memory_gb=250.0)
    plan = make_plan(workload, cluster, RUN)
    need, usable = plan.memory[plan.fullest_rank].total / 1e9, plan.usable_bytes / 1e9
    with pytest.raises(DoesNotFit) as refused:
        check(plan)
    assert f"pipeline rank {plan.fullest_rank} needs {need:.1f} GB, {need - usable:.1f} GB more" in str(refused.value)
    remedies = [make_plan(workload.recomputing(policy), cluster, RUN) for policy in recomputes("bf16")]
    fastest = min((other for other in remedies if other.fits), key=lambda other: other.step_seconds)
    policy = ",".join(fastest.workload.model.recompute)
    assert f"with model.recompute=[{policy}] it fits" in str(refused.value)


@given(st.floats(1.0, 1e5), st.integers(1, 1 << 15))
def test_no_interval_between_checkpoints_beats_the_computed_one(interval: float, gpus: int) -> None:
    assert faults(H800, gpus, interval).effective_fraction <= faults(H800, gpus, None).effective_fraction + 1e-12


@given(st.integers(1, 1 << 14))
def test_more_gpus_train_a_smaller_share_of_the_time(gpus: int) -> None:
    assert faults(H800, 2 * gpus, None).effective_fraction < faults(H800, gpus, None).effective_fraction


def _step(workload: Workload, cluster: Cluster) -> float:
    return make_plan(workload, cluster, RUN).step_seconds
