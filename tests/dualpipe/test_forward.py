"""The forward pass of validation: for every schedule, as short as any, and over the stages of the training step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import Kind, Op, Program, Send, computed
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.schedules.forward import forward_only
from dualpipe.simulate import simulate
from dualpipe.validate import validate
from tests.dualpipe.test_schedules import draw_order


def channels(program: Program) -> set[tuple[int, int, Kind]]:
    return {
        (rank, slot.peer, slot.message.kind)
        for rank, slots in enumerate(program.slots)
        for slot in slots
        if isinstance(slot, Send)
    }


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_forward_pass_is_valid_for_any_number_of_micro_batches(data: st.DataObject) -> None:
    order = draw_order(data)
    microbatches = len(order.routes) * data.draw(st.integers(1, 9), "micro-batches of a route")
    program = forward_only(order, microbatches)
    assert (program.routes, program.microbatches) == (order.routes, microbatches)
    assert all(c.op is Op.FORWARD for slots in program.slots for slot in slots for c in computed(slot))
    lowered = lower(program, data.draw(st.integers(1, 3), "window"))
    validate(lowered)
    assert channels(lowered) <= channels(lower(order))  # what communicators were made for
    assert max(simulate(lowered, Costs()).peak_activations) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_forward_pass_is_as_short_as_any(schedule: str, ranks: int) -> None:
    order = generate(schedule, ranks, 4 * ranks)
    for groups in (1, 3):
        microbatches = groups * 2 * ranks
        # The rank that gets its first forward last, or gives its last one away first, runs all of its own in between.
        work = microbatches * order.stages // ranks
        away = {"dualpipe": max(ranks - 2, 0), "dualpipev": 2 * (ranks - 1), "zbv": 2 * (ranks - 1)}
        makespan = simulate(lower(forward_only(order, microbatches)), Costs(1, 1, 1)).makespan
        assert makespan == work + away.get(schedule, ranks - 1)


def test_routes_share_the_micro_batches_evenly() -> None:
    for microbatches in (0, 3):
        with pytest.raises(ValueError, match=f"microbatches={microbatches} .* must be a positive multiple of 2"):
            forward_only(generate("dualpipe", 4, 8), microbatches)
