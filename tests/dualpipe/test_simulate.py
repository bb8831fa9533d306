"""The simulation: times worked out by hand and by their definition, bounds, and programs that are refused."""

from collections.abc import Iterator
from dataclasses import astuple, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs, CostTable
from dualpipe.dataflow import made, needed
from dualpipe.lower import lower
from dualpipe.program import (
    Compute,
    Free,
    Message,
    Overlap,
    Program,
    ProgramError,
    Send,
    Work,
    computed,
    dump,
    dump_slot,
    parse,
)
from dualpipe.schedules import SCHEDULES, check, generate
from dualpipe.schedules.dualpipe import dualpipe, dualpipe_bubble, dualpipe_peak
from dualpipe.schedules.forward import forward_only
from dualpipe.simulate import Simulation, simulate
from dualpipe.validate import Transport, validate
from tests.dualpipe.test_validate import VICTIMS, duplicates, moves, removals, strangers, swaps, with_row

CHAIN = parse("program chain stages=2 microbatches=2 routes=0,1\n0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 B1.0 F1.1 B1.1\n")


def times(result: Simulation, rank: int) -> list[tuple[str, float, float]]:
    return [(dump_slot(span.slot), span.start, span.end) for span in result.spans[rank]]


def test_times_worked_out_by_hand() -> None:
    # Rank 1 starts when A1.0 arrives at 2 + 1; its backward ends at 3 + 2 + 5 = 10, and G0.0 arrives at 11.
    result = simulate(lower(CHAIN, training=False), Costs(2, 3, 2, message=1))
    assert times(result, 0) == [("F0.0", 0, 2), ("F0.1", 2, 4), ("B0.0", 11, 16), ("B0.1", 18, 23)]
    assert times(result, 1) == [("F1.0", 3, 5), ("B1.0", 5, 10), ("F1.1", 10, 12), ("B1.1", 12, 17)]
    assert result.makespan == 23
    assert result.busy == (14, 14)
    assert result.bubble == (9, 9)
    assert result.bubble_fraction == pytest.approx(18 / 46)
    assert result.peak_activations == (2, 1)
    # Rank 0 waits from 4 to 10 for B1.0 and until 11 for its gradient, then from 16 to 17 and 18. Rank 1 is late by 3.
    assert list(map(astuple, result.bubble_by_cause)) == [(0, 7, 2, 0, 0), (3, 0, 0, 6, 0)]


def test_spans_say_what_they_waited_for() -> None:
    result = simulate(lower(CHAIN, training=False), Costs(2, 3, 2, message=1))
    first, _, backward, _ = result.spans[0]
    assert first.waited is None and first.inputs == ()
    assert backward.waited is not None
    assert (dump_slot(backward.waited.slot), backward.waited.peer, backward.waited.ready) == ("wait:G0.0<1", 1, 10)
    (crossing,) = backward.inputs
    assert (crossing.source, crossing.target, crossing.sent, crossing.arrival) == (1, 0, 10, 11)
    assert dump_slot(result.spans[1][crossing.maker].slot) == "B1.0"
    # B1.0 follows F1.0 at once, though F1.1's activation was there too.
    assert result.spans[1][1].waited is None


def test_the_end_of_the_step() -> None:
    # Rank 1's last backward ends at 9, rank 0's at 12: the step waits for rank 0's reduction, until 22.
    result = simulate(lower(CHAIN), Costs(1, 2, 1, reduce=10, step=4, gather=3))
    spans = {name: (start, end) for name, start, end in times(result, 1)}
    assert spans["reduce:1"] == (9, 19)
    assert spans["step"] == (22, 26)
    assert spans["gather:1"] == (26, 29)
    assert result.makespan == 29
    assert result.busy == (8, 8)
    assert [causes.step_end for causes in result.bubble_by_cause] == [17, 17]
    assert [causes.drain for causes in result.bubble_by_cause] == [0, 3]
    step = result.spans[1][-2]
    assert step.waited is not None and step.waited.peer == 0


def test_reductions_of_a_rank_follow_each_other() -> None:
    program = parse("program two stages=2 microbatches=1 routes=0,0\n0: F0.0 F1.0 B1.0 B0.0\n")
    spans = {name: (start, end) for name, start, end in times(simulate(lower(program), Costs(reduce=5)), 0)}
    assert (spans["reduce:1"], spans["reduce:0"], spans["step"]) == ((4, 9), (9, 14), (14, 14))


def test_a_message_waits_as_its_transport_makes_it_wait() -> None:
    # Rank 1 posts A1.1 only after F1.0, which ends at 1 + 1 + 1 = 3; rank 0 could send at 2.
    program = parse("program late stages=2 microbatches=2 routes=0,1\n0: F0.0 F0.1\n1: F1.0 F1.1\n")
    lowered = lower(program, window=1)
    row = list(lowered.slots[1])
    late = next(slot for slot in row if dump_slot(slot) == "recv:A1.1<0")
    row.remove(late)
    row.insert(row.index(Free(Work(1, 0))), late)
    lowered = Program(program.schedule, 2, program.routes, (lowered.slots[0], tuple(row)))
    costs = Costs(1, 1, 1, message=1)
    ends = {transport: simulate(lowered, costs, transport).makespan for transport in Transport}
    assert ends == {Transport.EAGER: 4, Transport.RENDEZVOUS: 5, Transport.STREAM: 5}


def test_messages_occupy_a_link_one_after_the_other() -> None:
    # Sent at 1 and 2, off the link at 1 + 5 and 6 + 5, there 2 later. An own link is free of that.
    program = lower(parse("program two stages=2 microbatches=2 routes=0,1\n0: F0.0 F0.1\n1: F1.0 F1.1\n"))
    slow = simulate(program, Costs(message=2, link=5))
    assert times(slow, 1) == [("F1.0", 8, 9), ("F1.1", 13, 14)]
    waited = slow.spans[1][1].waited
    assert waited is not None and waited.ready == 2
    own = simulate(program, Costs(message=2, link=5, at_link={("link", 0, 1): 0, ("message", 0, 1): 1}))
    assert times(own, 1) == [("F1.0", 2, 3), ("F1.1", 3, 4)]


def test_both_kinds_of_message_share_a_link_in_the_order_of_the_sends() -> None:
    # Rank 0 sends A1.0 and then G1.1 to rank 1: the gradient waits behind the activation.
    program = parse(
        "program cross stages=2 microbatches=2 routes=0,1/1,0\n0: F1.1 F0.0 B1.1 B0.0\n1: F0.1 F1.0 B1.0 B0.1\n"
    )
    result = simulate(lower(program, training=False), Costs(1, 1, 0, link=4))
    arrivals = {
        dump_slot(span.slot): crossing.arrival for span in result.spans[1] for crossing in span.inputs
    }  # F0.1 ends at 1, F1.1 runs from 5 to 6, F0.0 until 7, B1.1 until 8
    assert arrivals == {"F1.0": 7 + 4, "B0.1": 11 + 4}


def test_memory_in_bytes_counts_every_stage_with_its_own() -> None:
    program = parse("program two stages=2 microbatches=1 routes=0,0\n0: F0.0 F1.0 B1.0 B0.0\n")
    result = simulate(lower(program), Costs(activation_bytes=10, at_stage={("activation_bytes", -1): 25}))
    assert result.peak_activations == (2,) and result.peak_bytes == (35,)
    assert result.memory[0] == ((0, 1, 10), (1, 2, 35), (4, 1, 10), (6, 0, 0))
    assert simulate(lower(program), Costs()).peak_bytes is None
    assert result.to_json()["peak_bytes"] == [35]
    assert "peak_bytes" not in simulate(lower(program), Costs()).to_json()


def test_operations_count_a_pair_once() -> None:
    result = simulate(lower(dualpipe(8, 20)), Costs(1, 1, 1))
    assert result.operations[0] == {"F": 11, "B": 4, "I": 7, "W": 7, "FB": 9}
    for counts in result.operations:
        assert counts["F"] + counts["FB"] == counts["B"] + counts["I"] + counts["FB"] == 20
        assert counts["I"] == counts["W"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dualpipe_stays_within_its_closed_forms(data: st.DataObject) -> None:
    half = data.draw(st.integers(1, 6), "half the ranks")
    microbatches = 4 * half + 2 * data.draw(st.integers(0, 8), "more pairs")
    backward_input = data.draw(st.integers(0, 40), "I")
    forward, backward_weight = (data.draw(st.integers(0, backward_input), name) for name in "FW")
    backward = backward_input + backward_weight
    overlapped = data.draw(st.integers(max(forward, backward), forward + backward), "FB")
    program = lower(dualpipe(2 * half, microbatches), data.draw(st.integers(1, 3), "window"))
    validate(program)
    costs = Costs(forward, backward_input, backward_weight, overlapped=overlapped)
    result = simulate(program, costs)
    bound = dualpipe_bubble(2 * half, forward, backward_input, backward_weight, overlapped)
    assert max(result.bubble) <= bound
    assert max(result.peak_activations) <= dualpipe_peak(2 * half)


@st.composite
def orders(draw: st.DrawFn) -> Program:
    """The compute order of any schedule, or of a forward pass."""
    name = draw(st.sampled_from([*SCHEDULES, "forward"]))
    if name == "forward":
        return forward_only(dualpipe(4, 8), 2 * draw(st.integers(1, 5)))
    ranks, microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    while True:
        try:
            check(name, ranks, microbatches)
        except ValueError:
            ranks, microbatches = ranks + ranks % 2, max(microbatches + 1, 2 * ranks)
        else:
            return generate(name, ranks, microbatches)


TIME = st.integers(0, 9)
COSTS = st.builds(Costs, TIME, TIME, TIME, message=TIME, link=TIME, reduce=TIME, step=TIME, gather=TIME)


def as_soon_as_possible(order: Program, costs: Costs) -> dict[Compute, tuple[float, float]]:
    """The definition, by relaxation until nothing moves: an operation starts when its rank is free and its inputs are
    there; a message leaves when its maker ends and the one before it on the link has left."""
    table = CostTable(costs, order)
    links: dict[tuple[int, int], list[tuple[Message, Compute]]] = {}  # in the order in which the sender makes them
    for rank, slots in enumerate(order.slots):
        for compute in (c for slot in slots for c in computed(slot)):
            message = made(order, compute)
            if message is not None and order.rank_of(message.work) != rank:
                links.setdefault((rank, order.rank_of(message.work)), []).append((message, compute))
    ends: dict[Compute, tuple[float, float]] = {}
    while True:
        arrival: dict[Message, float] = {}
        for link in links.values():
            free = 0.0
            for message, maker in link:
                free = max(free, ends.get(maker, (0, 0))[1]) + costs.link
                arrival[message] = free + costs.message
        found: dict[Compute, tuple[float, float]] = {}
        for slots in order.slots:
            clock = 0.0
            for slot in slots:
                for message in (needed(order, c) for c in computed(slot)):
                    clock = max(clock, arrival.get(message, 0.0) if message is not None else 0.0)
                start = clock
                match slot:
                    case Compute(op, work):
                        clock += table.of[op][work.stage]
                    case Overlap(forward, backward):
                        clock += table.pair(forward.stage, backward.stage)
                found |= {c: (start, clock) for c in computed(slot)}
        if found == ends:
            return ends
        ends = found


@settings(max_examples=50, deadline=None)
@given(orders(), COSTS)
def test_every_time_is_the_earliest_that_order_and_messages_allow(order: Program, costs: Costs) -> None:
    result = simulate(lower(order), costs)
    simulated = {c: (span.start, span.end) for spans in result.spans for span in spans for c in computed(span.slot)}
    assert simulated == as_soon_as_possible(order, costs)


@settings(max_examples=100, deadline=None)
@given(orders(), COSTS, st.sampled_from(Transport))
def test_what_holds_for_every_simulation(order: Program, costs: Costs, transport: Transport) -> None:
    result = simulate(lower(order), costs, transport)
    for rank, spans in enumerate(result.spans):
        busy, bubble = result.busy[rank], result.bubble[rank]
        assert busy + bubble == result.makespan
        assert bubble >= 0 and busy <= result.makespan
        causes = astuple(result.bubble_by_cause[rank])
        assert sum(causes) == bubble and min(causes) >= 0
        own = [span for span in spans if not dump_slot(span.slot).startswith("reduce")]
        assert all(before.end <= span.start for before, span in pairwise(own))
        for span in spans:
            for crossing in span.inputs:
                made = result.spans[crossing.source][crossing.maker]
                assert made.end <= crossing.sent
                assert crossing.sent + costs.link + costs.message <= crossing.arrival <= span.start
            if span.waited is not None:
                assert span.waited.ready <= span.start
        assert result.memory[rank][-1][1] == 0
        assert max(alive for _, alive, _ in result.memory[rank]) == result.peak_activations[rank]


@settings(max_examples=50, deadline=None)
@given(orders(), COSTS, st.sampled_from([0.25, 2.0, 8.0]), st.sampled_from(Transport))
def test_scaling_the_costs_scales_every_time(order: Program, costs: Costs, by: float, transport: Transport) -> None:
    names = "forward backward_input backward_weight backward overlapped message link reduce step gather".split()
    scaled = Costs(**{name: by * getattr(costs, name) for name in names})
    program = lower(order)
    before, after = simulate(program, costs, transport), simulate(program, scaled, transport)
    for rank in range(before.ranks):
        assert [(t, by * start, by * end) for t, start, end in times(before, rank)] == times(after, rank)


@settings(max_examples=50, deadline=None)
@given(orders(), COSTS, st.sampled_from(["message", "link"]), TIME, st.sampled_from(Transport))
def test_slower_messages_shorten_nothing(
    order: Program, costs: Costs, name: str, more: int, transport: Transport
) -> None:
    program, slower = lower(order), replace(costs, **{name: getattr(costs, name) + more})  # type: ignore[arg-type]
    before, after = simulate(program, costs, transport), simulate(program, slower, transport)
    assert before.makespan <= after.makespan
    for rank in range(before.ranks):
        assert all(a[2] <= b[2] for a, b in zip(times(before, rank), times(after, rank), strict=True))


def faults(row: list) -> Iterator[tuple[str, list]]:  # type: ignore[type-arg]
    for kind in (removals, duplicates, swaps, moves, strangers):
        yield from kind(row)


@pytest.mark.parametrize("victim", VICTIMS)
def test_every_single_fault_is_refused_with_rank_and_slot(victim: str) -> None:
    program, survivors = VICTIMS[victim], []
    simulate(program, Costs())
    for rank in range(program.ranks):
        for fault, row in faults(list(program.slots[rank])):
            try:
                simulate(with_row(program, rank, row), Costs())
            except ProgramError as error:
                assert str(error).startswith("rank ") and ", slot " in str(error)
            else:
                survivors.append(f"rank {rank}: {fault}")
    assert not survivors


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("send:A3.0>3 ", "", r"rank 3, slot \d+ \(wait:A3.0<2\): deadlock on eager .* rank 2 has not sent it"),
        ("wait:A2.0<1 ", "", r"rank 2, slot \d+ \(F2.0\): its input A2.0 has not been waited for"),
        ("recv:A2.0<1 ", "", r"rank 2, slot \d+ \(wait:A2.0<1\): the receive is not posted"),
        ("F2.0 send:A3.0>3", "send:A3.0>3 F2.0", r"rank 2, slot \d+ \(send:A3.0>3\): A3.0 is not made yet"),
        ("send:A3.0>3", "send:A3.0>3 send:A3.0>3", r"rank 2, slot \d+ \(send:A3.0>3\): .* sent a second time"),
        ("F2.0 ", "F2.0 F2.0 ", r"rank 2, slot \d+ \(F2.0\): F2.0 is done a second time"),
        ("F2.0 ", "W2.0 F2.0 ", r"\(W2.0\): W2.0 needs I2.0 before it: 2.0 is not begun"),
        ("F2.0 ", "F9.0 F2.0 ", r"\(F9.0\): there is no stage 9 of micro-batch 0"),
        ("F2.0 ", "F2.5 F2.0 ", r"\(F2.5\): stage 2 of micro-batch 5 is on rank 1"),
        ("F2.0 ", "free:2.0 F2.0 ", r"\(free:2.0\): 2.0 cannot be freed: it is not begun"),
        ("send:A3.0>3", "send:A3.0>1", r"\(send:A3.0>1\): A3.0 is needed on rank 3"),
        (" step", "", r"\(gather:2\): comes before the step, a second time, or for a stage"),
        (" step gather:2 gather:1", "", r"\(step\): deadlock .* ranks \[2\] have not come to it; 3 of 4 ranks"),
        (" gather:1", "", r"\(gather:1\): deadlock on eager transport: ranks \[2\] have not come to it; 1 of 4"),
        ("recv:A2.1<1", "recv:A2.1<1 recv:A2.1<1", r"\(recv:A2.1<1\): is posted a second time"),
    ],
)
def test_a_fault_is_named(old: str, new: str, words: str) -> None:
    lines = dump(lower(dualpipe(4, 8))).split("\n")
    assert old in lines[3]
    lines[3] = lines[3].replace(old, new, 1)
    with pytest.raises(ProgramError, match=words):
        simulate(parse("\n".join(lines)), Costs())


def test_a_message_in_another_order_is_named() -> None:
    program = lower(dualpipe(4, 8))
    sends = [i for i, slot in enumerate(program.slots[2]) if isinstance(slot, Send) and slot.peer == 3]
    row = list(program.slots[2])
    first, second = [i for i in sends if dump_slot(row[i]) in ("send:A3.0>3", "send:A3.1>3")]
    row[first], row[second] = row[second], row[first]
    with pytest.raises(ProgramError, match=r"rank 2, slot \d+ \(send:A3.1>3\): A3.1 is not made yet"):
        simulate(with_row(program, 2, row), Costs())
    posts = list(program.slots[3])
    one, other = [i for i, slot in enumerate(posts) if dump_slot(slot) in ("recv:A3.0<2", "recv:A3.1<2")]
    posts[one], posts[other] = posts[other], posts[one]
    with pytest.raises(ProgramError, match=r"\(wait:A3.0<2\): message 1 that rank 2 sends on this channel is A3.1"):
        simulate(with_row(program, 3, posts), Costs())
