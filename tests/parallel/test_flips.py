"""A bit that changes by itself is found before the update, named with its rank, and nothing is updated."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel import flips
from parallel.activity import COMPUTING
from parallel.flips import Flip
from parallel.mesh import Layout
from parallel.worker import Worker
from tests.parallel.observed import operations_at
from tests.parallel.test_checkpoint import BF16, JOB, step
from tests.ranks import run_ranks

LAYOUT = Layout(2, 2, 2)
STRUCK = 2


def state(worker: Worker) -> list[torch.Tensor]:
    """All that a step may change, when it is all there."""
    for stage in worker.held:
        worker.end.gathered(stage)
    o = worker.optimizer
    found = [t for bucket in o.buckets for t in (bucket.master, bucket.parameters)] + o.first + o.second
    for held in worker.held.values():
        found += [block.router.bias_E for _, block in held.stage.model.blocks() if block.router is not None]
    if worker.average is not None:
        worker.average.finish()
        found += worker.average.shards
    return [tensor.clone() for tensor in found]


def flip(values: torch.Tensor) -> None:
    """One bit, the lowest of the exponent or a neighbour, of the largest value."""
    words = values.view(torch.int32)
    words[int(words.abs().argmax())] ^= 1 << 23


def refused(rank: int, bf16: bool) -> list[tuple[str, tuple[Flip, ...], bool]]:
    """For a copy on rank ``STRUCK`` in a shard of its own, one in another's, and a master there: (why the step was
    refused, who it was, whether nothing changed but the flip)."""
    job = replace(BF16 if bf16 else JOB, layout=LAYOUT)
    job = replace(job, optimizer=replace(job.optimizer, ema_decay=0.9))
    found = []
    for place in ("own", "other", "master"):
        worker = Worker(job, rank)
        clean = step(worker, 0, compare=True)
        assert clean.refusal is None
        state(worker)
        dist.barrier()  # all have read each other's shards
        if rank == STRUCK:
            bucket = worker.optimizer.buckets[0]
            where = {
                "own": bucket.parameters[bucket.shard],
                "other": bucket.parameters[bucket.stop :] if bucket.start == 0 else bucket.parameters[: bucket.start],
                "master": bucket.master,
            }
            flip(where[place])
        before, count = state(worker), worker.optimizer.steps
        with (
            operations_at(worker.activity, flips, "all_gather") as comparing,
            operations_at(worker.activity, dist, "all_gather_object", "all_reduce") as reporting,
        ):
            result = step(worker, 1, compare=True)
        assert result.refusal is not None, place
        assert comparing == {"comparison of parameters"}
        assert COMPUTING not in reporting and "report of flips" in reporting, reporting
        after = state(worker)
        if rank != STRUCK or place != "other":
            unchanged = all(map(torch.equal, before, after))
        else:  # the gather has put the copy right
            unchanged = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == 1
        found.append((result.refusal.why, result.refusal.flips, unchanged and worker.optimizer.steps == count))
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_a_flip_is_named_by_every_rank_and_nothing_is_updated(bf16: bool) -> None:
    parameters, master = Flip(STRUCK, "parameters"), Flip(STRUCK, "master weights")
    for rank, (own, other, masters) in enumerate(run_ranks(refused, LAYOUT.world_size, bf16)):
        assert own[1] == other[1] == (parameters,)
        assert masters[1] == (master,)
        assert masters[0] == f"bits changed by themselves: master weights of rank {STRUCK}"
        assert other[2] and masters[2], rank


def refused_for_its_loss(worker: Worker, poison: float, limit: float) -> bool:
    """Whether a step was refused, and left everything as it was."""
    before = state(worker)
    begin = worker.end.reduce

    def poisoned(stage: int) -> None:
        worker.held[stage].buckets[0].gradients[0] += poison
        begin(stage)

    worker.end.reduce = poisoned  # type: ignore[method-assign]
    result = step(worker, 1, loss_limit=limit)
    worker.end.reduce = begin  # type: ignore[method-assign]
    return result.refusal is not None and all(map(torch.equal, before, state(worker)))


@pytest.mark.parametrize("backend", ["native", "deepspeed"])
def test_what_is_not_finite_or_a_spike_changes_nothing(backend: str) -> None:
    if backend == "deepspeed":
        pytest.importorskip("deepspeed")
    worker = Worker(replace(JOB, optimizer=replace(JOB.optimizer, backend=backend, ema_decay=0.9)), 0)
    loss = step(worker, 0).cross_entropy
    assert refused_for_its_loss(worker, float("nan"), 2 * loss)
    assert refused_for_its_loss(worker, float("inf"), 2 * loss)
    assert refused_for_its_loss(worker, 0.0, 0.5 * loss)
    assert not refused_for_its_loss(worker, 0.0, 2 * loss)
