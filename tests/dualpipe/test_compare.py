"""A recorded run against its simulation: derived costs reproduce the run, and what differs is found."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.compare import compare
from dualpipe.cost import Costs
from dualpipe.derive import as_text, derive
from dualpipe.draw import overlay
from dualpipe.draw.boxes import boxes
from dualpipe.lower import lower
from dualpipe.program import Compute, Program, Step, Wait, dump_slot
from dualpipe.progress import Span
from dualpipe.recorded import Recording, measured
from dualpipe.schedules import SCHEDULES, generate, stages
from dualpipe.simulate import Simulation, simulate
from tests.dualpipe.recordings import as_run

Run = list[list[Span]]
DURATION = st.sampled_from([0.5, 1.0, 1.75, 3.0])


@st.composite
def simulated_runs(draw: st.DrawFn) -> tuple[Program, Costs]:
    """Any schedule, with stages and links of their own; a full backward is I + W, as far as single stages go."""
    name, ranks = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.sampled_from([2, 4]))
    program = lower(generate(name, ranks, ranks * draw(st.integers(2, 3))), training=draw(st.booleans()))
    forward, backward_input, backward_weight = (draw(DURATION) for _ in range(3))
    own = st.tuples(st.sampled_from(["forward", "backward_input"]), st.integers(0, stages(name, ranks) - 1))
    links = st.tuples(st.just("message"), st.integers(0, ranks - 1), st.integers(0, ranks - 1))
    return program, Costs(
        forward,
        backward_input,
        backward_weight,
        overlapped=draw(st.floats(0.5, 1)) * (forward + backward_input + backward_weight),
        message=draw(st.sampled_from([0.0, 0.25])),
        step=draw(st.sampled_from([0.0, 2.0])),
        gather=draw(st.sampled_from([0.0, 1.0])),
        at_stage=draw(st.dictionaries(own, DURATION, max_size=3)),
        at_link=draw(st.dictionaries(links.filter(lambda link: link[1] != link[2]), st.just(0.5), max_size=2)),
    )


def times(result: Simulation) -> list[float]:
    return [time for spans in result.spans for span in spans for time in (span.start, span.end)]


@settings(max_examples=60, deadline=None)
@given(simulated_runs(), st.floats(0, 1e4))
def test_the_costs_of_a_simulated_run_give_the_same_run_again(case: tuple[Program, Costs], start: float) -> None:
    program, costs = case
    result = simulate(program, costs)
    run = [[s._replace(start=s.start + start, end=s.end + start) for s in spans] for spans in as_run(program, result)]
    again = compare(Recording(program, {7: (run,), 8: (run,)}))
    assert times(again.simulated) == pytest.approx(times(result), abs=1e-8)
    assert times(again.measured) == pytest.approx(times(result), abs=1e-8)
    assert again.simulated.makespan == pytest.approx(result.makespan, abs=1e-8)
    assert again.difference == pytest.approx(0, abs=1e-8)
    assert all(abs(difference.excess) < 1e-8 for difference in again.differences)
    assert again.handling == pytest.approx([0.0] * program.ranks, abs=1e-8)


def recorded(name: str = "dualpipe") -> tuple[Program, Simulation, Run]:
    program = lower(generate(name, 4, 8))
    result = simulate(program, Costs(2, 2, 1, overlapped=4, message=0.5, step=3))
    return program, result, as_run(program, result)


def delayed(run: Run, rank: int, index: int, by: float) -> Run:
    """The run in which one slot ended later, and nobody else took notice."""
    span = run[rank][index]
    late = [s._replace(start=s.start + by, end=s.end + by) for s in run[rank][index + 1 :]]
    return [
        [*spans[:index], span._replace(end=span.end + by), *late] if number == rank else list(spans)
        for number, spans in enumerate(run)
    ]


@pytest.mark.parametrize("name", ["dualpipe", "zbv", "interleaved"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_slow_slot_is_the_largest_difference(name: str, rank: int) -> None:
    program, result, run = recorded(name)
    index = next(i for i, span in enumerate(run[rank]) if isinstance(span.slot, Compute) and i > 20)
    slow = delayed(run, rank, index, by=0.75)
    found = compare(Recording(program, {4: (run, run), 5: (run, slow), 6: (run, run)}))
    first = found.differences[0]
    assert (first.step, first.replica, first.rank, first.slot) == (5, 1, rank, run[rank][index].slot)
    assert first.excess == pytest.approx(0.75)
    assert first.measured_start == pytest.approx(run[rank][index].start)
    assert first.simulated == pytest.approx(first.measured - 0.75)
    assert found.simulated.makespan == pytest.approx(result.makespan)  # medians do not mind one slow slot


def test_a_slow_message_is_the_largest_difference() -> None:
    program, _, run = recorded()
    sent = {span.slot.message: span.start for spans in run for span in spans if dump_slot(span.slot).startswith("send")}
    index, wait = next(
        (i, span.slot)
        for i, span in enumerate(run[3])
        if isinstance(span.slot, Wait) and span.start <= sent[span.slot.message]
    )
    late = [list(spans) for spans in run]
    late[3][index] = late[3][index]._replace(end=late[3][index].end + 0.25)
    found = compare(Recording(program, {1: (run,), 2: (late,), 3: (run,)}))
    first = found.differences[0]
    assert (first.step, first.rank, first.slot) == (2, 3, wait)
    assert (first.simulated, first.measured) == (pytest.approx(0.5), pytest.approx(0.75))
    assert first.measured_start == pytest.approx(sent[wait.message])


def test_the_median_run_is_the_one_that_is_shown() -> None:
    program, result, run = recorded()
    runs = {step: (delayed(run, 0, len(run[0]) - 1, by=extra),) for step, extra in ((1, 9.0), (2, 1.0), (3, 0.0))}
    found = compare(Recording(program, runs))
    assert (found.step, found.runs) == (2, 3)
    assert found.measured.makespan == pytest.approx(result.makespan + 1)


@pytest.mark.parametrize("name", ["dualpipe", "1f1b", "zbv"])
def test_the_idle_time_of_a_measured_rank_is_split_by_cause(name: str) -> None:
    _, result, run = recorded(name)
    found = measured(result, delayed(run, 1, 12, by=0.6))
    for rank, causes in enumerate(found.bubble_by_cause):
        parts = (causes.warmup, causes.dependency, causes.communication, causes.drain, causes.step_end)
        assert all(part >= -1e-9 for part in parts)
        assert sum(parts) == pytest.approx(found.bubble[rank])
        assert found.busy[rank] + found.bubble[rank] == pytest.approx(found.makespan)
    assert measured(result, run).bubble_by_cause[2].communication == pytest.approx(
        result.bubble_by_cause[2].communication
    )


def test_handling_is_what_is_neither_computing_nor_waiting() -> None:
    program, _, run = recorded()
    index = next(i for i, span in enumerate(run[1]) if dump_slot(span.slot).startswith("send"))
    found = compare(Recording(program, {1: (delayed(run, 1, index, by=0.125),)}))
    assert found.handling == pytest.approx((0, 0.125, 0, 0))


def test_the_step_takes_from_the_last_arrival_to_the_end() -> None:
    program, _, run = recorded()
    index = next(i for i, span in enumerate(run[2]) if isinstance(span.slot, Step))
    waiting = [
        [
            span._replace(start=span.start - 5, end=span.end) if isinstance(span.slot, Step) and rank != 2 else span
            for span in spans
        ]
        for rank, spans in enumerate(run)
    ]
    costs = derive(Recording(program, {1: (waiting,)}))
    assert costs.step == pytest.approx(run[2][index].end - run[2][index].start)


def test_costs_in_words_are_read_back() -> None:
    program, _, run = recorded()
    costs = derive(Recording(program, {1: (run,)}))
    read = Costs.parse(as_text(costs))
    assert times(simulate(program, read)) == pytest.approx(times(simulate(program, costs)))
    assert as_text(replace(costs, at_link={("message", 0, 1): 1.0, ("message", 1, 0): 2.0})).endswith("p2p@0-1=1.5")


def test_the_picture_has_a_box_for_every_slot_of_both() -> None:
    _, result, run = recorded()
    late = measured(result, delayed(run, 1, 12, by=0.6))
    root = ElementTree.fromstring(overlay.svg(late, result))
    rects = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if rect.get("data-slot")]
    scale = {round(float(rects[0].get("width", "")) / 2.0, 2)}
    for name, of in (("measured", late), ("simulated", result)):
        own = [rect for rect in rects if rect.get("class") == name]
        drawn = [box for row in boxes(of) for box in row if not box.beside]
        assert [rect.get("data-slot") for rect in own] == [box.text for box in drawn]
        for rect, box in zip(own, drawn, strict=True):
            assert float(rect.get("x", "")) - overlay.LEFT == pytest.approx(box.start * max(scale), abs=0.5)
    page = overlay.html(late, result)
    assert page.count("<iframe") == 2 and "http://www.w3.org/2000/svg" in page
