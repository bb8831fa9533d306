"""The file that one rank adds to a checkpoint, and the index of all of them: torch's distributed checkpoint reads both.

Such a file is a row of archives, one for each tensor, as ``torch.save`` writes them. torch's own writer makes them anew
in every save, and holds Python's lock meanwhile: a training loop beside it loses half its speed. What surrounds a
tensor's bytes depends on its size and type only (except for a CRC-32, which is left out, and which torch never reads).
So it is made once, and a save is left with plain writes, which let Python go on: a thread that does them costs the loop
no more than a process would (``benchmarks/checkpoint.py``).
"""

import contextlib
import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from parallel.manifest import Entry
from parallel.snapshot import Piece, as_bytes

_BLOCK_BYTES = 1 << 22
_LOCAL_HEADER_BYTES = 30
"""The fixed part of what precedes a file in a zip archive; its last four bytes are the lengths of name and extra."""


@dataclass(frozen=True)
class Place:
    """Where a piece lies: ``length`` bytes from ``start`` of ``file`` are the archive with its elements."""

    name: str
    offset: int
    numel: int
    total: int
    dtype: torch.dtype
    file: str
    start: int
    length: int


class ShardFile:
    """The file ``name`` with these pieces, of which only sizes and types are looked at."""

    def __init__(self, name: str, pieces: Sequence[Piece]) -> None:
        self.name = name
        self.places: list[Place] = []
        self._frames: list[tuple[bytes, bytes]] = []
        start = 0
        for p in pieces:
            numel, dtype = p.tensor.numel(), p.tensor.dtype
            head, tail = _frame(numel, dtype)
            length = len(head) + numel * dtype.itemsize + len(tail)
            self._frames.append((head, tail))
            self.places.append(Place(p.name, p.offset, numel, p.total, dtype, name, start, length))
            start += length

    def write(self, folder: Path, tensors: Iterable[Tensor]) -> Entry:
        """Write the file with these values of the pieces, and flush it to disk -> its manifest's entry, computed from
        memory and not from what the disk made of it. Raises OSError."""
        size = checksum = 0
        with (folder / self.name).open("wb") as stream:
            for (head, tail), tensor in zip(self._frames, tensors, strict=True):
                for part in (memoryview(head), as_bytes(tensor.cpu()).data, memoryview(tail)):
                    for low in range(0, len(part), _BLOCK_BYTES):
                        block = part[low : low + _BLOCK_BYTES]
                        checksum = zlib.crc32(block, checksum)
                        size += stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return Entry(size, checksum)


def index(places: Iterable[Place]) -> bytes:
    """The content of ``.metadata`` for the pieces of all files."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for p in places:
        stored = tensors.setdefault(
            p.name, TensorStorageMetadata(TensorProperties(dtype=p.dtype), torch.Size([p.total]), [])
        )
        stored.chunks.append(ChunkStorageMetadata(torch.Size([p.offset]), torch.Size([p.numel])))
        storage[MetadataIndex(p.name, torch.Size([p.offset]))] = _StorageInfo(p.file, p.start, p.length)
    return pickle.dumps(Metadata(dict(tensors), storage_data=storage))


@cache
def _frame(numel: int, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What comes before and after the bytes of a tensor in its archive; a model has many tensors of a size."""
    archive = io.BytesIO()
    with _without_crc32():
        torch.save(torch.zeros(numel, dtype=dtype), archive)
    (data,) = (file for file in zipfile.ZipFile(archive).infolist() if file.filename.endswith("/data/0"))
    image = archive.getbuffer()
    lengths = image[data.header_offset : data.header_offset + _LOCAL_HEADER_BYTES][-4:]
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    start = data.header_offset + _LOCAL_HEADER_BYTES + name + extra
    return bytes(image[:start]), bytes(image[start + data.file_size :])


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """torch keeps this choice in a global, which is put back."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
