"""Every schedule's idle time and memory against its closed form, up to 16 ranks and 64 micro-batches."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.schedules import SCHEDULES, check, generate
from dualpipe.schedules.dualpipe import dualpipe_bubble, dualpipe_peak
from dualpipe.schedules.dualpipev import dualpipev_bubble, dualpipev_peak
from dualpipe.schedules.gpipe import gpipe_bubble, gpipe_peak
from dualpipe.schedules.interleaved import interleaved_bubble, interleaved_peak
from dualpipe.schedules.one_f_one_b import one_f_one_b_bubble, one_f_one_b_peak
from dualpipe.schedules.zb1p import zb1p_bubble, zb1p_peak
from dualpipe.schedules.zbv import zbv_bubble, zbv_peak
from dualpipe.simulate import simulate
from tests.dualpipe.free_messages import idle

UNIT = {"F": 1, "I": 1, "W": 1, "B": 2, "FB": 3}
# With F = I = W = 1, B = 2 and F&B = 3, from (ranks) and (ranks, micro-batches).
BUBBLES: dict[str, Callable[[int], float]] = {
    "dualpipe": lambda p: dualpipe_bubble(p, 1, 1, 1, 3),
    "dualpipev": lambda p: dualpipev_bubble(p, 1, 1, 3),
    "gpipe": lambda p: gpipe_bubble(p, 1, 2),
    "1f1b": lambda p: one_f_one_b_bubble(p, 1, 2),
    "interleaved": lambda p: interleaved_bubble(p, 1, 2),
    "zb1p": lambda p: zb1p_bubble(p, 1, 1, 1),
    "zbv": lambda p: zbv_bubble(p, 1),
}
IN_THE_REPORT = ("dualpipe", "dualpipev", "1f1b", "zb1p")
PEAKS: dict[str, Callable[[int, int], int]] = {
    "dualpipe": lambda p, _: dualpipe_peak(p) if p > 1 else 1,
    "dualpipev": lambda p, _: dualpipev_peak(p),
    "gpipe": lambda _, m: gpipe_peak(m),
    "1f1b": one_f_one_b_peak,
    "interleaved": lambda p, m: interleaved_peak(p, m, 2),
    "zb1p": lambda p, _: zb1p_peak(p),
    "zbv": lambda p, _: zbv_peak(p),
}


def sizes(schedule: str, ranks: int) -> Iterator[int]:
    """The numbers of micro-batches up to 64 that the schedule runs on so many ranks."""
    for microbatches in range(1, 65):
        try:
            check(schedule, ranks, microbatches)
        except ValueError:
            continue
        yield microbatches


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_is_the_closed_form_on_every_rank(schedule: str) -> None:
    tried = 0
    for ranks in range(1, 17):
        for microbatches in list(sizes(schedule, ranks))[:: 1 if schedule in IN_THE_REPORT else 5]:
            tried += 1
            assert set(idle(generate(schedule, ranks, microbatches), UNIT)) == {BUBBLES[schedule](ranks)}
    assert tried > 40


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_simulation_gives_the_closed_forms(schedule: str) -> None:
    for ranks in (1, 2, 3, 4, 6, 9, 16):
        for microbatches in list(sizes(schedule, ranks))[:6:5]:
            result = simulate(lower(generate(schedule, ranks, microbatches)), Costs(1, 1, 1, overlapped=3))
            assert set(result.bubble) == {BUBBLES[schedule](ranks)}
            assert max(result.peak_activations) == PEAKS[schedule](ranks, microbatches)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_second_simulation_agrees_for_any_costs(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(sorted(SCHEDULES)))
    ranks = 2 * data.draw(st.integers(1, 4), "half the ranks")
    microbatches = data.draw(st.sampled_from(list(sizes(schedule, ranks))[:12]))
    f, i, w, b, pair = data.draw(st.tuples(*[st.integers(0, 9)] * 5), "F, I, W, B, FB")
    order = generate(schedule, ranks, microbatches)
    found = simulate(lower(order), Costs(f, i, w, backward=b, overlapped=pair)).bubble
    assert list(found) == idle(order, {"F": f, "I": i, "W": w, "B": b, "FB": pair})


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_bidirectional_bubble_is_at_most_the_closed_form_when_a_backward_takes_longer(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(["dualpipe", "dualpipev"]))
    ranks = 2 * data.draw(st.integers(1, 8), "half the ranks")
    microbatches = data.draw(st.sampled_from(list(sizes(schedule, ranks))))
    i = data.draw(st.integers(0, 40), "I")
    f, w = (data.draw(st.integers(0, i), name) for name in "FW")
    pair = data.draw(st.integers(max(f, i + w), f + i + w), "FB")
    bound = dualpipe_bubble(ranks, f, i, w, pair) if schedule == "dualpipe" else dualpipev_bubble(ranks, i, w, pair)
    order = generate(schedule, ranks, microbatches)
    assert max(idle(order, {"F": f, "I": i, "W": w, "B": i + w, "FB": pair})) <= bound


def test_closed_form_figures() -> None:
    # DeepSeek-V3 report, table 2: (P/2-1)(F&B + B - 3W) for DualPipe.
    assert dualpipe_bubble(16, 1, 0.8, 1.2, 3) == pytest.approx(9.8)
    assert dualpipe_bubble(1, 1, 1, 1, 3) == dualpipe_bubble(2, 1, 1, 1, 3) == 0
    # DualPipeV on half the ranks has as many stages, and the same bubble.
    assert dualpipev_bubble(8, 0.8, 1.2, 3) == pytest.approx(9.8)
    # The same table, 1F1B (P-1)(F+B) and ZB1P (P-1)(F+B-2W).
    assert one_f_one_b_bubble(16, 1, 2.5) == 52.5
    assert zb1p_bubble(16, 1, 1.5, 1) == 22.5
