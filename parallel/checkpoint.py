"""Checkpoints: every rank writes what it owns, into a folder that appears under its name only when it is whole.

A parameter's state (master, first and second moment) is a one-dimensional tensor of the whole model, of which each
rank contributes the ranges that its shards hold; nothing in the folder depends on the layout that wrote it. The files
and their index are torch's distributed checkpoint; beside them ``state.json`` has the step and the data position.

A save goes into ``.NAME.partial``, is flushed to disk and then renamed, so that whatever is called ``step-...`` was
complete at that moment. A manifest has the checksum of every file: what a disk does to one later is seen before it is
loaded.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from model.router import Router
from model.transformer import Transformer
from parallel import manifest
from parallel.manifest import MANIFEST, Entry
from parallel.worker import Worker

_PREFIX = "step-"
_STATE = "state.json"
_INDEX = ".metadata"
_NO_ROOM_BYTES = 1 << 16
"""Free bytes up to which a failed write is put down to a full file system."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; one line that says which, and why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written; nothing of it was loaded."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``sequences``: training sequences consumed, the position in the data."""

    step: int
    sequences: int


@dataclass(frozen=True)
class Piece:
    """Elements ``offset`` .. of the one-dimensional tensor ``name`` of ``total`` elements, held here."""

    name: str
    tensor: Tensor
    offset: int
    total: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([self.tensor.numel()]))


def pieces(worker: Worker, rng: Tensor, loading: bool) -> list[Piece]:
    """Everything that a rank saves, or needs. What several ranks hold alike (the routers' biases) is needed by all of
    them and saved by one."""
    found = [Piece(f"rng.{worker.rank}", rng, 0, rng.numel())]
    optimizer = worker.optimizer
    for bucket, first, second in zip(optimizer.buckets, optimizer.first, optimizer.second, strict=True):
        for s in bucket.owned_segments():
            for kind, flat in (("master", bucket.master), ("first_moment", first), ("second_moment", second)):
                found.append(Piece(f"{kind}.{s.name}", flat[s.start : s.start + s.numel], s.offset, s.total))
    for held in worker.held.values():
        for name, module in held.stage.model.named_modules():
            if isinstance(module, Router) and (loading or held.counts):
                found.append(Piece(f"bias.{name.removesuffix('.router')}", module.bias_E, 0, module.bias_E.numel()))
    return found


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self._pieces = {MetadataIndex(p.name, torch.Size([p.offset])): p for p in pieces}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(index, piece) for index, piece in self._pieces.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._pieces[write_item.index].tensor.detach().cpu()

    @staticmethod
    def _item(index: MetadataIndex, piece: Piece) -> WriteItem:
        properties = TensorProperties.create_from_tensor(piece.tensor)
        data = TensorWriteData(piece.chunk, properties, torch.Size([piece.total]))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._wanted = {(p.name, p.offset): p for p in pieces}

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items: list[ReadItem] = []
        for piece in self._wanted.values():
            stored = self.metadata.state_dict_metadata.get(piece.name)
            if stored is None and piece.name.startswith("rng."):
                continue  # written by fewer ranks: this one keeps the state that its seed gave it
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


def save(folder: Path, worker: Worker, progress: Progress, keep: int, spoiled: Set[Path] = frozenset()) -> Path:
    """Write a checkpoint under ``folder`` and delete complete ones but for the newest ``keep``. Collective.
    ``spoiled``: those that are known not to be what was written; they neither count nor go.

    Raises CheckpointError on every rank when any of them cannot write; what was there before stays as it was.
    """
    final = folder / f"{_PREFIX}{progress.step:08d}"
    partial = folder / f".{final.name}.partial"
    leads = worker.rank == 0

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    try:
        _on_leader(begin, leads)
        planner = _SavePlanner(pieces(worker, torch.get_rng_state(), loading=False))
        save_distributed({}, checkpoint_id=partial, planner=planner, no_dist=not dist.is_initialized())
        entries = _describe_own(partial, worker.rank)
        _on_leader(lambda: _publish(partial, final, progress, entries), leads)
    except (CheckpointException, OSError) as error:
        cause = _cause(error) if _has_room(folder) else os.strerror(ENOSPC)  # before the partial one makes room again
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint {final} cannot be written: {cause}") from error
    if leads:
        # Damaged ones neither count nor go: they are evidence, and not ours to judge by their names.
        complete = [
            path for path in published(folder) if path == final or (path not in spoiled and missing(path) is None)
        ]
        for old in complete[:-keep]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: Path, worker: Worker) -> Progress:
    """Restore a rank's state from a checkpoint of the same model, whatever the layout that wrote it. Collective.

    Raises CheckpointError on every rank when it cannot be read or is of another model, and DamagedCheckpointError,
    before anything is loaded, when it is not what was written.
    """
    if (what := damage(path)) is not None:
        raise DamagedCheckpointError(f"checkpoint {path} {what}")
    rng = torch.get_rng_state()
    planner = _LoadPlanner(pieces(worker, rng, loading=True))
    try:
        progress = Progress(**json.loads((path / _STATE).read_text()))
        _refuse_strangers(path, worker)
        load_distributed({}, checkpoint_id=path, planner=planner, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_cause(error)}") from error
    torch.set_rng_state(rng)
    worker.optimizer.steps = progress.step
    for bucket in worker.optimizer.buckets:
        bucket.publish()
        bucket.gather()
    return progress


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


def _describe_own(partial: Path, rank: int) -> dict[str, Entry]:
    """The manifest's entries of what all ranks wrote, each read by who wrote it. An OSError is raised on every rank."""
    own: dict[str, Entry] | OSError
    try:
        own = manifest.describe(partial, (file.name for file in partial.glob(f"__{rank}_*")))
    except OSError as error:
        own = error
    found: list[dict[str, Entry] | OSError] = [own]
    if dist.is_initialized():
        found = found * dist.get_world_size()
        dist.all_gather_object(found, own)
    entries: dict[str, Entry] = {}
    for part in found:
        if isinstance(part, OSError):
            raise part
        entries |= part
    return entries


def _refuse_strangers(path: Path, worker: Worker) -> None:
    """A parameter that the checkpoint has and the model has not would be left out without a word."""
    with torch.device("meta"):
        known = {f"master.{name}" for name, _ in Transformer(worker.job.model).named_parameters()}
    stored = {name for name in FileSystemReader(path).read_metadata().state_dict_metadata if name.startswith("master.")}
    if stored - known:
        raise CheckpointError(f"{min(stored - known)} is not in this model")


def published(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not."""
    steps = {path: path.name[len(_PREFIX) :] for path in folder.glob(f"{_PREFIX}*")}  # "step-6.best" is a user's own
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def missing(path: Path) -> str | None:
    """What a checkpoint lacks to be complete (a file, or a part of one), or None."""
    for name in (_STATE, _INDEX, MANIFEST):
        if not (path / name).is_file():
            return f"{name} is missing"
    try:
        progress = Progress(**json.loads((path / _STATE).read_text()))
        if not all(type(value) is int and value >= 0 for value in asdict(progress).values()):
            raise ValueError("step and sequences must be counts")
    except (ValueError, TypeError) as error:
        return f"{_STATE} is damaged ({error})"
    try:
        manifest.read(path)
    except ValueError as error:
        return str(error)
    try:
        needed: dict[str, int] = {}
        for place in (FileSystemReader(path).read_metadata().storage_data or {}).values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # whatever unpickling other bytes may raise
        return f"{_INDEX} is damaged ({' '.join(str(error).split())})"
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
    (folder / _STATE).write_text(json.dumps(asdict(progress)) + "\n")
    manifest.write(folder, {**entries, **manifest.describe(folder, (_STATE, _INDEX))})
    for file in (folder / _STATE, folder / MANIFEST, folder):
        _fsync(file)


def _publish(partial: Path, final: Path, progress: Progress, entries: Mapping[str, Entry]) -> None:
    seal(partial, progress, entries)
    replaced = None
    if final.exists():  # the same step, written by a run that was resumed from before it
        damaged = manifest.problem(final) is not None
        replaced = _unused(final.with_suffix(".damaged")) if damaged else partial.with_suffix(".replaced")
        os.rename(final, replaced)
    os.rename(partial, final)
    _fsync(final.parent)
    if replaced is not None and not damaged:  # a damaged one stays: it is evidence
        shutil.rmtree(replaced, ignore_errors=True)


def _unused(path: Path) -> Path:
    """The path, or with the first number that makes it new."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(candidate for candidate in (path, *itertools.islice(numbered, 1000)) if not candidate.exists())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _has_room(folder: Path) -> bool:
    """Whether the file system can take anything more: torch's own words on a full one are about its archive."""
    try:
        return shutil.disk_usage(folder).free > _NO_ROOM_BYTES
    except OSError:
        return True  # there is something else to say


def _cause(error: BaseException) -> str:
    """The first line of what went wrong underneath: torch's checkpoint wraps every rank's failure in one of its own."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _on_leader(action: Callable[[], None], leads: bool) -> None:
    """Run ``action`` on rank 0 while the others wait. An OSError there is raised on every rank."""
    box: list[OSError | None] = [None]
    if leads:
        try:
            action()
        except OSError as error:
            box[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if box[0] is not None:
        raise box[0]
