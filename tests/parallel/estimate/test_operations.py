"""Operations against DeepSeek's public training trace (profile-data, train.json), from whose products and small kernels
the rates of ``h800.yaml`` are: what comes out again must be what went in, and the pair must follow from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe import overlap
from dualpipe.overlap import PARTS, Phase
from dualpipe.program import Op
from parallel.estimate.operations import EndCost, Operations
from parallel.estimate.stages import (
    StageCost,
    hidden_fraction,
    pair_seconds,
    pair_timeline,
    stage_costs,
    stage_layers,
)
from parallel.estimate.workload import Workload, routes
from parallel.mesh import Layout
from tests.parallel.estimate.published import H800, PUBLISHED, smaller

F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741

# Mean span of a phase over the trace's four layers, microseconds.
TRACE = {
    (Phase.ATTENTION, F): 4598.8,
    (Phase.DISPATCH, F): 6737.5,
    (Phase.MLP, F): 4641.2,
    (Phase.COMBINE, F): 8695.8,
    (Phase.COMBINE, I): 5784.0,
    (Phase.MLP, I): 5363.0,
    (Phase.DISPATCH, I): 7558.2,
    (Phase.ATTENTION, I): 9540.2,
    (Phase.MLP, W): 5072.8,
    (Phase.ATTENTION, W): 2395.8,
}
# Some single products of the trace, microseconds: [outputs, inputs] for 4096 tokens.
PRODUCTS = {
    "q_a": (103.5, 111.0, 136.2),
    "q_b": (371.5, 332.0, 462.0),
    "kv_a": (53.2, 64.8, 69.8),
    "kv_b": (244.2, 220.0, 221.5),
    "o": (900.8, 927.0, 1499.0),
}


def test_every_phase_of_a_layer_is_within_five_percent_of_the_trace() -> None:
    layer = Operations(PUBLISHED, H800).layer(moe=True)
    assert {part: seconds * 1e6 for part, seconds in layer.items()} == pytest.approx(TRACE, rel=0.05)


def test_every_product_of_attention_is_within_five_percent_of_the_trace() -> None:
    operations = Operations(PUBLISHED, H800)
    for name, matrix in operations.attention_matrices().items():
        ways = (operations.forward, operations.backward_input, operations.backward_weight)
        assert [way(matrix, 4096) * 1e6 for way in ways] == pytest.approx(PRODUCTS[name], rel=0.05), name
    core = [operations.core(op) * 1e6 for op in (F, I)]
    assert core == pytest.approx([1237.0, 3778.8 + 475.5], rel=0.05)


def test_the_overlapped_pair_follows_from_its_phases() -> None:
    stages = stage_costs(Operations(PUBLISHED, H800), stage_layers(PUBLISHED, 16))
    assert pair_seconds(stages[5], stages[5]) == pytest.approx(0.129012, rel=0.03)
    hidden = hidden_fraction(pair_timeline(stages[5], stages[5])) * H800.computing_busy
    assert hidden == pytest.approx(0.963, abs=0.02)


@given(
    st.lists(st.floats(0, 10), min_size=len(PARTS), max_size=len(PARTS)),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_with_equal_layers_a_stage_takes_what_the_overlap_plan_takes(
    seconds: list[float], forward: int, backward: int
) -> None:
    durations = dict(zip(PARTS, seconds, strict=True))
    one, other = (StageCost((durations,) * layers, EndCost()) for layers in (forward, backward))
    plan = overlap.pair_plan(forward, backward)
    assert pair_timeline(one, other) == overlap.timeline(plan, durations)
    assert one.alone == {op: overlap.duration(overlap.plan(op, forward), durations) for op in Op}


def test_a_forward_meets_the_first_layer_first_and_a_backward_the_last() -> None:
    stage = StageCost(tuple(dict.fromkeys(PARTS, float(length)) for length in (1, 2, 3)), EndCost())
    met: dict[Op, list[float]] = {F: [], I: [], W: []}
    for timed in pair_timeline(stage, stage):
        if timed.piece.phase is Phase.ATTENTION:
            met[timed.piece.op].append(timed.end - timed.start)
    assert met == {F: [1, 2, 3], I: [3, 2, 1], W: [3, 2, 1]}


def test_a_pair_is_no_shorter_than_its_longer_stream_and_no_longer_than_its_halves() -> None:
    stages = stage_costs(Operations(PUBLISHED, H800), stage_layers(PUBLISHED, 16))
    for one, other in ((stages[0], stages[15]), (stages[15], stages[0]), (stages[3], stages[12])):
        alone = one.alone[F] + other.alone[Op.BACKWARD]
        computing = sum(
            seconds
            for stage, ops in ((one, (F,)), (other, (I, W)))
            for layer in stage.layers
            for (phase, op), seconds in layer.items()
            if op in ops and phase in (Phase.ATTENTION, Phase.MLP)
        )
        assert computing < pair_seconds(one, other) < alone


def test_a_token_meets_as_many_nodes_as_the_router_lets_it() -> None:
    # At most four of eight nodes, and nearly all of those; without the limit 8 (1 - C(224,8) / C(256,8)).
    limited, free = routes(256, 8, 8, 4, 64, 8), routes(256, 8, 8, 8, 64, 8)
    assert 3.9 < limited.nodes <= 4
    assert free.nodes == pytest.approx(5.29, abs=0.05)
    assert limited.remote_nodes == pytest.approx(limited.nodes * 7 / 8)
    assert routes(256, 8, 8, 4, 1, 1) == (1.0, 1.0, 0.0, 0.0)


def test_one_rank_owns_all_experts_and_exchanges_nothing() -> None:
    alone = smaller(layout=Layout(pipeline=4, data=64, expert=1))
    layer = Operations(alone, H800).layer(moe=True)
    assert layer[Phase.DISPATCH, F] == layer[Phase.COMBINE, I] == 0.0


@pytest.mark.parametrize("imbalance", [1.0, 1.5])
def test_imbalance_lengthens_experts_and_exchanges_in_proportion(imbalance: float) -> None:
    def dispatched(workload: Workload) -> float:
        wait = (H800.dispatch_forward_skew_us + H800.latency_us) * 1e-6
        return Operations(workload, H800).exchange((Phase.DISPATCH, F)) - wait

    assert dispatched(smaller(imbalance=imbalance)) == pytest.approx(imbalance * dispatched(smaller()))
