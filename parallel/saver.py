"""Writing checkpoints, at once or behind the training loop.

Every rank writes the file of its shard, and all publish the checkpoint together (``publish.py``). Asynchronously, a
thread first copies the shard into memory that is kept for it, during the next forward and backward, in which masters do
not change, and writes from there.
"""

import itertools
import shutil
import threading
from collections.abc import Set
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import manifest
from parallel.activity import collective_timeout
from parallel.checkpoint import CheckpointError, Progress, pieces, published
from parallel.publish import Publisher
from parallel.shard_file import ShardFile, index
from parallel.snapshot import Snapshot
from parallel.worker import Worker


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
        self._publisher = Publisher(folder, self._group)
        places = self._publisher.gather(self._file.places)
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
        """Whether the save is over on every rank. Raises what ended it on this rank alone, as a lost peer does: the
        others may still be in it, and come here only when this rank is gone."""
        over = self._thread is None or not self._thread.is_alive()
        with self._activity.waiting("agreement on the checkpoint", self._activity.ranks):
            if over and isinstance(self._outcome, Exception) and not isinstance(self._outcome, CheckpointError):
                raise self._outcome
            everywhere = torch.tensor(int(over))
            if dist.is_initialized():
                dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere)

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
        spoiled = spoiled - self._written
        values = self._tensors if self._snapshot is None else self._snapshot.tensors
        final = self._publisher.publish(
            progress, lambda folder: {self._file.name: self._file.write(folder, values)}, self._index, spoiled
        )
        self._written.add(final)
        if self._leads:
            self._delete_old(final, spoiled)
        return final

    def _delete_old(self, final: Path, spoiled: Set[Path]) -> None:
        # Damaged ones neither count nor go: they are evidence, and not ours to judge by their names.
        known = (p for p in published(self.folder) if p == final or p not in spoiled)
        complete = [p for p in known if manifest.lacking(p) is None]
        for old in complete[: -self.keep]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)


def save(folder: Path, worker: Worker, progress: Progress, keep: int, spoiled: Set[Path] = frozenset()) -> Path:
    """Write one checkpoint and wait for it. Collective. Raises CheckpointError."""
    saver = Saver(folder, worker, keep, asynchronous=False)
    saver.begin(progress, spoiled)
    return saver.finish()
