"""The state of four ranks in memory, on two nodes: what may be lost, and the run goes on with the same bits."""

import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.drills.verdict import _state
from parallel.activity import collective_timeout
from parallel.checkpoint import Progress, load, published
from parallel.flips import Flip
from parallel.mesh import Layout
from parallel.replica import Mark, Replica, Slot, left_in, region
from parallel.rescue import rescue
from parallel.saver import Saver
from parallel.worker import Worker
from tests.parallel.observed import operations_at
from tests.parallel.test_checkpoint import BF16, step
from tests.ranks import run_ranks

LAYOUT = Layout(2, 2, 2, ranks_per_node=2)
JOB = replace(BF16, layout=LAYOUT, optimizer=replace(BF16.optimizer, ema_decay=0.9))
BATCH = JOB.global_batch_size


def opened(rank: int, folder: Path, seed: int) -> tuple[Worker, Replica]:
    """A rank as it begins, with the memory that there is."""
    torch.manual_seed(seed + rank)
    worker = Worker(replace(JOB, seed=seed), rank)
    replica = Replica(worker, 1, folder / f"own-{rank}", folder / f"kept-{rank}")
    worker.end.readers.append(replica.finish)
    worker.end.witnesses.append(replica.flips)
    return worker, replica


def figures(worker: Worker, first: int) -> list[Any]:
    """Of the steps ``first`` .. 4, counted from 0."""
    results = [step(worker, number) for number in range(first, 5)]
    assert worker.average is not None
    worker.average.finish()
    averages = [shard.double().sum().item() for shard in worker.average.shards]
    return [*((r.loss, r.grad_norm) for r in results), [torch.rand(2).tolist(), averages]]


def spoil(slots: list[Slot], number: int) -> None:
    """A bit of the snapshot after this step."""
    for slot in slots:
        mark = slot.mark()
        if mark is not None and mark.step == number:
            slot.values[slot.values.numel() // 2] ^= 4


def lose(rank: int, folder: Path) -> dict[str, Any]:
    """For each loss, done one after the other: (step, holders) of what could be restored, and whether it went on with
    the same bits."""
    (folder / f"own-{rank}").touch()
    (folder / f"kept-{rank}").touch()
    worker, replica = opened(rank, folder, seed=3)
    for number in range(3):
        step(worker, number)
        replica.begin(Progress(number + 1, BATCH * (number + 1)))
    with operations_at(worker.activity, threading.Thread, "join") as waits:
        replica.finish()
    saver = Saver(folder / "checkpoints", worker, keep=1, asynchronous=False)
    saver.begin(Progress(3, BATCH * 3))
    saver.finish()
    for name in (f"own-{rank}", f"kept-{rank}"):
        shutil.copyfile(folder / name, folder / f"left-{name}")
    before = figures(worker, 3)
    for group in (replica._group, saver._group):
        gloo = group._get_backend(torch.device("cpu"))
        assert gloo.options._timeout == collective_timeout(JOB.timeout_seconds)  # torch's own default is 30 minutes
    found: dict[str, Any] = {"cost": replica.cost.bytes == replica.bytes, "held": replica.held_bytes, "waits": waits}

    def again(name: str) -> None:
        worker, replica = opened(rank, folder, seed=77)
        choice = replica.newest()
        if choice is None:
            found[name] = None
            return
        progress = replica.restore(choice)
        assert progress == Progress(choice.step, BATCH * choice.step) and worker.optimizer.steps == choice.step
        got = figures(worker, choice.step)
        found[name] = (choice.step, dict(choice.holders), got[-3:] == before)
        dist.barrier()

    again("all ranks killed")
    if rank == 3:
        replica.forget()
    again("the memory of rank 3 lost")
    if rank in (2, 3):
        replica.forget()
    again("the second node lost")
    if rank == 1:
        spoil(replica.own, 3)
    again("a bit of step 3 flipped")
    replica.forget_after(2)
    again("step 3 was never whole")
    if rank in (0, 1):
        replica.forget()
    again("the other node lost too")
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_whatever_is_lost_the_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    everyone = run_ranks(lose, 4, tmp_path)
    own = {rank: rank for rank in range(4)}
    for found in everyone:
        assert found.pop("cost") and found.pop("held") > 0
        assert found.pop("waits") == {"snapshot of the step before"}
        assert found["all ranks killed"] == (3, own, True)
        # What a rank took from its keeper is its own again afterwards.
        assert found["the memory of rank 3 lost"] == (3, {**own, 3: 1}, True)
        assert found["the second node lost"] == (3, {**own, 2: 0, 3: 1}, True)
        assert found["a bit of step 3 flipped"] == (2, {**own, 2: 0, 3: 1}, True)
        assert found["step 3 was never whole"] == (2, own, True)
        assert found["the other node lost too"] is None
    rescued(tmp_path)


def rescued(folder: Path) -> None:
    """Memory as it was after step 3 becomes a checkpoint on another layout: of any node that is left, and the newest
    step that is whole."""
    worker = Worker(replace(JOB, layout=Layout()), 0)
    memory = [[f"own-{rank}", f"kept-{rank}"] for rank in range(4)]
    for number, (ranks, damaged, newest) in enumerate(
        (((0, 1), None, 3), ((2, 3), "kept-2", 2), ((0, 1, 2), "own-0", 3), ((0, 2), None, None))
    ):
        names = [name for rank in ranks for name in memory[rank]]
        regions = [folder / f"{number}-{name}" for name in names]
        for name, copy in zip(names, regions, strict=True):
            shutil.copyfile(folder / f"left-{name}", copy)
            if name == damaged:
                spoil(left_in(copy), 3)
        checkpoints = folder / f"rescued-{number}"
        path = rescue(worker, regions, checkpoints)
        assert published(checkpoints) == ([] if path is None else [path])
        assert all(region.stat().st_size == 0 for region in regions), "nothing of the other layout is left"
        assert (newest is None) == (path is None)
        if path is not None and newest is not None:
            assert load(path, worker) == Progress(newest, BATCH * newest)
        if path is not None and newest == 3:
            assert _state(path) == _state(folder / "checkpoints" / path.name)


STRUCK = 2


def flipped(rank: int, folder: Path) -> dict[str, Any]:
    """For a flip of one bit in each kind of value, the lowest of the largest: who is called, and whether the same step
    is taken once the bit is back. Then what is no flip of the state that the rank is in."""
    (folder / f"own-{rank}").touch()
    (folder / f"kept-{rank}").touch()
    worker, replica = opened(rank, folder, seed=5)
    optimizer, done = worker.optimizer, 0
    assert worker.average is not None
    values = {
        "master weights": optimizer.buckets[0].master,
        "first moments": optimizer.first[0],
        "second moments": optimizer.second[0],
        "average": worker.average.shards[0],
    }
    found: dict[str, Any] = {}

    def take(**options: Any) -> tuple[Flip, ...]:
        nonlocal done
        refusal = step(worker, done, compare=True, **options).refusal
        if refusal is None:
            done += 1
        return () if refusal is None else refusal.flips

    def snap() -> None:
        replica.begin(Progress(done, BATCH * done))
        replica.finish()

    def turn(value: torch.Tensor) -> None:
        words = value.view(torch.int16 if value.element_size() == 2 else torch.int32)
        words[at[value.data_ptr()]] ^= 1

    take()
    snap()
    at = {value.data_ptr(): int(value.abs().argmax()) for value in values.values()}
    for what, value in values.items():
        if rank == STRUCK:
            turn(value)
        named = take()
        if rank == STRUCK:
            turn(value)
        dist.barrier()
        found[what] = named, take()
        snap()
    if rank == STRUCK:
        spoil(replica.own, done)
    found["the snapshot"] = take()
    snap()
    optimizer.second[0].mul_(0.5)  # as a return to an earlier step would
    replica.forget_after(done)
    found["another state"] = take()
    replica.every = 2
    for _ in range(3):
        snap()
        if done % 2:
            optimizer.second[0].mul_(0.5)  # nothing is known of it
        assert take() == ()
    return found


def test_a_bit_that_flips_after_the_snapshot_is_named_with_its_rank(tmp_path: Path) -> None:
    for found in run_ranks(flipped, 4, tmp_path):
        for what in ("master weights", "first moments", "second moments", "average"):
            assert found.pop(what) == ((Flip(STRUCK, what),), ()), what
        assert found == {"the snapshot": (), "another state": ()}


def test_a_torn_mark_holds_nothing_and_a_region_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "region").touch()
    first, last = region(tmp_path / "region", 1000)
    assert first.mark() is None and not first.is_whole() and last.mark() is None
    mark = Mark(owner=3, ranks=4, layout="", step=7, sequences=112, digest="d", bytes=1000, crc32=1)
    first.seal(mark)
    again, other = region(tmp_path / "region", 1000)
    assert again.mark() == mark and not again.is_whole() and other.mark() is None
    generator = random.Random(1)
    length = len(bytes(first.page.numpy()).rstrip(b"\0"))
    for _ in range(50):
        at, byte = generator.randrange(length), generator.randrange(256)
        whole = int(first.page[at])
        first.page[at] = byte
        assert first.mark() in (None, mark)
        first.page[at] = whole
    first.page[generator.randrange(1, length - 1) :] = 0
    assert first.mark() is None
