"""The manifest of a checkpoint: the size and checksum of each of its files.

Torch's distributed checkpoint notices a file that is missing or cut short, but loads a flipped bit or a zeroed page
without a word. CRC-32 sees any burst of up to 32 bits and misses other damage once in 2^32, at some 2 GB/s a core.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One file: its size, and the CRC-32 of its content."""

    bytes: int
    crc32: int


def describe(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """The entries of files in a folder, as they are on disk. Raises OSError."""
    return {name: _entry(folder / name) for name in names}


def write(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest. Raises OSError."""
    files = {name: asdict(entries[name]) for name in sorted(entries)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def read(folder: Path) -> dict[str, Entry]:
    """The entries that a folder's manifest gives. Raises OSError, and ValueError when it is damaged."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = {name: Entry(**values) for name, values in files.items()}
        if not all(type(number) is int for entry in entries.values() for number in asdict(entry).values()):
            raise ValueError("sizes and checksums must be integers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({' '.join(str(error).split())})") from None
    return entries


def problem(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files of a folder, in one phrase, or None. Of ``parts`` readers, each with its number,
    every one reads its share of the files."""
    try:
        entries = read(folder)
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    for name in sorted(entries)[part::parts]:
        try:
            found = _entry(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        wanted = entries[name]
        if found.bytes != wanted.bytes:
            return f"{name} has {found.bytes} of {wanted.bytes} bytes"
        if found.crc32 != wanted.crc32:
            return f"{name} is not what was written (CRC-32 {found.crc32:08x}, must be {wanted.crc32:08x})"
    return None


def lacking(folder: Path) -> str | None:
    """What is absent or of another size, in one phrase, or None; no file but the manifest is read."""
    try:
        wanted = {name: entry.bytes for name, entry in read(folder).items()}
        found = {file.name: file.stat().st_size for file in folder.iterdir()}
    except (OSError, ValueError) as error:
        return str(error)
    for name, size in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} of {size} bytes"
    return None


def _entry(file: Path) -> Entry:
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return Entry(size, checksum)
