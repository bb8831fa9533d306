"""What holds for every schedule: sizes are refused by rule, what is made is valid, and the papers' orders come out."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import Program, dump, dump_slot, parse
from dualpipe.progress import Progress, Transport
from dualpipe.schedules import SCHEDULES, check, generate, stages
from dualpipe.validate import validate, validate_order


def draw_order(data: st.DataObject, most_ranks: int = 6) -> Program:
    """A schedule of any size that it accepts, up to a few micro-batches more than its least."""
    schedule = data.draw(st.sampled_from(sorted(SCHEDULES)), "schedule")
    ranks = data.draw(st.integers(1, most_ranks), "ranks")
    if schedule == "dualpipe":
        ranks += ranks % 2
    chunks = data.draw(st.integers(2, 4), "chunks") if SCHEDULES[schedule].chunked else None
    accepted = [m for m in range(1, 4 * ranks + 3) if accepts(schedule, ranks, m, chunks)]
    return generate(schedule, ranks, data.draw(st.sampled_from(accepted), "micro-batches"), chunks)


def accepts(schedule: str, ranks: int, microbatches: int, chunks: int | None) -> bool:
    try:
        check(schedule, ranks, microbatches, chunks)
    except ValueError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_schedule_is_valid_at_every_size_and_window(data: st.DataObject) -> None:
    order = draw_order(data)
    validate_order(order)
    for training in (True, False):
        program = lower(order, data.draw(st.integers(1, 4), "window"), training)
        validate(program)
        for transport in Transport:
            Progress(program, transport, Costs()).play()
    assert parse(dump(order)) == order
    assert parse(dump(program)) == program


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_size_is_refused_or_made(schedule: str) -> None:
    refused = 0
    for ranks in range(8):
        for microbatches in range(18):
            try:
                check(schedule, ranks, microbatches)
            except ValueError as error:
                refused += 1
                with pytest.raises(ValueError) as other:
                    generate(schedule, ranks, microbatches)
                assert str(other.value) == str(error)
                assert f"layout.pipeline={ranks}" in str(error) or f" = {microbatches} must be " in str(error)
            else:
                order = generate(schedule, ranks, microbatches)
                assert (order.schedule, order.ranks, order.microbatches) == (schedule, ranks, microbatches)
                assert order.stages == stages(schedule, ranks)
                assert {rank for route in order.routes for rank in route} == set(range(ranks))
    assert refused >= 18 + 7  # no rank, and no micro-batch


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_checking_a_size_makes_no_program(schedule: str) -> None:
    tracemalloc.start()
    try:
        check(schedule, 64, 640)
        stages(schedule, 64)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * 640  # not even a byte for each micro-batch of each rank


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches", "words"),
    [
        ("dualpipe", 3, 12, "layout.pipeline=3 must be 1 or even for schedule dualpipe"),
        ("dualpipe", 0, 12, "layout.pipeline=0 must be at least 1"),
        ("dualpipe", 4, 9, "= 9 must be even and at least 2 x layout.pipeline (8) for schedule dualpipe"),
        ("dualpipe", 4, 6, "= 6 must be even and at least 2 x layout.pipeline (8)"),
        ("dualpipe", 1, 0, "= 0 must be at least 1"),
        ("dualpipev", 3, 5, "= 5 must be at least 2 x layout.pipeline (6) for schedule dualpipev"),
        ("zbv", 3, 4, "= 4 must be at least 2 x layout.pipeline - 1 (5) for schedule zbv"),
        ("zb1p", 3, 2, "= 2 must be at least layout.pipeline (3) for schedule zb1p"),
        ("interleaved", 3, 4, "= 4 must be a multiple of layout.pipeline (3) and at least 1 for schedule interleaved"),
        ("1f1b", 3, 0, "= 0 must be at least 1 for schedule 1f1b"),
        ("gpipe", -1, 2, "layout.pipeline=-1 must be at least 1"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_by_name(schedule: str, ranks: int, microbatches: int, words: str) -> None:
    with pytest.raises(ValueError) as error:
        check(schedule, ranks, microbatches)
    assert words in str(error.value)


def test_an_unknown_schedule_is_refused_with_the_nearest() -> None:
    for ask in (lambda: generate("dualpip", 4, 8), lambda: check("dualpip", 4, 8), lambda: stages("dualpip", 4)):
        with pytest.raises(ValueError, match=r"schedule\.name=dualpip is not a schedule .*did you mean dualpipe\?"):
            ask()


def test_chunks_are_for_the_schedule_that_has_them() -> None:
    assert generate("interleaved", 2, 4) == generate("interleaved", 2, 4, chunks=2)
    assert generate("interleaved", 2, 4, chunks=3).routes == ((0, 1, 0, 1, 0, 1),)
    assert stages("interleaved", 4, chunks=3) == 12
    with pytest.raises(ValueError, match=r"schedule\.chunks=1 must be at least 2 for schedule interleaved"):
        check("interleaved", 2, 4, chunks=1)
    with pytest.raises(ValueError, match=r"schedule\.chunks=2 must be left out for schedule zbv: only interleaved has"):
        generate("zbv", 2, 4, chunks=2)


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches", "rank", "words"),
    [
        ("gpipe", 4, 3, 1, "F1.0 F1.1 F1.2 B1.0 B1.1 B1.2"),
        # PipeDream, figure 4 with a flush: the first rank runs ahead by three, the last not at all.
        ("1f1b", 4, 5, 0, "F0.0 F0.1 F0.2 F0.3 B0.0 F0.4 B0.1 B0.2 B0.3 B0.4"),
        ("1f1b", 4, 5, 3, "F3.0 B3.0 F3.1 B3.1 F3.2 B3.2 F3.3 B3.3 F3.4 B3.4"),
        ("1f1b", 4, 2, 0, "F0.0 F0.1 B0.0 B0.1"),
        # Megatron-LM, figure 4: four micro-batches go through a chunk before the next chunk begins.
        (
            "interleaved",
            2,
            4,
            0,
            "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3",
        ),
        (
            "interleaved",
            2,
            4,
            1,
            "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3",
        ),
        # Zero Bubble, figure 3 (ZB-H1): rank r leaves r weight gradients for the end.
        ("zb1p", 3, 4, 0, "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3"),
        ("zb1p", 3, 4, 2, "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 F2.3 I2.3 W2.1 W2.2 W2.3"),
        ("zbv", 2, 3, 0, "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 I0.0 W0.0 F3.2 I3.2 W3.2 I0.1 W0.1 I0.2 W0.2"),
        ("zbv", 2, 3, 1, "F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 I1.1 I2.2 I1.2 W1.1 W2.2 W1.2"),
    ],
)
def test_the_papers_orders(schedule: str, ranks: int, microbatches: int, rank: int, words: str) -> None:
    assert " ".join(map(dump_slot, generate(schedule, ranks, microbatches).slots[rank])) == words
