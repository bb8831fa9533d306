"""What a rank would lose, in pieces, and copies of it in memory."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

_ALIGNMENT = 64


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


class Snapshot:
    """A copy of the values of some pieces, made again and again in the same memory: ``memory``, uint8 [size_bytes], or
    some of its own, of which every page is touched here, so that no copy waits for one.

    ``mark`` by who changes the pieces, then ``fill`` by whatever thread; until that returns they must not change.
    """

    def __init__(self, pieces: Sequence[Piece], memory: Tensor | None = None) -> None:
        self._sources = [piece.tensor for piece in pieces]
        if memory is None:
            memory = torch.frombuffer(mmap(-1, size_bytes(pieces)), dtype=torch.uint8).zero_()
        self.memory, self.tensors, start = memory, list[Tensor](), 0
        for tensor in self._sources:
            self.tensors.append(self.memory[start : start + tensor.nbytes].view(tensor.dtype))
            start += _aligned(tensor.nbytes)
        device = next((tensor.device for tensor in self._sources if tensor.is_cuda), None)
        self._stream = None
        if device is not None:
            self._stream = torch.cuda.Stream(device)
            # Pinned, or each copy would go through a buffer of the driver's and hold the thread that starts it.
            status = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0)
            torch.cuda.check_error(status)
            # The driver wants a page back before it is unmapped, so the memory lives until then. The end of the
            # process does the same.
            weakref.finalize(self, _unpin, self.memory, self._stream).atexit = False

    def mark(self) -> None:
        """The values to copy are those that the pieces have after what the device has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def fill(self) -> None:
        """Copy all values; they are here when it returns."""
        if self._stream is None:
            self._copy()
            return
        with torch.cuda.stream(self._stream):
            self._copy()
        self._stream.synchronize()

    def changed(self) -> list[int]:
        """Which of the pieces, by number, are not to the bit what was copied last; or their copies are not."""
        pairs = enumerate(zip(self.tensors, self._sources, strict=True))
        return [n for n, (copy, source) in pairs if not torch.equal(_bits(copy).to(source.device), _bits(source))]

    def _copy(self) -> None:
        for target, source in zip(self.tensors, self._sources, strict=True):
            if source.is_cuda:
                target.copy_(source, non_blocking=True)
            else:  # torch would start threads of its own for this thread
                np.copyto(as_bytes(target), as_bytes(source))


def _unpin(memory: Tensor, stream: torch.cuda.Stream) -> None:
    stream.synchronize()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def size_bytes(pieces: Sequence[Piece]) -> int:
    """What a snapshot of them takes."""
    return sum(_aligned(piece.tensor.nbytes) for piece in pieces)


def as_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a one-dimensional tensor on the CPU, a view."""
    return tensor.detach().view(torch.uint8).numpy()


def _bits(tensor: Tensor) -> Tensor:
    """Integers of the same bits, a view: two NaN are as different as their bits."""
    return tensor.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
