"""Folders of safetensors files, a tensor at a time: read whole models and write them, holding one tensor in memory.

A file is the length of a JSON header in eight bytes, little-endian; the header, which gives for each tensor its dtype,
shape and place; the tensors' bytes. A model is ``model.safetensors``, or several files with
``model.safetensors.index.json``, whose ``weight_map`` says which tensor is in which.

Weights may be stored in FP8 with a scale for every block of 128 x 128 (DeepSeek-V3 report, 3.3), under the weight's
name with ``_scale_inv``: the weight is the stored number *times* the scale.

F rows, D columns.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.huggingface import FP8_BLOCK, HuggingFaceError, Published

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SCALE = "_scale_inv"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and its safetensors dtype."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """The tensors of a folder. Opening reads the headers only.

    Raises HuggingFaceError, naming the file or tensor, when files are missing, damaged or not what the index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path / INDEX
        placed = read_json(index).get("weight_map") if index.is_file() else None
        if index.is_file() and not (isinstance(placed, dict) and all(isinstance(f, str) for f in placed.values())):
            raise HuggingFaceError(f"{index}: weight_map must map the names of tensors to files")
        if placed is None and not (path / SINGLE).is_file():
            raise HuggingFaceError(f"{path} must hold {SINGLE} or {INDEX}")
        names = [SINGLE] if placed is None else sorted(set(placed.values()))
        self._files: dict[str, Any] = {name: _open(path / name) for name in names}
        self.tensors: dict[str, Stored] = {}
        for file, handle in self._files.items():
            for name in handle.keys():  # noqa: SIM118, not a mapping
                part = handle.get_slice(name)
                self.tensors[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
        for name, file in sorted((placed or {}).items()):
            if name not in self.tensors or self.tensors[name].file != file:
                raise HuggingFaceError(f"{path / file} lacks the tensor {name}, which {INDEX} places there")

    def check(self, expected: Iterable[Published], ignored: Callable[[str], bool]) -> None:
        """Refuse a folder that lacks a tensor, has it in another shape or dtype, or has one that is neither expected
        nor ``ignored``: a tensor left out without a word is a wrong model."""
        known = set()
        for tensor in expected:
            stored = self.tensors.get(tensor.name)
            if stored is None:
                raise HuggingFaceError(f"{self.path} lacks the tensor {tensor.name}, of shape {list(tensor.shape)}")
            if stored.dtype not in _DTYPES:
                kinds = ", ".join(_DTYPES)
                raise HuggingFaceError(f"{tensor.name} in {self._where(stored)} is {stored.dtype}; it must be {kinds}")
            self._check_shape(tensor.name, tensor.shape)
            known.add(tensor.name)
            if stored.dtype == "F8_E4M3":
                known.add(tensor.name + _SCALE)
                self._check_scale(tensor)
        for name in sorted(self.tensors.keys() - known):
            if not ignored(name):
                raise HuggingFaceError(f"{name} in {self._where(self.tensors[name])} is no tensor of this model")

    def read(self, tensor: Published) -> Tensor:
        """As it is stored, or in FP32 from FP8; call ``check`` first."""
        stored = self.tensors[tensor.name]
        value: Tensor = self._files[stored.file].get_tensor(tensor.name)
        if stored.dtype != "F8_E4M3":
            return value
        name = tensor.name + _SCALE
        return dequantise(value, self._files[self.tensors[name].file].get_tensor(name))

    def identity(self) -> list[list[Any]]:
        """[file, bytes, modification time in ns] of every file: equal as long as nobody touched them."""
        stats = [(name, (self.path / name).stat()) for name in ["config.json", *self._files]]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _check_scale(self, tensor: Published) -> None:
        name = tensor.name + _SCALE
        if len(tensor.shape) != 2 or name not in self.tensors:
            raise HuggingFaceError(f"{tensor.name} is FP8 and needs the tensor {name}, a scale for every block of it")
        rows, columns = (-(-n // FP8_BLOCK) for n in tensor.shape)
        self._check_shape(name, (rows, columns))
        if self.tensors[name].dtype != "F32":
            raise HuggingFaceError(f"{name} in {self._where(self.tensors[name])} must be F32")

    def _check_shape(self, name: str, shape: Sequence[int]) -> None:
        stored = self.tensors[name]
        if stored.shape != tuple(shape):
            raise HuggingFaceError(
                f"{name} in {self._where(stored)} has the shape {list(stored.shape)}; expected is {list(shape)}"
            )

    def _where(self, stored: Stored) -> str:
        return str(self.path / stored.file)


def dequantise(weight_FD: Tensor, scale_inv: Tensor) -> Tensor:
    """FP8 [F, D] with the scales [F / 128, D / 128], rounded up, of its blocks -> FP32 [F, D]. The blocks of the last
    row and column may be partial."""
    rows, columns = weight_FD.shape
    scale_FD = scale_inv.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return weight_FD.float() * scale_FD


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; HuggingFaceError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HuggingFaceError(f"{path} must be a readable file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise HuggingFaceError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise HuggingFaceError(f"{path} must hold one JSON object")
    return value


def _open(path: Path) -> Any:
    if not path.is_file():
        raise HuggingFaceError(f"{path} is missing")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(_cut_short(path) or f"{path} is no whole safetensors file: {error}") from None


def _cut_short(path: Path) -> str | None:
    """For a file that ends before its tensors do: the first of them that is not whole."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                return f"{path} ends in its header: it has {size} of at least {start} bytes"
            header = json.loads(file.read(start - 8))
        places = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in sorted(places.items(), key=lambda item: item[1]["data_offsets"][1]):
            end = start + entry["data_offsets"][1]
            if end > size:
                whole = f"it has {size} bytes, and the tensor ends at {end}"
                return f"{path} is cut short in {name}, of shape {entry['shape']}: {whole}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError):
        return None
    return None


def shards(tensors: Iterable[Published], dtype: torch.dtype, limit_bytes: int) -> list[list[Published]]:
    """The tensors in files of at most ``limit_bytes``, in order; a larger tensor has a file of its own."""
    found: list[list[Published]] = []
    used = limit_bytes
    for tensor in tensors:
        size = tensor.numel * _stored_as(tensor, dtype).itemsize
        if used + size > limit_bytes or not found:
            found.append([])
            used = 0
        found[-1].append(tensor)
        used += size
    return found


def write_shard(
    path: Path, tensors: Sequence[Published], dtype: torch.dtype, read: Callable[[Published], Tensor]
) -> None:
    """Write a file, one tensor at a time, and flush it to disk; it appears under its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        kind = _stored_as(tensor, dtype)
        start, end = end, end + tensor.numel * kind.itemsize
        header[tensor.name] = {"dtype": _NAMES[kind], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight bytes
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = read(tensor).to(_stored_as(tensor, dtype)).reshape(-1).contiguous()
            assert value.numel() == tensor.numel, (tensor, value.shape)
            file.write(value.view(torch.uint8).numpy().data)
            del value  # before the next one is read
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def shard_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def index_of(files: Mapping[str, Sequence[Published]], dtype: torch.dtype) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``."""
    total = sum(t.numel * _stored_as(t, dtype).itemsize for tensors in files.values() for t in tensors)
    placed = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


def _stored_as(tensor: Published, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if tensor.is_bias else dtype
