"""DualPipe's order against a second transcription of the table, its closed forms, and its forward pass."""

from functools import cache
from pathlib import Path

import pytest

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import Op, computed, dump, dump_slot
from dualpipe.schedules import generate
from dualpipe.schedules.dualpipe import dualpipe, dualpipe_bubble, dualpipe_peak, forward_only
from dualpipe.simulate import Simulation, simulate
from dualpipe.validate import validate

GOLDEN = Path(__file__).parent / "golden"
UNIT = Costs(1, 1, 1, overlapped=3)


def transcribed(rank: int, ranks: int, microbatches: int) -> list[str]:
    """The facts' table for one rank, written as words and numbered by counting."""
    half, h = ranks // 2, min(rank, ranks - 1 - rank)
    pairs = ["F0&B1", "F1&B0"] * (microbatches // 2 - ranks + h + 1)
    if rank in (half - 1, half):
        pairs[:1] = ["F0", "B1"]
    drain = ["B1", "B0"] * (h + 1)
    drain[-(h + 1) :] = [word.replace("B", "I") for word in drain[-(h + 1) :]]
    words = ["F0"] * (2 * (half - h - 1)) + ["F0", "F1"] * (h + 1) + ["I1", "W", "F1"] * (half - h - 1)
    words += pairs + ["B1", "F1&B0"] * (half - h - 1) + drain + ["W", "I0"] * (half - h - 1) + ["W"] * (h + 1)

    first_half = rank < half
    stage = {"0": rank if first_half else ranks - 1 - rank, "1": ranks - 1 - rank if first_half else rank}
    start = {"0": 0 if first_half else microbatches // 2, "1": microbatches // 2 if first_half else 0}
    count = {"F0": 0, "F1": 0, "B0": 0, "B1": 0}
    deferred, numbered = [], []
    for word in words:
        if word == "W":
            numbered.append("W" + deferred.pop(0))
            continue
        parts = []
        for op, index in word.split("&"):
            counter = ("F" if op == "F" else "B") + index
            where = f"{stage[index]}.{start[index] + count[counter]}"
            count[counter] += 1
            parts.append(op + where)
            if op == "I":
                deferred.append(where)
        numbered.append("&".join(parts))
    return numbered


@cache
def simulated(ranks: int, microbatches: int) -> Simulation:
    return simulate(lower(dualpipe(ranks, microbatches)), UNIT)


@pytest.mark.parametrize("ranks", range(2, 33, 2))
def test_the_order_is_the_tables(ranks: int) -> None:
    for microbatches in range(2 * ranks, 4 * ranks + 1, 2):
        program = dualpipe(ranks, microbatches)
        for rank, slots in enumerate(program.slots):
            assert list(map(dump_slot, slots)) == transcribed(rank, ranks, microbatches)


@pytest.mark.parametrize(("ranks", "microbatches"), [(8, 20), (4, 10)])
def test_golden_text(ranks: int, microbatches: int) -> None:
    golden = (GOLDEN / f"dualpipe_{ranks}_{microbatches}.txt").read_text()
    assert dump(generate("dualpipe", ranks, microbatches)) == golden


@pytest.mark.parametrize("ranks", range(2, 17, 2))
def test_the_bubble_is_the_closed_form_on_every_rank(ranks: int) -> None:
    for microbatches in range(2 * ranks, 65, 2):
        assert set(simulated(ranks, microbatches).bubble) == {dualpipe_bubble(ranks, 1, 1, 1, 3)}


@pytest.mark.parametrize("ranks", range(2, 17, 2))
def test_a_rank_holds_at_most_one_micro_batch_more_than_there_are_ranks(ranks: int) -> None:
    for microbatches in range(2 * ranks, 65, 2):
        assert max(simulated(ranks, microbatches).peak_activations) == dualpipe_peak(ranks)


def test_closed_form_figures() -> None:
    # DeepSeek-V3 report, table 2: (P/2-1)(F&B + B - 3W); the figures are the facts' P=16 example.
    assert dualpipe_bubble(16, 1, 0.8, 1.2, 3) == pytest.approx(9.8)
    assert dualpipe_bubble(1, 1, 1, 1, 3) == dualpipe_bubble(2, 1, 1, 1, 3) == 0


def test_one_rank_runs_each_micro_batch_in_turn() -> None:
    assert dump(dualpipe(1, 2)).splitlines()[1] == "0: F0.0 B0.0 F0.1 B0.1"


@pytest.mark.parametrize(
    ("ranks", "microbatches", "words"),
    [
        (3, 12, "layout.pipeline=3 must be 1 or even for schedule dualpipe"),
        (0, 12, "layout.pipeline=0 must be at least 1"),
        (4, 9, "= 9 must be even and at least 2 x layout.pipeline (8)"),
        (4, 6, "= 6 must be even and at least 2 x layout.pipeline (8)"),
        (1, 0, "= 0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(ranks: int, microbatches: int, words: str) -> None:
    with pytest.raises(ValueError) as error:
        generate("dualpipe", ranks, microbatches)
    assert words in str(error.value)


def test_an_unknown_schedule_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"schedule\.name=dualpip is not a schedule .*did you mean dualpipe\?"):
        generate("dualpip", 4, 8)


@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 8, 16])
def test_a_forward_pass_is_as_short_as_any_and_places_work_like_the_training_step(ranks: int) -> None:
    for microbatches in [2, 4, 6, 2 * ranks, 2 * ranks + 6]:
        program = forward_only(ranks, microbatches)
        lowered = lower(program)
        validate(lowered)
        # A middle rank runs M forwards, the first once P/2-1 stages are behind it, the last with P/2-1 ahead of it.
        assert simulate(lowered, UNIT).makespan == microbatches + max(ranks - 2, 0)
        assert max(simulate(lowered, UNIT).peak_activations) == 1
        assert program.routes == dualpipe(ranks, 2 * ranks).routes
        assert all(c.op is Op.FORWARD for slots in program.slots for slot in slots for c in computed(slot))


def test_a_forward_pass_needs_micro_batches_in_pairs() -> None:
    for microbatches in (0, 3):
        with pytest.raises(ValueError, match=f"= {microbatches} must be even and at least 2 "):
            forward_only(4, microbatches)
