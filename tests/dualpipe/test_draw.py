"""Pictures show what was simulated: every box, at its time, with what it waited for."""

import json
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs
from dualpipe.draw.boxes import boxes, describe
from dualpipe.draw.html import data, html
from dualpipe.draw.svg import LEFT, svg
from dualpipe.draw.text import picture
from dualpipe.draw.trace import MICROSECONDS, trace
from dualpipe.lower import lower
from dualpipe.program import Compute, Overlap, dump_slot, parse
from dualpipe.schedules import generate
from dualpipe.simulate import Simulation, simulate

COSTS = Costs(1, 1, 1, overlapped=2.5, message=0.25, link=0.5, reduce=2, step=1)
SVG = "{http://www.w3.org/2000/svg}"


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    name = draw(st.sampled_from(["dualpipe", "dualpipev", "1f1b"]))
    half, more = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    time = st.integers(0, 3)
    costs = Costs(*(draw(time) for _ in range(3)), message=draw(time), reduce=draw(time), step=draw(time))
    return simulate(lower(generate(name, 2 * half, 4 * half + 2 * more)), costs)


def drawn(result: Simulation) -> list[tuple[int, str]]:
    """(rank, slot) of what has a box: every computing slot, and the collectives that take time."""
    return [
        (rank, dump_slot(span.slot))
        for rank, spans in enumerate(result.spans)
        for span in spans
        if isinstance(span.slot, Compute | Overlap) or span.end > span.start
    ]


@settings(max_examples=15, deadline=None)
@given(simulations())
def test_svg_has_a_box_for_every_slot_at_its_time(result: Simulation) -> None:
    root = ElementTree.fromstring(svg(result))
    rects = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class", "").startswith("box ")]
    assert [rect.get("data-slot") for rect in rects] == [text for _, text in drawn(result)]
    width = float(root.get("width", "0"))
    spans = [box for row in boxes(result) for box in row]
    scales = []
    for rect, box in zip(rects, spans, strict=True):
        x, extent = (float(rect.get(name, "")) for name in ("x", "width"))
        assert x >= LEFT and x + extent <= width
        title = rect.find(f"{SVG}title")
        assert title is not None and title.text == "\n".join(describe(box))
        if box.end > 0:
            scales.append((x + extent - LEFT) / box.end)
    assert max(scales, default=0) - min(scales, default=0) < 0.02  # pixels are written with two digits


@settings(max_examples=15, deadline=None)
@given(simulations(), st.integers(1, 200))
def test_the_terminal_shows_what_each_rank_does_in_the_middle_of_a_column(result: Simulation, width: int) -> None:
    rows = picture(result, width)
    texts = ["".join(text for text, _ in row) for row in rows]
    assert len(texts) == result.ranks + 1
    assert {len(text) for text in texts} == {max(width, 20)}
    gutter = len(str(result.ranks - 1)) + 1
    columns = max(width, 20) - gutter
    drawn_boxes = boxes(result)
    for rank, row in enumerate(rows[:-1]):
        kinds = [kind for text, kind in row for _ in text][gutter:]
        for column, kind in enumerate(kinds):
            middle = (column + 0.5) / columns * result.makespan
            here = [box.kind for box in drawn_boxes[rank] if not box.beside and box.start <= middle < box.end]
            assert [kind] == (here or [None])


def test_the_terminal_names_what_has_room() -> None:
    program = parse(
        "program chain stages=2 microbatches=2 routes=0,1\n0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 B1.0 F1.1 B1.1\n"
    )
    result = simulate(lower(program, training=False), Costs(1, 1, 1))
    rows = ["".join(text for text, _ in row) for row in picture(result, 2 + 4 * 9)]
    assert rows == [
        "0 F0--F1--        B0------    B1------",
        "1     F0--B0------F1--B1------        ",
        "  0                                  9",
    ]


@settings(max_examples=15, deadline=None)
@given(st.lists(simulations(), min_size=1, max_size=2))
def test_a_trace_has_slices_arrows_and_counters(results: list[Simulation]) -> None:
    events = json.loads(json.dumps(trace(results)))["traceEvents"]
    assert {event["ph"] for event in events} >= {"M", "X", "C", "s", "f"}
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == len(results)
    for process, result in enumerate(results):
        own = [event for event in events if event["pid"] == process]
        slices = [event for event in own if event["ph"] == "X"]
        assert [(event["tid"] % result.ranks, event["name"]) for event in slices] == drawn(result)
        assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(result.makespan * MICROSECONDS)
        starts = {event["id"]: event for event in own if event["ph"] == "s"}
        ends = {event["id"]: event for event in own if event["ph"] == "f"}
        messages = [crossing for spans in result.spans for span in spans for crossing in span.inputs]
        assert starts.keys() == ends.keys() and len(starts) == len(messages)
        assert len([event for event in own if event["ph"] in "sf"]) == 2 * len(messages)
        for start, end in ((starts[number], ends[number]) for number in starts):
            assert start["name"] == end["name"] and start["tid"] != end["tid"] and start["ts"] <= end["ts"]
            for event in (start, end):  # each hangs on a slice of its thread
                assert any(s["tid"] == event["tid"] and s["ts"] <= event["ts"] <= s["ts"] + s["dur"] for s in slices)
        for rank in range(result.ranks):
            counts = [e["args"]["micro-batches"] for e in own if e["ph"] == "C" and e["tid"] == rank]
            assert counts == [alive for _, alive, _ in result.memory[rank]]
    ids = [event["id"] for event in events if event["ph"] == "s"]
    assert len(set(ids)) == len(ids)


@settings(max_examples=15, deadline=None)
@given(simulations())
def test_the_page_carries_the_simulation(result: Simulation) -> None:
    page = html(result)
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(text) == json.loads(json.dumps(data(result)))
    ranks = json.loads(text)["ranks"]
    assert [
        (rank, box["about"][0].partition(":")[0]) for rank, row in enumerate(ranks) for box in row["boxes"] if 1
    ] == [(rank, text.partition(":")[0]) for rank, text in drawn(result)]
    for row in ranks:
        for box in row["boxes"]:
            for message in box["inputs"]:
                maker = ranks[message["rank"]]["boxes"][message["box"]]
                assert maker["end"] <= message["sent"] <= message["arrival"] <= box["start"]
    assert "http://" not in page and "https://" not in page


def test_a_box_is_described_by_what_it_is_and_waited_for() -> None:
    rows = boxes(simulate(lower(generate("dualpipe", 4, 8)), COSTS))
    about = {box.text: describe(box) for row in rows for box in row}
    assert about["F0.0"] == ["F0.0: forward", "stage 0, micro-batch 0", "start 0, end 1", "waited for nothing"]
    assert about["F0.1"][-1] == "waited for nothing: its rank was busy until then"
    assert about["F1.0"][-1] == "waited for the activation A1.0 from rank 0: sent at 1, arrived at 1.75"
    assert about["F2.2&B1.4"][:3] == [
        "F2.2&B1.4: overlapped pair",
        "forward: stage 2, micro-batch 2",
        "backward: stage 1, micro-batch 4",
    ]
    assert "the last to come to it" in about["step"][-1]
