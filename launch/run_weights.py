"""The weights of a checkpoint, tensor by tensor, without a job around them.

A checkpoint (``parallel/checkpoint.py``) holds for every parameter a one-dimensional FP32 master and two moments, each
in any number of chunks, and the routers' biases. ``RunWeights`` reads masters and biases in ranges, one chunk in memory
at a time. ``RunWeightsWriter`` makes the checkpoint of step 0 out of weights from elsewhere; its moments are zero, and
take no space, because a tensor that repeats one element is stored as that element.
"""

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from model.huggingface import Published
from parallel import checkpoint, manifest
from parallel.checkpoint import CheckpointError, Progress

_MOMENTS = ("first_moment", "second_moment")


def newest(checkpoints: Path) -> Path:
    """The newest complete checkpoint in a run's folder of them. Raises CheckpointError when there is none."""
    lacking = "it holds no checkpoint"
    for path in reversed(checkpoint.published(checkpoints)):
        what = checkpoint.damage(path)
        if what is None:
            return path
        lacking = f"{path.name} {what}"
    raise CheckpointError(f"{checkpoints} has no complete checkpoint: {lacking}")


class RunWeights:
    """``ema``: the average in place of the masters. Raises CheckpointError, naming the parameter, when the checkpoint
    has not what is asked for."""

    def __init__(self, path: Path, ema: bool = False) -> None:
        self.path, self.ema = path, ema
        self._reader = FileSystemReader(path)
        self._metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._held: tuple[tuple[str, int], Tensor] | None = None
        if ema and not any(key.startswith("ema.") for key in self._metadata.state_dict_metadata):
            raise CheckpointError(
                f"--ema: {path} has no average; optimizer.ema_decay above 0 keeps one, which begins with training"
            )

    def check(self, tensors: Sequence[Published]) -> None:
        """Refuse a checkpoint of another model: parameters that lack, are of another size, or are no part of it."""
        wanted: dict[str, int] = {}
        for tensor in tensors:
            key = self._key(tensor)
            wanted[key] = wanted.get(key, 0) + tensor.numel
        for key, numel in wanted.items():
            stored = self._stored(key)
            if stored.size.numel() != numel:
                raise CheckpointError(
                    f"{key} in {self.path} has {stored.size.numel()} elements; the run's model has {numel}"
                )
        kinds = ("ema." if self.ema else "master.", "bias.")
        masters = {key for key in self._metadata.state_dict_metadata if key.startswith(kinds)}
        if masters - wanted.keys():
            raise CheckpointError(f"{min(masters - wanted.keys())} in {self.path} is not in the run's model")

    def read(self, tensor: Published) -> Tensor:
        """FP32, in the published shape."""
        key = self._key(tensor)
        out = torch.empty(tensor.numel)
        first, last = tensor.offset, tensor.offset + tensor.numel
        filled = 0
        for chunk in self._stored(key).chunks:
            low, high = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
            if low < high:
                start = low - chunk.offsets[0]
                out[low - first : high - first] = self._chunk(key, chunk)[start : start + high - low]
                filled += high - low
        if filled != tensor.numel:
            raise CheckpointError(f"{key} in {self.path} has {filled} of {tensor.numel} elements of {tensor.name}")
        return out.view(tensor.shape)

    def _key(self, tensor: Published) -> str:
        key = _key(tensor)
        return key.replace("master.", "ema.", 1) if self.ema and not tensor.is_bias else key

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self.path} lacks {key}")
        return stored

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A chunk as a whole, kept until another one is asked for: torch stores each as one object."""
        place = (key, chunk.offsets[0])
        if self._held is None or self._held[0] != place:
            self._held = None
            into = torch.empty(chunk.sizes)
            items = create_read_items_for_chunk_list(key, self._stored(key), [chunk])
            try:
                self._reader.read_data(LoadPlan(items), _Into(into)).wait()
            except Exception as error:  # whatever unpickling other bytes may raise
                raise CheckpointError(f"{key} in {self.path} cannot be read: {' '.join(str(error).split())}") from error
            self._held = place, into
        return self._held[1]


class _Into(DefaultLoadPlanner):
    """Reads one chunk into a tensor of its size."""

    def __init__(self, into: Tensor) -> None:
        super().__init__()
        self._into = into

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self._into.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


@dataclass(frozen=True)
class _Chunk:
    """Elements ``offset`` .. of the tensor ``key``, as an object of ``length`` bytes at ``start`` of a file."""

    key: str
    offset: int
    numel: int
    start: int
    length: int


class RunWeightsWriter:
    """Writes the checkpoint of step 0 into the existing folder ``path``, a file at a time. ``has`` says whether an
    earlier attempt that was interrupted has left a file whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, number: int) -> bool:
        return self._index_file(number).is_file()

    def write_file(self, number: int, tensors: Sequence[Published], read: Callable[[Published], Tensor]) -> None:
        """Write the masters and biases ``tensors`` as file ``number``, flushed to disk."""
        chunks = []
        file = self.path / self._name(number)
        with file.open("wb") as stream:
            for tensor in tensors:
                # A copy: torch would save the whole of the storage that a view looks at.
                value = read(tensor).reshape(-1).to(torch.float32, copy=True)
                start = stream.tell()
                torch.save(value, stream)
                del value  # before the next one is read
                chunks.append(_Chunk(_key(tensor), tensor.offset, tensor.numel, start, stream.tell() - start))
            stream.flush()
            os.fsync(stream.fileno())
        aside = self._index_file(number).with_suffix(".part")
        _write_flushed(aside, json.dumps([asdict(chunk) for chunk in chunks]).encode())
        os.replace(aside, self._index_file(number))

    def finish(self, files: int) -> None:
        """Write the moments, torch's index of files 0 .. ``files`` - 1, and the progress of a run that is at its
        beginning."""
        placed = {number: self._written(number) for number in range(files)}
        sizes: dict[str, int] = {}
        for chunks in placed.values():
            for chunk in chunks:
                sizes[chunk.key] = sizes.get(chunk.key, 0) + chunk.numel
        placed[files] = self._write_moments(files, sizes)
        properties = TensorProperties(dtype=torch.float32)
        tensors: dict[str, TensorStorageMetadata] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for number, chunks in placed.items():
            for chunk in chunks:
                size = torch.Size([sizes[chunk.key]])
                stored = tensors.setdefault(chunk.key, TensorStorageMetadata(properties, size, []))
                stored.chunks.append(ChunkStorageMetadata(torch.Size([chunk.offset]), torch.Size([chunk.numel])))
                index = MetadataIndex(chunk.key, torch.Size([chunk.offset]))
                storage[index] = _StorageInfo(self._name(number), chunk.start, chunk.length)
        _write_flushed(self.path / ".metadata", pickle.dumps(Metadata(dict(tensors), storage_data=storage)))
        for number in range(files):
            self._index_file(number).unlink()
        names = (self._name(number) for number in placed)
        checkpoint.seal(self.path, Progress(step=0, sequences=0), manifest.describe(self.path, names))

    def _write_moments(self, number: int, sizes: dict[str, int]) -> list[_Chunk]:
        """Zeros for every master; adds their sizes to ``sizes``."""
        chunks = []
        with (self.path / self._name(number)).open("wb") as stream:
            for key, numel in list(sizes.items()):
                kind, _, name = key.partition(".")
                if kind != "master":
                    continue
                for moment in _MOMENTS:
                    start = stream.tell()
                    torch.save(torch.zeros(1).expand(numel), stream)
                    sizes[f"{moment}.{name}"] = numel
                    chunks.append(_Chunk(f"{moment}.{name}", 0, numel, start, stream.tell() - start))
        return chunks

    def _written(self, number: int) -> list[_Chunk]:
        return [_Chunk(**values) for values in json.loads(self._index_file(number).read_text())]

    def _index_file(self, number: int) -> Path:
        return self.path / f"{self._name(number)}.json"

    @staticmethod
    def _name(number: int) -> str:
        return f"__0_{number}.distcp"


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _key(tensor: Published) -> str:
    """The checkpoint's name of the tensor that holds it."""
    if tensor.is_bias:
        return f"bias.{tensor.parameter.removesuffix('.router.bias_E')}"
    return f"master.{tensor.parameter}"
