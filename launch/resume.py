"""How a run starts and goes on: in its folder, from the memory of its ranks or from its newest whole checkpoint."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from launch.config import Config, ConfigError
from launch.data import Dataset
from launch.keeper import Regions
from launch.launcher import Failure
from launch.rank import Place, together
from launch.run_folder import RunFolder
from parallel import checkpoint
from parallel.checkpoint import CheckpointError, DamagedCheckpointError, Progress
from parallel.mesh import Layout
from parallel.recovery import Choice
from parallel.replica import Replica
from parallel.rescue import rescue
from parallel.worker import Worker

STAGES = ("stop", "regroup", "load", "step")
"""Of a recovery, from when a failure was noticed: until no rank was alive, until those that were started were a group,
until they had their state, and until the first step was done."""


def open_run(
    folder: RunFolder,
    config: Config,
    layout: Layout,
    data: Dataset,
    start: str | None,
    say: Callable[[str], None],
) -> TextIO:
    """Check and open the run's folder, and say and record what this start is -> the lock. ``layout``: of the ranks that
    there are, which may be fewer than the configuration's. Raises ConfigError.

    Where more steps are done than are asked for, nothing is trained in what is given: the folder keeps its own
    configuration.
    """
    changes = folder.changes(config, data.fingerprint)
    beyond = checkpoint.newest_step(folder.checkpoints) > config.train.steps
    if beyond:
        config, changes = folder.stored_config(), []
    lock = folder.open(config, data.fingerprint, start)
    folder.events.write("start", world_size=layout.world_size, layout=asdict(layout), changed=changes)
    for change in changes:
        say(f"changed since the last start: {change}")
    if not beyond:
        for line in data.summary(config.values().batches.sequences_before(config.train.steps)):
            say(line)
    return lock


def open_memory(
    worker: Worker, every: int, memory: Sequence[Regions] | None, here: Place, folder: RunFolder
) -> Replica | None:
    """What outlives this rank, of the ``memory`` of its node, for snapshots after each ``every``-th step; None for 0.
    What is in it of another layout becomes a checkpoint. Collective. Raises ConfigError on every rank when it cannot be
    had, and CheckpointError."""
    if not every:
        return None
    assert memory is not None, "refused before"
    regions = memory[here.local_rank]
    share = [path for pair in memory[here.local_rank :: here.local_world_size] for path in pair]
    if (rescued := rescue(worker, share, folder.checkpoints)) is not None and worker.rank == 0:
        folder.events.write("checkpoint", step=checkpoint.step_of(rescued), path=str(rescued), source="memory")

    def open_regions() -> Replica:
        try:
            return Replica(worker, every, *regions)
        except OSError as error:
            raise ConfigError(
                f"recovery.replicate_every={every}: no room in memory for snapshots ({error.strerror})"
            ) from error

    replica = together(open_regions, (ConfigError,))
    worker.end.readers.append(replica.finish)
    worker.end.witnesses.append(replica.flips)
    if worker.rank == 0:
        folder.events.write("replica", every=every, bytes=replica.held_bytes, keeper=replica.keeper)
    return replica


class Resume:
    """Rank 0 looks into the folder, records what happens and says it. ``spoiled``: the damaged checkpoints met;
    ``saved``: the step of the checkpoint that the run went on from, 0 when it did not go on from one."""

    def __init__(self, worker: Worker, replica: Replica | None, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.spoiled: set[Path] = set()
        self.saved = 0
        self._worker, self._replica, self._folder, self._say = worker, replica, folder, say
        self._leads = worker.rank == 0

    def go_on(self, from_memory: bool = True) -> Progress | None:
        """Restore the state from memory, or from the newest whole checkpoint, whichever is further -> where it stands;
        None when there is neither. Collective.

        Raises CheckpointError on every rank when there are checkpoints and none of them is whole, nor is memory.
        """
        box = [checkpoint.published(self._folder.checkpoints) if self._leads else []]
        dist.broadcast_object_list(box)
        choice = self._replica.newest() if self._replica is not None and from_memory else None
        further = [path for path in box[0] if choice is None or checkpoint.step_of(path) > choice.step]
        progress, lacking = self._from_checkpoint(further)
        self.saved = 0 if progress is None else progress.step
        if progress is None and choice is not None:
            progress, lacking = self._from_memory(choice), None
        if self._replica is not None:
            self._replica.forget_after(0 if progress is None else progress.step)
        if lacking is not None:
            raise CheckpointError(f"{lacking}; no other is whole, so run.dir={self._folder.path} cannot go on")
        return progress

    def _from_checkpoint(self, paths: Sequence[Path]) -> tuple[Progress | None, CheckpointError | None]:
        """From the last of them that is whole; otherwise what is wrong with the first of them, if there is one."""
        lacking: CheckpointError | None = None
        for path in reversed(paths):
            try:
                progress = checkpoint.load(path, self._worker)
            except DamagedCheckpointError as error:
                lacking = error
                self.spoiled.add(path)
                if self._leads:
                    self._say(f"skipped: {error}")
                    self._folder.events.write("skipped a checkpoint", checkpoint=str(path), reason=str(error))
                continue
            self._note(progress, str(path), source="checkpoint", checkpoint=str(path))
            return progress, None
        return None, lacking

    def _from_memory(self, choice: Choice) -> Progress:
        assert self._replica is not None
        progress = self._replica.restore(choice)
        lost = [owner for owner, holder in sorted(choice.holders.items()) if owner != holder]
        self._note(progress, "memory", source="memory", from_peers=lost)
        return progress

    def _note(self, progress: Progress, origin: str, **details: Any) -> None:
        if self._leads:
            self._folder.events.write("resume", step=progress.step, **details)
            self._say(f"resuming from {origin}, after step {progress.step}")


class Recoveries:
    """What the run recovers from until the next step is taken: ``failure``, after which the launcher started all ranks
    again, or a return to a checkpoint. Made once the ranks are a group."""

    def __init__(self, folder: RunFolder, failure: Failure | None) -> None:
        self._folder, self._failure = folder, failure
        self._returned: tuple[str, float] | None = None
        self._joined = self._loaded = time.monotonic()

    @property
    def after_a_failure(self) -> bool:
        """Whether no step was taken since."""
        return self._failure is not None

    def loaded(self) -> None:
        """The ranks have the state that they go on from."""
        self._loaded = time.monotonic()

    def begin(self, why: str) -> None:
        """The run returns to a checkpoint."""
        self._returned = why, time.monotonic()

    def note(self, step: int) -> None:
        """After a step: record what it was recovered from, and how long that took. By the rank that leads."""
        (failure, self._failure), (returned, self._returned) = (self._failure, None), (self._returned, None)
        if returned is not None:
            self._write(returned[1], cause=returned[0], step=step)
        if failure is not None:
            assert failure.ended is not None, failure
            moments = (failure.noticed, failure.ended, self._joined, self._loaded, time.monotonic())
            spent = {
                stage: round(end - begin, 3) for stage, (begin, end) in zip(STAGES, pairwise(moments), strict=True)
            }
            self._write(failure.noticed, rank=failure.rank, cause=failure.cause, step=step, stages=spent)

    def _write(self, noticed: float, **details: Any) -> None:
        self._folder.events.write("recovery", **details, seconds=round(time.monotonic() - noticed, 3))
