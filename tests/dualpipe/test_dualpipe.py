"""DualPipe's and DualPipeV's order against a second transcription of the table."""

from pathlib import Path

import pytest

from dualpipe.program import dump, dump_slot
from dualpipe.schedules import generate
from dualpipe.schedules.dualpipe import dualpipe
from dualpipe.schedules.dualpipev import dualpipev

GOLDEN = Path(__file__).parent / "golden"

Start = dict[str, tuple[int, int]]
"""Index -> its stage on the rank, and the first of its micro-batches."""


def words(half: int, h: int, each: int) -> list[str]:
    """The report's table for one rank: ``half`` is H, ``each`` the micro-batches of one index."""
    pairs = ["F0&B1", "F1&B0"] * (each - 2 * half + h + 1)
    if h == half - 1:
        pairs[:1] = ["F0", "B1"]
    drain = ["B1", "B0"] * (h + 1)
    drain[-(h + 1) :] = [word.replace("B", "I") for word in drain[-(h + 1) :]]
    start = ["F0"] * (2 * (half - h - 1)) + ["F0", "F1"] * (h + 1) + ["I1", "W", "F1"] * (half - h - 1)
    return start + pairs + ["B1", "F1&B0"] * (half - h - 1) + drain + ["W", "I0"] * (half - h - 1) + ["W"] * (h + 1)


def numbered(words: list[str], start: Start) -> list[str]:
    """The words with stages and micro-batches, by counting; W is the oldest deferred I."""
    count = {"F0": 0, "F1": 0, "B0": 0, "B1": 0}
    deferred, slots = [], []
    for word in words:
        if word == "W":
            slots.append("W" + deferred.pop(0))
            continue
        parts = []
        for op, index in word.split("&"):
            counter = ("F" if op == "F" else "B") + index
            stage, first = start[index]
            where = f"{stage}.{first + count[counter]}"
            count[counter] += 1
            parts.append(op + where)
            if op == "I":
                deferred.append(where)
        slots.append("&".join(parts))
    return slots


@pytest.mark.parametrize("ranks", range(2, 33, 2))
def test_dualpipes_order_is_the_tables(ranks: int) -> None:
    for microbatches in range(2 * ranks, 4 * ranks + 1, 2):
        program = dualpipe(ranks, microbatches)
        assert program.routes == (tuple(range(ranks)), tuple(range(ranks - 1, -1, -1)))
        for rank, slots in enumerate(program.slots):
            down, up = (rank, 0), (ranks - 1 - rank, microbatches // 2)
            start = {"0": down, "1": up} if rank < ranks // 2 else {"0": up, "1": down}
            table = words(ranks // 2, min(rank, ranks - 1 - rank), microbatches // 2)
            assert list(map(dump_slot, slots)) == numbered(table, start)


@pytest.mark.parametrize("ranks", range(1, 33))
def test_dualpipevs_order_is_the_tables(ranks: int) -> None:
    every = range(2 * ranks, 4 * ranks + 1)
    for microbatches in every if ranks <= 12 else {*every[:2], every[ranks], every[-1]}:
        program = dualpipev(ranks, microbatches)
        assert program.routes == ((*range(ranks), *range(ranks - 1, -1, -1)),)
        for rank, slots in enumerate(program.slots):
            start = {"0": (rank, 0), "1": (2 * ranks - 1 - rank, 0)}
            assert list(map(dump_slot, slots)) == numbered(words(ranks, rank, microbatches), start)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(8, 20), (4, 10)])
def test_golden_text(schedule: str, ranks: int, microbatches: int) -> None:
    golden = (GOLDEN / f"{schedule}_{ranks}_{microbatches}.txt").read_text()
    assert dump(generate(schedule, ranks, microbatches)) == golden


def test_one_rank_runs_each_micro_batch_in_turn() -> None:
    assert dump(dualpipe(1, 2)).splitlines()[1] == "0: F0.0 B0.0 F0.1 B0.1"
