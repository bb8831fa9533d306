"""The inside of an operation: what a plan holds, in which order it can be issued, and how long it takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.overlap import (
    PAIR,
    PARTS,
    STREAM_OF,
    Part,
    Phase,
    Piece,
    Stream,
    duration,
    needs,
    pair_plan,
    plan,
    timeline,
)
from dualpipe.program import Op

durations = st.fixed_dictionaries({part: st.integers(0, 9) for part in PARTS})
layers = st.integers(0, 4)

# Milliseconds of one layer, means over the four layers of DeepSeek's published trace of an overlapped pair on an H800
# (github.com/deepseek-ai/profile-data, train.json at 4496024; EP64, 4096 tokens): each phase's span.
TRACE_MS: dict[Part, float] = {
    (Phase.ATTENTION, Op.FORWARD): 4.599,
    (Phase.DISPATCH, Op.FORWARD): 6.738,
    (Phase.MLP, Op.FORWARD): 4.641,
    (Phase.COMBINE, Op.FORWARD): 8.696,
    (Phase.COMBINE, Op.BACKWARD_INPUT): 5.784,
    (Phase.MLP, Op.BACKWARD_INPUT): 5.363,
    (Phase.DISPATCH, Op.BACKWARD_INPUT): 7.559,
    (Phase.ATTENTION, Op.BACKWARD_INPUT): 9.540,
    (Phase.MLP, Op.BACKWARD_WEIGHT): 5.073,
    (Phase.ATTENTION, Op.BACKWARD_WEIGHT): 2.396,
}
TRACE_PAIR_MS = 129.012


def longest(pieces: tuple[Piece, ...], costs: dict[Part, float]) -> float:
    """The definition of a critical path: the longest chain of pieces, by need or by order on a stream."""

    def until(index: int) -> float:
        piece = pieces[index]
        before = [
            i for i in range(index) if pieces[i] == needs(piece) or STREAM_OF[pieces[i].phase] is STREAM_OF[piece.phase]
        ]
        return costs[piece.phase, piece.op] + max((ends[i] for i in before), default=0)

    ends: list[float] = []
    for index in range(len(pieces)):
        ends.append(until(index))
    return max(ends, default=0)


@given(layers, layers, durations)
def test_a_pair_takes_its_critical_path(forward: int, backward: int, costs: dict[Part, float]) -> None:
    pieces = pair_plan(forward, backward)
    assert duration(pieces, costs) == longest(pieces, costs)


@given(layers, layers, durations)
def test_a_pair_is_its_two_halves_and_no_faster_than_either_nor_slower_than_both(
    forward: int, backward: int, costs: dict[Part, float]
) -> None:
    alone = plan(Op.FORWARD, forward), plan(Op.BACKWARD, backward)
    pair = pair_plan(forward, backward)
    assert sorted(map(str, pair)) == sorted(map(str, alone[0] + alone[1]))
    each = [duration(pieces, costs) for pieces in alone]
    assert max(each) <= duration(pair, costs)
    assert duration(pair, costs) <= sum(costs[piece.phase, piece.op] for piece in pair)


@given(layers, layers)
def test_a_plan_can_be_issued_from_top_to_bottom(forward: int, backward: int) -> None:
    for pieces in (pair_plan(forward, backward), *(plan(op, forward) for op in Op)):
        done: set[Piece] = set()
        lone_weights = all(piece.op is Op.BACKWARD_WEIGHT for piece in pieces)
        for piece in pieces:
            assert lone_weights or needs(piece) is None or needs(piece) in done
            done.add(piece)
        assert len(done) == len(pieces)


def test_a_full_backward_is_its_two_parts() -> None:
    for count in range(4):
        parts = plan(Op.BACKWARD_INPUT, count) + plan(Op.BACKWARD_WEIGHT, count)
        assert sorted(map(str, plan(Op.BACKWARD, count))) == sorted(map(str, parts))


def test_the_streams_take_the_pieces_in_the_published_order() -> None:
    names = {
        stream: [f"{phase.value}({'B' if op is Op.BACKWARD_INPUT else op.value})" for phase, op in PAIR
                 if STREAM_OF[phase] is stream]
        for stream in Stream
    }  # fmt: skip
    assert names[Stream.COMMUNICATION] == ["combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"]
    assert names[Stream.COMPUTE] == ["attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"]


def test_with_equal_phases_communication_hides_behind_computation() -> None:
    # Compute is six phases of 1; each transfer of 1 starts and ends beside one of them.
    timed = {
        timed.piece[:2]: (timed.start, timed.end) for timed in timeline(pair_plan(1, 1), dict.fromkeys(PARTS, 1.0))
    }
    assert timed[Phase.COMBINE, Op.BACKWARD_INPUT] == timed[Phase.ATTENTION, Op.FORWARD] == (0, 1)
    assert timed[Phase.DISPATCH, Op.FORWARD] == timed[Phase.MLP, Op.BACKWARD_INPUT] == (1, 2)
    assert timed[Phase.DISPATCH, Op.BACKWARD_INPUT] == timed[Phase.MLP, Op.BACKWARD_WEIGHT] == (2, 3)
    assert timed[Phase.COMBINE, Op.FORWARD] == timed[Phase.ATTENTION, Op.BACKWARD_INPUT] == (4, 5)
    assert timed[Phase.ATTENTION, Op.BACKWARD_WEIGHT] == (5, 6)


def test_the_plan_takes_as_long_as_the_published_trace() -> None:
    # The trace's phases differ a little from layer to layer, and the plan takes their means: 1.1 % apart.
    assert duration(pair_plan(4, 4), TRACE_MS) == pytest.approx(TRACE_PAIR_MS, rel=0.015)
    alone = duration(plan(Op.FORWARD, 4), TRACE_MS) + duration(plan(Op.BACKWARD, 4), TRACE_MS)
    assert alone > 1.6 * TRACE_PAIR_MS
