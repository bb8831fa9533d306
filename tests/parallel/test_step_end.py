"""All ranks decide alike about the end of a step, from what any of them knows by then."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from parallel.mesh import Layout
from parallel.worker import Worker
from tests.parallel.test_checkpoint import JOB, step
from tests.ranks import run_ranks


def steps_asked_late(rank: int) -> tuple[list[float], list[float], list[bool]]:
    """Losses of two steps that nobody disturbs, and those where rank 1 is asked to stop once the first step has
    computed its gradients; whether each step is the last."""
    job = replace(JOB, layout=Layout(2))
    plain = Worker(job, rank)
    expected = [step(plain, number).loss for number in range(2)]
    worker, asked = Worker(job, rank), False
    reduce = worker.end.reduce

    def late(*arguments: Any) -> None:
        nonlocal asked
        reduce(*arguments)
        asked = rank == 1

    with patch.object(worker.end, "reduce", late):
        first = step(worker, 0, stop=lambda: asked)
    asked = False
    second = step(worker, 1, stop=lambda: asked)
    return expected, [first.loss, second.loss], [first.stop, second.stop]


def test_a_wish_to_stop_counts_in_the_step_that_it_arrives_in() -> None:
    for expected, losses, stops in run_ranks(steps_asked_late, 2):
        assert stops == [True, False]
        assert losses == expected
