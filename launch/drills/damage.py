"""What a disk, or a copy that went wrong, does to a checkpoint."""

import enum
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader

PAGE_BYTES = 4096


class Damage(enum.Enum):
    BIT_FLIP = "one bit of a shard flipped"
    ZEROED_PAGE = "a page of a shard zeroed"
    TRUNCATION = "half of a shard missing"
    MISSING_SHARD = "a shard missing"
    STALE_SHARD = "a shard of the one before"


@dataclass(frozen=True)
class _Masters:
    """The longest run of master weights in a checkpoint: bytes ``offset`` .. of a file. Damage there would be trained
    with, if it was loaded."""

    file: Path
    offset: int
    length: int


def apply(damage: Damage, newest: Path, older: Path) -> str:
    """Damage a shard of the checkpoint ``newest`` -> the shard's file name. ``older`` is the checkpoint before it."""
    masters = _masters(newest)
    file = masters.file
    match damage:
        case Damage.BIT_FLIP:
            place = masters.offset + masters.length // 2
            _overwrite(file, place, bytes([_read(file, place, 1)[0] ^ 0x10]))
        case Damage.ZEROED_PAGE:
            quarter, end = masters.length // 4, masters.offset + masters.length
            first = max((masters.offset + 2 * quarter) // PAGE_BYTES * PAGE_BYTES, masters.offset + quarter)
            length = min(PAGE_BYTES, end - quarter - first)  # not the ends, where torch keeps what it would miss
            if not any(_read(file, first, length)):
                raise ValueError(f"{file} has no page of master weights that zeros would change")
            _overwrite(file, first, bytes(length))
        case Damage.TRUNCATION:
            with file.open("r+b") as stream:
                stream.truncate(file.stat().st_size // 2)
        case Damage.MISSING_SHARD:
            file.unlink()
        case Damage.STALE_SHARD:
            shutil.copyfile(older / file.name, file)
        case _:
            raise AssertionError(damage)
    return file.name


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
