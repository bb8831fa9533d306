"""The timed stages of the bubble benchmark, here and in torch's schedules, and its table."""

import json
import time

import pytest
import torch
from torch.distributed import pipelining

from benchmarks import bubble, timed
from benchmarks.bubble_ranks import TORCH, Torchs, torch_step
from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import Work
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.simulate import simulate
from tests.ranks import run_ranks

COSTS = Costs(0.010, 0.020, 0.030, overlapped=0.045)


def test_an_operation_takes_its_duration_and_gives_what_it_should() -> None:
    like, work = torch.zeros(4), Work(1, 0)
    inner, last = (timed.TimedStage(COSTS, first=False, last=last, like=like) for last in (False, True))
    first = timed.TimedStage(COSTS, first=True, last=False, like=like)
    operations = {
        "F": (lambda: inner.forward(work, like), 0.010, like),
        "F of the last stage": (lambda: last.forward(work, like), 0.010, None),
        "B": (lambda: inner.backward(work, like), 0.050, like),
        "B of the first stage": (lambda: first.backward(work, like), 0.050, None),
        "I": (lambda: inner.backward_input(work, like), 0.020, like),
        "W": (lambda: inner.backward_weight(work), 0.030, None),
        "FB": (lambda: last.overlapped(work, like, inner, work, like), 0.045, (None, like)),
    }
    for name, (run, seconds, expected) in operations.items():
        start = time.perf_counter()
        given = run()
        took = time.perf_counter() - start
        assert given is expected or given == (None, like) == expected, name
        assert seconds <= took < seconds + 1, name  # never less; more by what a busy machine adds


def torchs_order(rank: int, microbatches: int) -> list[str]:
    """What a rank with both stages of ZBV does in a step of torch's: its waits, told apart by their lengths."""
    names = {0.1: "F", 0.2: "I", 0.3: "W", 0: "while it is built"}
    log: list[str] = []
    timed._take = lambda seconds: log.append(names[seconds])  # nothing needs to wait
    step = torch_step(Torchs(TORCH["zbv"], microbatches, ((0, 1),), Costs(0.1, 0.2, 0.3)), rank, torch.zeros(8))
    log.clear()
    step()
    return log


def test_torch_takes_the_two_halves_of_a_backward_apart() -> None:
    (order,) = run_ranks(torchs_order, 1, 3)
    plan = "0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0F2 0I1 0W1 1F2 1I2 1W2 0I2 0W2"  # stage, operation, micro-batch
    # In the first stage torch leaves all of the backward to W, whose two halves autograd runs in either order.
    does = {"0I": [], "0W": ["I", "W"]}
    for slot in plan.split():
        expected = does.get(slot[:2], [slot[1]])
        assert sorted(order[: len(expected)]) == expected, (slot, order)
        del order[: len(expected)]
    assert not order


def test_torch_has_the_schedules_that_are_named() -> None:
    assert set(TORCH) <= set(SCHEDULES)
    assert all(hasattr(pipelining.schedules, name) for name in TORCH.values())


def test_all_contestants_run_the_same_model() -> None:
    for name, contestant in bubble.contestants_of(4, 0.02, 2.4).items():
        costs = contestant.costs
        if isinstance(contestant, Torchs):
            work = sum(map(len, contestant.stages)) * contestant.microbatches * (costs.forward + costs.backward)
        else:
            apart = Costs(costs.forward, costs.backward_input, costs.backward_weight)
            work = sum(simulate(contestant.program, apart).busy)
        assert work == pytest.approx(4 * 8 * 6 * 0.02), name


def test_the_table_has_every_schedule_and_none_beats_its_critical_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert bubble.main(["--ranks", "2", "--rounds", "1", "--stage-ms", "3", "--json"]) == 0
    (outcome,) = json.loads(capsys.readouterr().out)["outcomes"]
    rows = {(row["schedule"], row["overlapped_pairs"]): row for row in outcome["rows"]}
    assert set(rows) == {(name, False) for name in SCHEDULES} | {("dualpipe", True), ("dualpipev", True)}
    for (name, overlapped), row in rows.items():
        program = lower(generate(name, 2, 4), training=False)
        costs = Costs(0.006, 0.006, 0.006, overlapped=2.4 * 0.006 if overlapped else 3 * 0.006)
        shortest = simulate(program, costs.scaled(2 / program.stages)).makespan
        assert row["measured_s"] >= shortest
        assert row["simulated_s"] >= shortest
        assert (row["torch_s"] is not None) == (name in TORCH)
        assert row["torch_s"] is None or row["torch_s"] > 4 * 3 * 0.006  # what every rank has to compute


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "3"], "layout.pipeline=3 must be 1 or even"),
        (["--ranks", "1"], "--ranks 1 must be at least 2"),
        (["--ranks", "four"], "--ranks four must be numbers such as 4,8"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--stage-ms", "nan"], "--stage-ms nan must be above 0"),
        (["--pair", "0.5"], "--pair 0.5 must be from 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bubble.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1
