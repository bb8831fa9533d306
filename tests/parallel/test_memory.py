"""How many micro-batches a rank keeps alive: what the runtime reports is what stages hold, and what was simulated."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dualpipe.cost import Costs
from dualpipe.program import Work
from dualpipe.simulate import simulate
from parallel.mesh import Layout
from parallel.stage import ModelStage
from parallel.worker import Worker
from tests.model.tiny import tiny
from tests.parallel.test_parity import JOB, batch
from tests.ranks import run_ranks


def peaks(rank: int, pipeline: int, sizes: list[int]) -> list[tuple[int, int, int]]:
    """(reported, counted in the stages, simulated) for each number of micro-batches."""
    alive: set[Work] = set()
    counted = 0
    forward, overlapped, free = ModelStage.forward, ModelStage.overlapped, ModelStage.free

    def counted_in(work: Work) -> None:
        nonlocal counted
        alive.add(work)
        counted = max(counted, len(alive))

    def counting_forward(self: ModelStage, work: Work, *rest: Any) -> torch.Tensor | None:
        counted_in(work)
        return forward(self, work, *rest)

    def counting_pair(self: ModelStage, work: Work, *rest: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        counted_in(work)
        return overlapped(self, work, *rest)

    def counting_free(self: ModelStage, work: Work) -> None:
        free(self, work)
        alive.remove(work)
        assert work not in self._alive

    ModelStage.forward, ModelStage.overlapped, ModelStage.free = counting_forward, counting_pair, counting_free  # type: ignore[method-assign]
    results = []
    for microbatches in sizes:
        counted = 0
        model = tiny(num_hidden_layers=pipeline)
        job = replace(JOB, model=model, layout=Layout(pipeline), global_batch_size=microbatches, sequence_length=4)
        worker = Worker(job, rank)
        tokens = batch(job, 0) % model.vocab_size
        reported = worker.train_step(tokens, 1e-3).peak_activations
        assert not alive
        results.append((reported, counted, simulate(worker.program, Costs()).peak_activations[rank]))
    return results


@pytest.mark.parametrize("pipeline,sizes", [(1, [1, 3]), (2, [4, 10]), (4, [8, 14]), (8, [16, 20])])
def test_live_activations_are_as_simulated_and_at_most_p_plus_1(pipeline: int, sizes: list[int]) -> None:
    ranks = run_ranks(peaks, pipeline, pipeline, sizes)
    for results in ranks:
        for reported, counted, simulated in results:
            assert reported == counted == simulated <= pipeline + 1
    # Once there are enough micro-batches some rank needs all of the bound.
    assert max(results[-1][0] for results in ranks) == (pipeline + 1 if pipeline > 1 else 1)
