"""Checkpoints: every rank writes what it owns, into a folder that appears under its name only when it is whole.

A parameter's state (master, first and second moment, and its average if one is kept) is a one-dimensional tensor of the
whole model, of which each rank contributes the ranges that its shards hold; nothing in the folder depends on the layout
that wrote it. The files and their index are torch's distributed checkpoint; beside them ``state.json`` has the step and
the data position.

A save (``saver.py``) goes into ``.NAME.partial``, is flushed to disk and then renamed, so that whatever is called
``step-...`` was complete at that moment. A manifest has the checksum of every file: what a disk does to one later is
seen before it is loaded.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from model.router import Router
from model.transformer import Transformer
from parallel import manifest
from parallel.manifest import MANIFEST, Entry
from parallel.snapshot import Piece
from parallel.worker import Worker

PREFIX = "step-"
INDEX = ".metadata"
STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; one line that says which, and why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written; nothing of it was loaded."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``sequences``: training sequences consumed, the position in the data."""

    step: int
    sequences: int


def pieces(worker: Worker, rng: Tensor, loading: bool) -> list[Piece]:
    """Everything that a rank saves, or needs. What several ranks hold alike (the routers' biases) is needed by all of
    them and saved by one."""
    found = [Piece(f"rng.{worker.rank}", rng, 0, rng.numel())]
    optimizer = worker.optimizer
    for number, bucket in enumerate(optimizer.buckets):
        flats = {
            "master": bucket.master,
            "first_moment": optimizer.first[number],
            "second_moment": optimizer.second[number],
        }
        if worker.average is not None:
            flats["ema"] = worker.average.shards[number]
        for s in bucket.owned_segments():
            for kind, flat in flats.items():
                found.append(Piece(f"{kind}.{s.name}", flat[s.start : s.start + s.numel], s.offset, s.total))
    for held in worker.held.values():
        for name, module in held.stage.model.named_modules():
            if isinstance(module, Router) and (loading or held.counts):
                found.append(Piece(f"bias.{name.removesuffix('.router')}", module.bias_E, 0, module.bias_E.numel()))
    return found


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._wanted = {(p.name, p.offset): p for p in pieces}
        self.lacks_average = False

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items: list[ReadItem] = []
        for piece in self._wanted.values():
            stored = self.metadata.state_dict_metadata.get(piece.name)
            if stored is None and piece.name.startswith("rng."):
                continue  # written by fewer ranks: this one keeps the state that its seed gave it
            if stored is None and piece.name.startswith("ema."):
                self.lacks_average = True
                continue
            if not isinstance(stored, TensorStorageMetadata) or stored.size != torch.Size([piece.total]):
                raise CheckpointError(f"{piece.name} has {piece.total} elements here and {_elements(stored)} there")
            items += create_read_items_for_chunk_list(piece.name, stored, [piece.chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        (offset,) = read_item.dest_index.offset or (0,)
        piece = self._wanted[read_item.dest_index.fqn, offset]
        return piece.tensor.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # resolve_tensor gave a view of the place itself


def _elements(stored: Any) -> str:
    return "none" if stored is None else f"{stored.size.numel()} elements"


def load(path: Path, worker: Worker) -> Progress:
    """Restore a rank's state from a checkpoint of the same model, whatever the layout that wrote it. Collective.

    Raises CheckpointError on every rank when it cannot be read or is of another model, and DamagedCheckpointError,
    before anything is loaded, when it is not what was written.
    """
    if (what := damage(path)) is not None:
        raise DamagedCheckpointError(f"checkpoint {path} {what}")
    if worker.average is not None:
        worker.average.finish()
    rng = torch.get_rng_state()
    planner = _LoadPlanner(pieces(worker, rng, loading=True))
    try:
        progress = Progress(**json.loads((path / STATE).read_text()))
        _refuse_strangers(path, worker)
        load_distributed({}, checkpoint_id=path, planner=planner, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_cause(error)}") from error
    adopt(worker, progress, rng)
    if worker.average is not None and planner.lacks_average:  # written by a run that kept none
        worker.average.restart()
    return progress


def adopt(worker: Worker, progress: Progress, rng: Tensor) -> None:
    """Go on from the values that are in the worker's pieces. Collective."""
    torch.set_rng_state(rng)
    worker.optimizer.steps = progress.step
    for bucket in worker.optimizer.buckets:
        bucket.gathered()  # of a step before
        bucket.publish()
        bucket.gather()
        bucket.gathered()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint ("is incomplete: ..." or "is damaged: ..."), or None when it is whole, to the
    last bit. Collective: every rank reads a share of the files, and all get the same answer."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    lacks = missing(path) if rank == 0 else None
    broken = manifest.problem(path, rank, ranks) if lacks is None else None
    own = f"is incomplete: {lacks}" if lacks else f"is damaged: {broken}" if broken else None
    if ranks == 1:
        return own
    found: list[str | None] = [None] * ranks
    dist.all_gather_object(found, own)
    return next((what for what in found if what is not None), None)


def _refuse_strangers(path: Path, worker: Worker) -> None:
    """A parameter that the checkpoint has and the model has not would be left out without a word."""
    with torch.device("meta"):
        known = {f"master.{name}" for name, _ in Transformer(worker.job.model).named_parameters()}
    stored = {name for name in FileSystemReader(path).read_metadata().state_dict_metadata if name.startswith("master.")}
    if stored - known:
        raise CheckpointError(f"{min(stored - known)} is not in this model")


def step_of(path: Path) -> int:
    """By its name."""
    return int(path.name[len(PREFIX) :])


def published(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not."""
    named = folder.glob(f"{PREFIX}*")  # "step-6.best" is a user's own
    return sorted((path for path in named if path.name[len(PREFIX) :].isdecimal()), key=step_of)


def newest_step(folder: Path) -> int:
    """That of the newest checkpoint that lacks nothing; 0 where there is none."""
    newest = newest_complete(folder)
    return 0 if newest is None else step_of(newest)


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that lacks nothing, if there is one."""
    return next((path for path in reversed(published(folder)) if missing(path) is None), None)


def missing(path: Path) -> str | None:
    """What a checkpoint lacks to be complete (a file, or a part of one), or None."""
    for name in (STATE, INDEX, MANIFEST):
        if not (path / name).is_file():
            return f"{name} is missing"
    try:
        progress = Progress(**json.loads((path / STATE).read_text()))
        if not all(type(value) is int and value >= 0 for value in asdict(progress).values()):
            raise ValueError("step and sequences must be counts")
    except (ValueError, TypeError) as error:
        return f"{STATE} is damaged ({error})"
    try:
        manifest.read(path)
    except ValueError as error:
        return str(error)
    try:
        needed: dict[str, int] = {}
        for place in (FileSystemReader(path).read_metadata().storage_data or {}).values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # whatever unpickling other bytes may raise
        return f"{INDEX} is damaged ({' '.join(str(error).split())})"
    for name, size in needed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def seal(folder: Path, progress: Progress, entries: Mapping[str, Entry]) -> None:
    """Put the progress and the manifest, of which ``entries`` are the payload's, beside the payload, and all of it on
    disk."""
    (folder / STATE).write_text(json.dumps(asdict(progress)) + "\n")
    manifest.write(folder, {**entries, **manifest.describe(folder, (STATE, INDEX))})
    for file in (folder / INDEX, folder / STATE, folder / MANIFEST, folder):
        fsync(file)


def fsync(path: Path) -> None:
    """Have the disk take what was written to a file or folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong underneath: torch's checkpoint wraps every rank's failure in one of its own."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
