"""The average of the parameters: its recurrence, exactly, whoever updates the masters and whatever is resumed."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel import checkpoint, saver
from parallel.checkpoint import Progress
from parallel.mesh import Layout
from parallel.worker import Job, Worker
from tests.parallel.test_checkpoint import JOB as PLAIN
from tests.parallel.test_checkpoint import step
from tests.ranks import run_ranks

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DECAY = 0.75
JOB = replace(PLAIN, optimizer=replace(PLAIN.optimizer, ema_decay=DECAY))


def masters(worker: Worker) -> list[Tensor]:
    return [bucket.master.clone() for bucket in worker.optimizer.buckets]


def shards(worker: Worker) -> list[Tensor]:
    assert worker.average is not None
    worker.average.finish()
    return worker.average.shards


@pytest.mark.parametrize("backend", ["native", "deepspeed"])
def test_it_is_the_plain_recurrence_of_the_masters(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the thread is as late as can be: the masters wait for it."""
    if backend == "deepspeed":
        pytest.importorskip("deepspeed")
    worker = Worker(replace(JOB, optimizer=replace(JOB.optimizer, backend=backend)), 0)
    assert worker.average is not None
    update, change, (finish,) = worker.average._update, worker.optimizer.update, worker.end.readers
    go = threading.Event()

    def late(*arguments: Any) -> None:
        assert go.wait(60)
        go.clear()
        update(*arguments)

    def wait() -> None:
        go.set()
        finish()

    def change_then_go(*arguments: Any) -> None:
        change(*arguments)
        if worker.average._underway is not None and not worker.average._underway.done():
            go.set()  # nobody waited

    monkeypatch.setattr(worker.average, "_update", late)
    monkeypatch.setattr(worker.optimizer, "update", change_then_go)
    worker.end.readers[:] = [wait]
    means = [master.double() for master in masters(worker)]
    for number in range(3):
        step(worker, number)
        for mean, master in zip(means, masters(worker), strict=True):
            mean.mul_(DECAY).add_(master, alpha=1 - DECAY)
    go.set()
    for mean, shard, master in zip(means, shards(worker), masters(worker), strict=True):
        torch.testing.assert_close(shard.double(), mean, rtol=1e-6, atol=1e-8)
        assert (shard - master).abs().max() > 1e-3


def average(rank: int, job: Job, first: int, last: int, read: Path | None, write: Path | None) -> dict[str, Tensor]:
    """Take steps ``first`` to ``last`` -> the owned parts of the average, by parameter."""
    worker = Worker(job, rank)
    if read is not None:
        assert checkpoint.load(checkpoint.published(read)[-1], worker).step == first
    for number in range(first, last):
        step(worker, number)
    if write is not None:
        saver.save(write, worker, Progress(last, last * job.global_batch_size), keep=1)
    found = {}
    for bucket, shard in zip(worker.optimizer.buckets, shards(worker), strict=True):
        for s in bucket.owned_segments():
            found[s.name] = shard[s.start : s.start + s.numel].clone()
    return found


def write(rank: int, job: Job, folder: Path) -> None:
    average(rank, job, 0, 2, None, folder)  # tensors do not outlive the rank that returns them


def test_it_goes_on_from_a_checkpoint_on_any_layout_and_begins_anew_without_one(tmp_path: Path) -> None:
    four = replace(JOB, layout=Layout(2, 2, 2))
    through = average(0, JOB, 0, 4, None, None)
    run_ranks(write, 4, four, tmp_path / "four")
    resumed = average(0, JOB, 2, 4, tmp_path / "four", None)
    for name, value in through.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6)

    average(0, JOB, 0, 2, None, tmp_path / "one")
    same = average(0, JOB, 2, 4, tmp_path / "one", None)
    assert all(torch.equal(same[name], through[name]) for name in through)

    without = Worker(PLAIN, 0)
    step(without, 0)
    saver.save(tmp_path / "without", without, Progress(1, 16), keep=1)
    fresh = Worker(JOB, 0)
    checkpoint.load(checkpoint.published(tmp_path / "without")[-1], fresh)
    assert all(map(torch.equal, shards(fresh), masters(fresh)))
