"""Writing checkpoints, at once or behind the training loop.

Every rank writes the file of its shard and flushes it; then rank 0 adds the index, the progress and the manifest, and
gives the folder its name. Asynchronously, a thread first copies the shard into memory that is kept for it, during the
next forward and backward, in which masters do not change, and writes from there.
"""

import ctypes
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Set
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from parallel import manifest
from parallel.activity import collective_timeout
from parallel.checkpoint import INDEX, PREFIX, CheckpointError, Progress, fsync, pieces, published, seal
from parallel.shard_file import ShardFile, index
from parallel.snapshot import Snapshot
from parallel.worker import Worker

Result = TypeVar("Result")


class Saver:
    """Writes the checkpoints of one run into ``folder``, one at a time, and deletes complete ones but for the newest
    ``keep``. Collective, and so are its methods but for ``copied``; the order is ``begin``, ``finish``, ``begin``, ...

    ``asynchronous``: ``begin`` returns at once. The masters must not change until ``copied`` returns, and ``is_over``
    says when ``finish`` will not have to wait.
    """

    def __init__(self, folder: Path, worker: Worker, keep: int, asynchronous: bool) -> None:
        self.folder, self.keep, self._leads = folder, keep, worker.rank == 0
        self._average, self._activity = worker.average, worker.activity
        self._rng = torch.get_rng_state()
        own = pieces(worker, self._rng, loading=False)
        self._tensors = [piece.tensor for piece in own]
        self._file = ShardFile(f"__{worker.rank}_0.distcp", own)
        # Its collectives are a thread's, beside those of the loop.
        timeout = collective_timeout(worker.job.timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        places = self._gather(self._file.places)
        self._index = index(itertools.chain.from_iterable(places)) if self._leads else b""
        self._snapshot = Snapshot(own) if asynchronous else None
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._outcome: Path | Exception | None = None
        self._written: set[Path] = set()
        self.underway: Progress | None = None
        """What was begun and not finished; the same on all ranks."""

    def begin(self, progress: Progress, spoiled: Set[Path] = frozenset()) -> None:
        """Save the state as it is. ``spoiled``: checkpoints that are known not to be what was written; they neither
        count nor go."""
        assert self.underway is None
        self.underway = progress
        self._rng.copy_(torch.get_rng_state())
        if self._snapshot is None:
            self._run(progress, spoiled)
            return
        self._copied.clear()
        self._snapshot.mark()
        self._thread = threading.Thread(target=self._run, args=(progress, spoiled), name="checkpoint", daemon=True)
        self._thread.start()

    def copied(self) -> None:
        """Wait until the masters may change."""
        if self._thread is not None:
            self._copied.wait()

    def is_over(self) -> bool:
        """Whether the save is over on every rank."""
        over = torch.tensor(int(self._thread is None or not self._thread.is_alive()))
        if dist.is_initialized():
            with self._activity.waiting("agreement on the checkpoint", self._activity.ranks):
                dist.all_reduce(over, dist.ReduceOp.MIN)
        return bool(over)

    def finish(self) -> Path:
        """Wait for the save -> the checkpoint. Raises CheckpointError on every rank when any of them could not write;
        what was there before is then as it was."""
        if self._thread is not None:
            with self._activity.waiting("checkpoint", self._activity.ranks):
                self._thread.join()
        outcome, self._outcome, self._thread, self.underway = self._outcome, None, None, None
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def _run(self, progress: Progress, spoiled: Set[Path]) -> None:
        try:
            try:
                if self._average is not None:  # its thread may still be taking in the last step
                    self._average.finish()
                if self._snapshot is not None:
                    self._snapshot.fill()
            finally:
                self._copied.set()
            self._outcome = self._save(progress, spoiled)
        except Exception as error:  # raised where the loop asks
            self._outcome = error

    def _save(self, progress: Progress, spoiled: Set[Path]) -> Path:
        final = self.folder / f"{PREFIX}{progress.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        spoiled = spoiled - self._written
        values = self._tensors if self._snapshot is None else self._snapshot.tensors
        try:
            self._all(lambda: self._make(partial) if self._leads else None)
            entries = self._all(lambda: (self._file.name, self._file.write(partial, values)))
            damaged = final in spoiled
            self._all(lambda: self._publish(partial, final, progress, dict(entries), damaged) if self._leads else None)
        except OSError as error:
            if self._leads:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final} cannot be written: {error.strerror or error}") from error
        self._written.add(final)
        if self._leads:
            self._delete_old(final, spoiled)
        return final

    def _make(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _publish(
        self, partial: Path, final: Path, progress: Progress, entries: dict[str, manifest.Entry], damaged: bool
    ) -> None:
        (partial / INDEX).write_bytes(self._index)
        seal(partial, progress, entries)
        if not final.exists():
            os.rename(partial, final)
            fsync(final.parent)
            return
        # The same step, written by a run that was resumed from before it.
        damaged = damaged or manifest.lacking(final) is not None
        _exchange(partial, final)
        if damaged:  # it stays: it is evidence
            os.rename(partial, _unused(final.with_suffix(".damaged")))
        fsync(final.parent)
        shutil.rmtree(partial, ignore_errors=True)

    def _delete_old(self, final: Path, spoiled: Set[Path]) -> None:
        # Damaged ones neither count nor go: they are evidence, and not ours to judge by their names.
        known = (p for p in published(self.folder) if p == final or p not in spoiled)
        complete = [p for p in known if manifest.lacking(p) is None]
        for old in complete[: -self.keep]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    def _all(self, action: Callable[[], Result]) -> list[Result]:
        """What ``action`` returns on each rank. An OSError on any of them is raised on every one."""
        own: Result | OSError
        try:
            own = action()
        except OSError as error:
            own = error
        results = []
        for result in self._gather(own):
            if isinstance(result, OSError):
                raise result
            results.append(result)
        return results

    def _gather(self, own: Result) -> list[Result]:
        if self._group is None:
            return [own]
        found: list[Result] = [own] * dist.get_world_size()
        dist.all_gather_object(found, own, group=self._group)
        return found


def save(folder: Path, worker: Worker, progress: Progress, keep: int, spoiled: Set[Path] = frozenset()) -> Path:
    """Write one checkpoint and wait for it. Collective. Raises CheckpointError."""
    saver = Saver(folder, worker, keep, asynchronous=False)
    saver.begin(progress, spoiled)
    return saver.finish()


def _exchange(one: Path, other: Path) -> None:
    """Swap two names; both are there at any moment if the file system can do that (on Linux most can). Raises
    OSError."""
    current_folder, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(current_folder, bytes(one), current_folder, bytes(other), exchange) == 0:
        return
    aside = one.with_suffix(".replaced")
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was cut off here: ``other`` has been written again since
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def _unused(path: Path) -> Path:
    """The path, or with the first number that makes it new."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(candidate for candidate in (path, *itertools.islice(numbered, 1000)) if not candidate.exists())
