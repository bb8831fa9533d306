"""FP8 in a worker: weights that are kept quantised are those that every product would quantise again, and so are rows
and gradients that travel in FP8."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.exchange import Dispatched, Exchange, Pending
from model.fp8 import linear
from model.fp8.assign import recipes, set_precision
from model.fp8.quantise import Tile, dequantise, quantise
from parallel.checkpoint import Progress, load
from parallel.estimate.memory import stage_parameters
from parallel.estimate.operations import Operations
from parallel.estimate.workload import Workload
from parallel.mesh import Layout
from parallel.saver import save
from parallel.worker import Worker
from tests.model.tiny import tiny
from tests.parallel.estimate.published import H800
from tests.parallel.test_checkpoint import BF16, step
from tests.ranks import run_ranks

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYOUT = Layout(2, 2, 2)
JOB = replace(
    BF16, model=tiny(num_hidden_layers=2), layout=LAYOUT, fp8="emulated", fp8_payload=True, global_batch_size=8
)


class Widening:
    """An exchange after which nothing remains in FP8 of what came so."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self.combine, self.combine_gradient = exchange, exchange.combine, exchange.combine_gradient

    def dispatch(self, x_TD: Tensor, *routing: Tensor) -> Pending[Dispatched]:
        pending = self._exchange.dispatch(x_TD, *routing)

        def finish() -> Dispatched:
            sent = pending.wait()
            return replace(sent, rows_RD=dequantise(sent.payload).to(x_TD.dtype), payload=None, handover=None)

        return Pending(finish)

    def dispatch_gradient(self, gz_TD: Tensor, layout: Any) -> Pending[Tensor]:
        pending = self._exchange.dispatch_gradient(gz_TD, layout)
        return Pending(lambda: dequantise(pending.wait()).to(gz_TD.dtype))


def train(rank: int, folder: Path, keeps: bool, backend: str) -> list[Any]:
    """Losses and gradient norms of a run that goes back to its checkpoint, evaluates, and goes on."""
    moments = "fp32" if backend == "deepspeed" else "bf16"
    job = replace(JOB, optimizer=replace(JOB.optimizer, backend=backend, moments=moments))
    if not dist.is_initialized():
        job = replace(job, layout=Layout(), fp8_payload=False, global_batch_size=4)
    worker = Worker(job, rank)
    if not keeps:
        for held in worker.held.values():
            assert worker.products is not None
            set_precision(held.stage.model, worker.products.gemm)
            if job.fp8_payload:
                held.stage.exchange = Widening(held.stage.exchange)
    path = save(folder / str(keeps), worker, Progress(0, 0), keep=1)
    results = [step(worker, number) for number in (0, 1)]
    load(path, worker)
    _, count = worker.rows(job.global_batch_size)
    tokens = torch.ones(count, job.sequence_length + 1, dtype=torch.int64)
    evaluated = worker.evaluate(tokens, job.global_batch_size)
    results.append(step(worker, 0))
    assert (results[2].loss, results[2].grad_norm) == (results[0].loss, results[0].grad_norm)
    return [evaluated, *(figure for result in results for figure in (result.loss, result.grad_norm))]


def both(rank: int, folder: Path, backend: str) -> bool:
    return train(rank, folder, True, backend) == train(rank, folder, False, backend)


def test_what_is_kept_and_what_travels_is_what_every_product_would_quantise(tmp_path: Path) -> None:
    assert all(run_ranks(both, LAYOUT.world_size, tmp_path, "native", timeout=300))


@pytest.mark.parametrize("backend", ["native", "deepspeed"])
def test_they_are_where_nobody_gathers(backend: str, tmp_path: Path) -> None:
    if backend == "deepspeed":
        pytest.importorskip("deepspeed")
    assert both(0, tmp_path, backend)


def test_a_step_quantises_each_weight_once_and_holds_what_is_predicted() -> None:
    worker = Worker(replace(JOB, layout=Layout(), fp8_payload=False, global_batch_size=4), 0)
    made: list[Tile] = []

    def counted(x: torch.Tensor, tile: Tile, *rest: Any, **more: Any) -> Any:
        made.append(tile)
        return quantise(x, tile, *rest, **more)

    (held,) = worker.held.values()
    assert held.blocks is not None
    nbytes = []
    worker.end.readers.append(lambda: nbytes.append(held.blocks.nbytes if held.blocks else 0))
    with patch.object(linear, "quantise", counted):
        step(worker, 0)
    of = recipes(held.stage.model)
    assert made.count(Tile.BLOCK) == sum(recipe is not None for recipe in of.values())
    assert held.blocks.nbytes == 0, "after the update"
    model = worker.job.model
    workload = Workload(model, Layout(), "dualpipe", 6, 1, 4, "fp8", 2)
    (predicted,) = stage_parameters(Operations(workload, H800), [range(model.num_hidden_layers)])
    numbers = predicted.products + predicted.routed
    scales = sum(
        4 * (m.numel() // (m.shape[-1] * m.shape[-2])) * -(-m.shape[-1] // 128) * -(-m.shape[-2] // 128)
        for name, recipe in of.items()
        if recipe is not None
        for m in held.stage.model.get_submodule(name).parameters()
    )
    assert nbytes == [numbers + scales]
