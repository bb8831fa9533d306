"""Saving behind the training loop: what is written is the state of the moment that was asked for, whatever the loop and
the disk do meanwhile."""

import errno
import gc
import os
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader

from parallel import manifest
from parallel.activity import LostPeer
from parallel.checkpoint import INDEX, CheckpointError, Progress, damage, load, published
from parallel.publish import Publisher
from parallel.saver import Saver, save
from parallel.shard_file import ShardFile, index
from parallel.snapshot import Piece, Snapshot
from parallel.worker import Worker
from tests.parallel.observed import operations_at
from tests.parallel.test_checkpoint import alone, figures, files, step

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def behind(worker: Worker, folder: Path, keep: int = 2) -> Saver:
    saver = Saver(folder, worker, keep, asynchronous=True)
    worker.end.readers.append(saver.copied)
    return saver


@contextmanager
def held_back(name: str, of: type) -> Iterator[threading.Event]:
    """Calls of this method begin once the event is set."""
    go, method = threading.Event(), getattr(of, name)

    def late(*arguments: Any) -> Any:
        assert go.wait(60)
        return method(*arguments)

    with patch.object(of, name, late):
        yield go


def test_what_is_written_is_the_state_of_the_moment_that_was_asked_for(tmp_path: Path) -> None:
    worker = alone()
    step(worker, 0)
    at_once = save(tmp_path / "at once", worker, Progress(1, 16), keep=1)
    saver = behind(worker, tmp_path / "behind")
    with held_back("write", ShardFile) as disk:  # until two more steps are taken
        saver.begin(Progress(1, 16))
        expected = figures(worker)
        assert saver.underway == Progress(1, 16) and not saver.is_over() and published(tmp_path / "behind") == []
        disk.set()
        written = saver.finish()
    assert saver.underway is None and damage(written) is None
    assert files(written) == files(at_once)
    assert all((written / name).read_bytes() == (at_once / name).read_bytes() for name in files(at_once))
    again = alone(seed=5)
    load(written, again)
    assert figures(again) == expected


def test_masters_wait_for_the_copy(tmp_path: Path) -> None:
    worker = alone()
    saver = behind(worker, tmp_path)
    masters = [bucket.master for bucket in worker.optimizer.buckets]
    before = [master.clone() for master in masters]
    with held_back("fill", Snapshot) as copy:
        saver.begin(Progress(0, 0))
        taking = threading.Thread(target=step, args=(worker, 0))
        taking.start()
        taking.join(0.5)
        assert taking.is_alive() and all(map(torch.equal, masters, before))
        copy.set()
        taking.join(60)
    assert not any(map(torch.equal, masters, before))
    again = alone(seed=5)
    load(saver.finish(), again)
    assert all(map(torch.equal, (bucket.master for bucket in again.optimizer.buckets), before))


def test_who_waits_for_a_save_is_not_computing(tmp_path: Path) -> None:
    worker = alone()
    saver = behind(worker, tmp_path)
    worker.activity.computes("checkpoint")
    saver.begin(Progress(0, 0))
    with (
        patch.multiple(dist, is_initialized=lambda: True, all_reduce=lambda *_: None),
        operations_at(worker.activity, dist, "all_reduce") as asking,
    ):
        saver.is_over()
    with operations_at(worker.activity, threading.Thread, "join") as finishing:
        saver.finish()
    assert asking == {"agreement on the checkpoint"} and finishing == {"checkpoint"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_peer_lost_in_a_save_is_raised_before_the_others_are_asked(tmp_path: Path, asynchronous: bool) -> None:
    """They may still wait in the save for this rank, which is no end that all agree on, as a full disk is."""
    saver = Saver(tmp_path, alone(), keep=1, asynchronous=asynchronous)
    with patch.object(Publisher, "publish", side_effect=RuntimeError("Connection closed by peer")):
        saver.begin(Progress(0, 0))
        if saver._thread is not None:
            saver._thread.join()
    with (
        patch.multiple(dist, is_initialized=lambda: True, all_reduce=MagicMock()),
        pytest.raises(LostPeer, match="agreement on the checkpoint"),
    ):
        saver.is_over()
    with patch.object(Publisher, "publish", side_effect=CheckpointError("the disk is full")):
        failing = Saver(tmp_path, alone(), keep=1, asynchronous=False)
        failing.begin(Progress(0, 0))
        assert failing.is_over()


def test_memory_that_was_pinned_is_unpinned_before_it_goes() -> None:
    """CUDA's side is played: what is checked is what the driver is told, and when."""
    cudart, memory, told = MagicMock(), torch.zeros(128, dtype=torch.uint8), []
    alive = weakref.ref(memory)

    def unregister(address: int) -> None:
        living = alive()
        told.append(living is not None and living.data_ptr() == address)

    cudart.cudaHostUnregister = unregister
    source = cast(torch.Tensor, SimpleNamespace(nbytes=100, dtype=torch.uint8, is_cuda=True, device="cuda"))
    with patch.multiple(torch.cuda, Stream=MagicMock(), cudart=lambda: cudart, check_error=MagicMock()):
        snapshot = Snapshot([Piece("x", source, 0, 100)], memory)
        del memory
        gc.collect()
        assert told == []
        del snapshot
        gc.collect()
    assert told == [True] and alive() is None


def test_an_error_of_the_writer_is_raised_when_the_save_is_finished_and_the_next_one_is_as_good(tmp_path: Path) -> None:
    worker = alone()
    saver = behind(worker, tmp_path)
    saver.begin(Progress(1, 16))
    old = saver.finish()
    with patch.object(os, "fsync", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
        saver.begin(Progress(2, 32))
        step(worker, 0)
        with pytest.raises(CheckpointError, match=rf"^checkpoint {tmp_path}/step-00000002 cannot be written: Input/"):
            saver.finish()
    assert files(tmp_path) == [old.name] and damage(old) is None
    saver.begin(Progress(3, 48))
    new = saver.finish()
    assert published(tmp_path) == [old, new]


def test_what_no_disk_is_to_blame_for_is_not_called_a_checkpoint_error(tmp_path: Path) -> None:
    saver = behind(alone(), tmp_path)
    with patch.object(Snapshot, "fill", side_effect=RuntimeError("a bug")):
        saver.begin(Progress(1, 16))
        with pytest.raises(RuntimeError, match="a bug"):
            saver.finish()
    assert saver.underway is None


@contextmanager
def small_file_system(folder: Path, options: str) -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [("ro", "Read-only file system"), ("size=700k", "No space left on device")],
)
def test_a_disk_that_fills_up_or_turns_read_only_leaves_the_last_checkpoint(
    tmp_path: Path, change: str, said: str
) -> None:
    worker = alone()
    with small_file_system(tmp_path, "size=2m"):
        saver = behind(worker, tmp_path)
        saver.begin(Progress(1, 16))
        old = saver.finish()
        subprocess.run(["mount", "-o", f"remount,{change}", tmp_path], check=True)
        saver.begin(Progress(2, 32))
        step(worker, 0)
        with pytest.raises(CheckpointError, match=f"step-00000002 cannot be written: {said}$"):
            saver.finish()
        assert files(tmp_path) == [old.name] and damage(old) is None
        subprocess.run(["mount", "-o", "remount,rw,size=2m", tmp_path], check=True)
        saver.begin(Progress(2, 32))
        new = saver.finish()
        assert published(tmp_path) == [old, new]


def test_tensors_of_a_size_and_type_are_framed_once() -> None:
    # A size that no other test has: frames are kept.
    pieces = [Piece(str(number), torch.zeros(1001, dtype=torch.bfloat16), 0, 1001) for number in range(3)]
    with patch.object(torch, "save", wraps=torch.save) as made:
        file = ShardFile("one", pieces)
    assert made.call_count == 1 and len({place.length for place in file.places}) == 1


TENSORS = st.tuples(
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.integers(1, 300), st.integers(0, 2**32 - 1)
)


@settings(deadline=None, max_examples=30)
@given(st.lists(TENSORS, min_size=1, max_size=5))
def test_torch_reads_every_tensor_of_a_file(wanted: list[tuple[torch.dtype, int, int]]) -> None:
    pieces = []
    for number, (dtype, numel, seed) in enumerate(wanted):
        noise = torch.randint(0, 256, (numel * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
        pieces.append(Piece(str(number), noise.to(torch.uint8).view(dtype), number, 1000))
    file = ShardFile("__0_0.distcp", pieces)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entry = file.write(folder, (piece.tensor for piece in pieces))
        assert manifest.describe(folder, [file.name]) == {file.name: entry}
        (folder / INDEX).write_bytes(index(file.places))
        stored = FileSystemReader(folder).read_metadata().storage_data
        assert sum(place.length for place in stored.values()) == entry.bytes
        content = (folder / file.name).read_bytes()
        for number, piece in enumerate(pieces):
            (place,) = (place for key, place in stored.items() if key.fqn == str(number))
            (folder / "one").write_bytes(content[place.offset : place.offset + place.length])
            found = torch.load(folder / "one", weights_only=True)
            assert found.dtype == piece.tensor.dtype
            assert torch.equal(found.view(torch.uint8), piece.tensor.view(torch.uint8))
