"""What memory kept of a run on another layout becomes a checkpoint, from which any layout goes on.

Snapshots are what checkpoints are made of: ranges of the model's tensors, each with its name and place. Ranks that are
started on fewer nodes divide the tensors otherwise, so each writes the snapshots that it finds on its node as files of
a checkpoint, one for each rank that there was, and all publish it together.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from parallel import checkpoint
from parallel.activity import collective_timeout
from parallel.checkpoint import Progress
from parallel.manifest import Entry
from parallel.publish import Publisher
from parallel.recovery import Choice, Copy, newest_whole
from parallel.replica import Mark, Slot, described, layout_of, left_in
from parallel.shard_file import ShardFile, index
from parallel.worker import Worker

Snapshots = dict[tuple[str, int, Copy], tuple[Slot, Mark]]
"""By the layout, and the number of ranks, that they are of."""


def rescue(worker: Worker, regions: Sequence[Path], folder: Path) -> Path | None:
    """Write the newest step that memory has whole of another layout as a checkpoint in ``folder``, unless one there is
    as new, and whole -> that checkpoint. Then the ``regions`` are empty, which are this rank's share of those on its
    node. Collective, on all ranks. Raises CheckpointError on every rank when it cannot be written."""
    timeout = collective_timeout(worker.job.timeout_seconds)
    group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
    publisher = Publisher(folder, group)
    found = _found(regions, worker.rank, layout_of(worker))
    everything = {key for keys in publisher.gather(list(found)) for key in keys}
    if not everything:
        return None
    path, newest = None, _newest(publisher, worker.rank, found, everything)
    if newest is not None and not _is_saved(publisher, newest[0].step):
        choice, layout, ranks = newest
        own = [found[layout, ranks, copy] for copy in choice.copies() if copy.holder == worker.rank]
        path = _write(publisher, own)
    publisher.gather(None)  # nobody reads them any more
    for region in regions:
        os.truncate(region, 0)
    publisher.gather(None)
    return path


def _found(regions: Sequence[Path], rank: int, here: str) -> Snapshots:
    """What is there of another layout than the one ``here``."""
    found: Snapshots = {}
    for slot in [slot for path in regions for slot in left_in(path)]:
        mark = slot.mark()
        if mark is not None and mark.layout != here:
            key = mark.layout, mark.ranks, Copy(mark.owner, rank, mark.step)
            if key not in found or not found[key][0].is_whole():
                found[key] = slot, mark
    return found


def _newest(
    publisher: Publisher, rank: int, found: Snapshots, everything: set[tuple[str, int, Copy]]
) -> tuple[Choice, str, int] | None:
    """The newest step that is whole, of any layout; ``found`` on this rank, of ``everything`` that there is."""
    newest: tuple[Choice, str, int] | None = None
    for layout, ranks in sorted({(layout, ranks) for layout, ranks, _ in everything}):

        def damaged_of(copies: list[Copy], layout: str = layout, ranks: int = ranks) -> list[Copy]:
            own = [copy for copy in copies if copy.holder == rank and not found[layout, ranks, copy][0].is_whole()]
            return [copy for part in publisher.gather(own) for copy in part]

        choice = newest_whole([copy for *of, copy in everything if of == [layout, ranks]], ranks, damaged_of)
        if choice is not None and (newest is None or choice.step > newest[0].step):
            newest = choice, layout, ranks
    return newest


def _is_saved(publisher: Publisher, step: int) -> bool:
    """Whether a checkpoint is whole that has the step, or a later one."""
    paths = publisher.gather(checkpoint.published(publisher.folder))[0]
    return any(checkpoint.damage(path) is None for path in reversed(paths) if checkpoint.step_of(path) >= step)


def _write(publisher: Publisher, own: Sequence[tuple[Slot, Mark]]) -> Path:
    pieces = {mark.owner: described(slot.values) for slot, mark in own}
    files = {owner: ShardFile(f"__{owner}_0.distcp", of) for owner, of in pieces.items()}
    places = publisher.gather([place for file in files.values() for place in file.places])
    # What several ranks hold alike is in the file of each; one of them is enough.
    once = {(place.name, place.offset): place for part in places for place in part}
    (progress,) = {of for part in publisher.gather([Progress(m.step, m.sequences) for _, m in own]) for of in part}

    def write(partial: Path) -> dict[str, Entry]:
        return {file.name: file.write(partial, (p.tensor for p in pieces[owner])) for owner, file in files.items()}

    return publisher.publish(progress, write, index(once.values()))
