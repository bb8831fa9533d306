"""The interactive page in a real browser: it draws every box, says what the pointer is on, zooms and moves."""

import json
from collections.abc import Iterator

import pytest

from dualpipe.cost import Costs
from dualpipe.draw.boxes import COLOURS, boxes, describe
from dualpipe.draw.html import html
from dualpipe.lower import lower
from dualpipe.schedules import generate
from dualpipe.simulate import simulate
from tests.dualpipe import chromium

RESULT = simulate(lower(generate("dualpipe", 4, 10)), Costs(1, 1, 1, overlapped=2.5, message=0.5, reduce=1, step=1))
BOXES = [(rank, index, box) for rank, row in enumerate(boxes(RESULT)) for index, box in enumerate(row)]

# Places on the canvas, as the page computes them, in pixels of the window.
PLACES = """data.ranks.map((row, rank) => row.boxes.map((box, index) => {
    const at = place(rank, index), corner = canvas.getBoundingClientRect();
    return [at.left + corner.left, at.top + corner.top, at.width, at.height];
}))"""
# The colours of points of the window.
PIXELS = """(corner => {points}.map(([x, y]) =>
    [...pen.getImageData(x - corner.left, y - corner.top, 1, 1).data]))(canvas.getBoundingClientRect())"""
RED = """(() => {
    const {data, width} = pen.getImageData(0, 0, canvas.width, canvas.height), rows = new Set();
    for (let i = 0; i < data.length; i += 4)
        if (data[i] > 200 && data[i + 1] < 40 && data[i + 2] < 40) rows.add(Math.floor(i / 4 / width));
    return [...rows];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    if chromium.PROGRAM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    path = folder / "step.html"
    path.write_text(html(RESULT))
    with chromium.opened(path, folder / "profile") as page:
        yield page


@pytest.fixture(autouse=True)
def whole_step(page: chromium.Page) -> Iterator[None]:
    """Each test begins with the whole step in view, and no test leaves an error."""
    page.mouse("mouseMoved", 5, 5)
    page.value("show(0, span)")
    yield
    assert page.errors == []


def middle(page: chromium.Page, rank: int, index: int) -> tuple[float, float]:
    left, top, width, height = page.value(PLACES)[rank][index]
    return left + width / 2, top + height / 2


def find(text: str) -> tuple[int, int]:
    return next((rank, index) for rank, index, box in BOXES if box.text == text)


def test_every_box_is_drawn_in_its_colour(page: chromium.Page) -> None:
    assert int(page.value("canvas.dataset.boxes")) == len(BOXES)
    points, colours = [], []
    for places, row in zip(page.value(PLACES), boxes(RESULT), strict=True):
        for (left, top, _, height), box in zip(places, row, strict=True):
            points += [(left + 2, top + 1), (left + 2, top + height - 2)]
            colours += [COLOURS[kind] for kind in (("F", "B") if box.kind == "FB" else (box.kind, box.kind))]
    pixels = page.value(PIXELS.replace("{points}", json.dumps(points)))
    assert [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue, _ in pixels] == colours


def test_nothing_but_the_page_is_asked_for(page: chromium.Page) -> None:
    assert [address for address in page.requests if not address.startswith("data:")] == [page.value("location.href")]


@pytest.mark.parametrize("text", ["F0.0", "F1.0", "B2.0", "step", "reduce:3"])
def test_the_pointer_says_what_it_is_on(page: chromium.Page, text: str) -> None:
    rank, index = find(text)
    page.mouse("mouseMoved", *middle(page, rank, index))
    shown = page.value("about.style.display === 'block' ? about.textContent : ''")
    box = boxes(RESULT)[rank][index]
    assert shown.split("\n")[: len(describe(box))] == describe(box)
    inside = page.value("(r => r.right <= innerWidth && r.bottom <= innerHeight)(about.getBoundingClientRect())")
    assert inside
    page.mouse("mouseMoved", 5, 5)
    assert page.value("about.style.display") == "none"


def test_the_pointer_draws_where_the_inputs_come_from(page: chromium.Page) -> None:
    assert page.value(RED) == []
    rank, index = find("F2.0")
    page.mouse("mouseMoved", *middle(page, rank, index))
    rows = page.value(RED)
    lane, maker = page.value(f"[top_({rank}), top_({rank - 1}) + LANE / 2]")
    assert min(rows) <= maker + 2 < lane < max(rows)


def test_the_wheel_zooms_about_the_pointer_and_a_double_click_goes_back(page: chromium.Page) -> None:
    rank, index = find("F2.0")
    x, y = middle(page, rank, index)
    for _ in range(5):
        page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
    assert 0 < int(page.value("canvas.dataset.boxes")) < len(BOXES)
    assert page.value("about.textContent").startswith("F2.0: forward")
    assert page.value("about.style.display") == "block"
    after = page.value("[hovered.rank, hovered.index, from, to]")
    assert after[:2] == [rank, index] and after[3] - after[2] < RESULT.makespan / 10
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            page.mouse(kind, x, y, button="left", clickCount=count)
    assert int(page.value("canvas.dataset.boxes")) == len(BOXES)


def test_dragging_moves_the_step_under_the_pointer(page: chromium.Page) -> None:
    length = RESULT.makespan / 4
    page.value(f"show({length}, {length})")
    page.mouse("mouseMoved", 600, 150)
    time = page.value("timeAt(600)")
    page.mouse("mousePressed", 600, 150, button="left", buttons=1)
    page.mouse("mouseMoved", 700, 150, button="left", buttons=1)
    page.mouse("mouseReleased", 700, 150, button="left")
    assert page.value("timeAt(700)") == pytest.approx(time, rel=1e-6)


def test_all_arrows_can_be_drawn(page: chromium.Page) -> None:
    before = page.value("canvas.toDataURL()")
    page.value("allArrows.click()")
    assert page.value("canvas.toDataURL()") != before
    page.value("allArrows.click()")
    assert page.value("canvas.toDataURL()") == before
