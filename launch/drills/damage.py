"""What a disk, or a copy that went wrong, does to a checkpoint."""

import enum
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader

from parallel.checkpoint import INDEX, STATE
from parallel.manifest import MANIFEST

PAGE_BYTES = 4096


class Damage(enum.Enum):
    BIT_FLIP = "one bit of a shard flipped"
    ZEROED_PAGE = "a page of a shard zeroed"
    TRUNCATION = "half of a shard missing"
    MISSING_SHARD = "a shard missing"
    STALE_SHARD = "a shard of the one before"
    EMPTY_SHARD = "a shard of no bytes"
    EXTRA_BYTE = "one byte more in a shard"
    SWAPPED_SHARDS = "two shards under each other's name"
    MISSING_INDEX = "no index"
    DAMAGED_INDEX = "one bit of the index flipped"
    MISSING_MANIFEST = "no manifest"
    DAMAGED_MANIFEST = "half of the manifest missing"
    OTHER_PROGRESS = "another step in state.json"


@dataclass(frozen=True)
class _Masters:
    """The longest run of master weights in a checkpoint: bytes ``offset`` .. of a file. Damage there would be trained
    with, if it was loaded."""

    file: Path
    offset: int
    length: int


def apply(damage: Damage, newest: Path, older: Path) -> tuple[str, ...]:
    """Damage the checkpoint ``newest`` -> the names of the files that are not what they were. ``older`` is the
    checkpoint before it."""
    masters = _masters(newest)
    file = masters.file
    match damage:
        case Damage.BIT_FLIP:
            _flip(file, masters.offset + masters.length // 2)
        case Damage.ZEROED_PAGE:
            _zero_page(masters)
        case Damage.TRUNCATION:
            os.truncate(file, file.stat().st_size // 2)
        case Damage.MISSING_SHARD:
            file.unlink()
        case Damage.STALE_SHARD:
            shutil.copyfile(older / file.name, file)
        case Damage.EMPTY_SHARD:
            os.truncate(file, 0)
        case Damage.EXTRA_BYTE:
            os.truncate(file, file.stat().st_size + 1)
        case Damage.SWAPPED_SHARDS:
            other = next(shard for shard in sorted(newest.glob("__*")) if shard != file)
            aside = file.rename(newest / "aside")
            other.rename(file)
            aside.rename(other)
            return file.name, other.name
        case Damage.MISSING_INDEX | Damage.MISSING_MANIFEST:
            file = newest / (INDEX if damage is Damage.MISSING_INDEX else MANIFEST)
            file.unlink()
        case Damage.DAMAGED_INDEX:
            file = newest / INDEX
            _flip(file, file.stat().st_size // 2)
        case Damage.DAMAGED_MANIFEST:
            file = newest / MANIFEST
            os.truncate(file, file.stat().st_size // 2)
        case Damage.OTHER_PROGRESS:
            file = newest / STATE
            progress = json.loads(file.read_text())
            file.write_text(json.dumps({**progress, "step": progress["step"] - 1}) + "\n")
        case _:
            raise AssertionError(damage)
    return (file.name,)


def _flip(file: Path, place: int) -> None:
    """One bit of the byte there."""
    _overwrite(file, place, bytes([_read(file, place, 1)[0] ^ 0x10]))


def _zero_page(masters: _Masters) -> None:
    file, quarter, end = masters.file, masters.length // 4, masters.offset + masters.length
    first = max((masters.offset + 2 * quarter) // PAGE_BYTES * PAGE_BYTES, masters.offset + quarter)
    length = min(PAGE_BYTES, end - quarter - first)  # not the ends, where torch keeps what it would miss
    if not any(_read(file, first, length)):
        raise ValueError(f"{file} has no page of master weights that zeros would change")
    _overwrite(file, first, bytes(length))


def _masters(checkpoint: Path) -> _Masters:
    stored = FileSystemReader(checkpoint).read_metadata().storage_data
    masters = [place for index, place in stored.items() if index.fqn.startswith("master.")]
    longest = max(masters, key=lambda place: place.length)
    return _Masters(checkpoint / longest.relative_path, longest.offset, longest.length)


def _read(file: Path, offset: int, length: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)
