"""A checkpoint gets its name: the last part of a save, and what all ranks do together in one.

Every rank writes its files into ``.NAME.partial`` and flushes them; then rank 0 adds the index, the progress and the
manifest, and gives the folder its name.
"""

import ctypes
import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from parallel import manifest
from parallel.checkpoint import INDEX, PREFIX, CheckpointError, Progress, fsync, seal
from parallel.manifest import Entry

Result = TypeVar("Result")


class Publisher:
    """Publishes checkpoints in ``folder``, on the ranks of ``group``, or alone where it is None. Its methods are
    collective."""

    def __init__(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        self.folder, self._group = folder, group
        self._leads = group is None or dist.get_rank(group) == 0

    def publish(
        self,
        progress: Progress,
        write: Callable[[Path], Mapping[str, Entry]],
        index: bytes,
        spoiled: Set[Path] = frozenset(),
    ) -> Path:
        """Write a checkpoint of ``progress``. ``write``: adds this rank's files to a folder; ``index``: of all files,
        known to rank 0; ``spoiled``: checkpoints that are known not to be what was written. Raises CheckpointError on
        every rank when any of them could not write; what was there before is then as it was."""
        final = self.folder / f"{PREFIX}{progress.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self._all(lambda: _make(partial) if self._leads else None)
            written = self._all(lambda: write(partial))
            entries = {name: entry for own in written for name, entry in own.items()}

            def name_it() -> None:
                (partial / INDEX).write_bytes(index)
                seal(partial, progress, entries)
                _name(partial, final, final in spoiled)

            self._all(lambda: name_it() if self._leads else None)
        except OSError as error:
            if self._leads:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final} cannot be written: {error.strerror or error}") from error
        return final

    def gather(self, own: Result) -> list[Result]:
        """What each rank has."""
        if self._group is None:
            return [own]
        found: list[Result] = [own] * dist.get_world_size(self._group)
        dist.all_gather_object(found, own, group=self._group)
        return found

    def _all(self, action: Callable[[], Result]) -> list[Result]:
        """What ``action`` returns on each rank. An OSError on any of them is raised on every one."""
        own: Result | OSError
        try:
            own = action()
        except OSError as error:
            own = error
        results = []
        for result in self.gather(own):
            if isinstance(result, OSError):
                raise result
            results.append(result)
        return results


def _make(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _name(partial: Path, final: Path, damaged: bool) -> None:
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
