"""The roster in a file that all nodes see, in the run's folder: no training node holds it, so none takes it along.

Whoever reads or changes it holds a lock, which the kernel, or the file server, drops with its holder. The file has two
slots, written in turn, each with a checksum: a node that dies in the middle of a write spoils that write alone.
"""

import fcntl
import json
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.nodes.roster import Roster

SLOT_BYTES = 1 << 20
_HEADER_BYTES = 32


class RosterFile:
    """``path``: its folder exists. Any number of threads and processes may use it at once. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._one_thread = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[Roster]:
        """The roster as it is, an empty one if there is none; what is changed in the context is written at its end,
        unless it raises."""
        with self._one_thread:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                version, roster = max((_read(file, slot) for slot in range(2)), key=lambda found: found[0])
                roster = roster or Roster()
                yield roster
                _write(file, version + 1, roster)
            finally:
                os.close(file)


def _read(file: int, slot: int) -> tuple[int, Roster | None]:
    """Version and content of a slot; version 0 for one that holds nothing whole."""
    header = os.pread(file, _HEADER_BYTES, slot * SLOT_BYTES).split()
    try:
        version, length, checksum = int(header[0]), int(header[1]), int(header[2], 16)
        if not 0 <= length <= SLOT_BYTES - _HEADER_BYTES:
            return 0, None
        text = os.pread(file, length, slot * SLOT_BYTES + _HEADER_BYTES)
        if zlib.crc32(text, version) != checksum:
            return 0, None
        return version, Roster.from_dict(json.loads(text))
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, RecursionError):
        return 0, None


def _write(file: int, version: int, roster: Roster) -> None:
    text = json.dumps(roster.as_dict()).encode()
    assert len(text) <= SLOT_BYTES - _HEADER_BYTES, len(text)
    header = b"%d %d %08x" % (version, len(text), zlib.crc32(text, version))
    os.pwrite(file, header.ljust(_HEADER_BYTES) + text, version % 2 * SLOT_BYTES)
