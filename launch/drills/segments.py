"""Shared memory that has a name, in ``/dev/shm``, which outlives whoever made it. Linux only.

Python's locks between processes are such segments. A tracker beside the process that made them removes them when that
one dies; when it dies too, as with its whole node, nobody does.
"""

import os
from pathlib import Path

FOLDER = Path("/dev/shm")


def segments_of(process: int) -> set[Path]:
    """Those that a process has in its memory; none if it is gone, or is another user's. Its maps (proc(5)) have the
    inode of each in the fifth column; the name is one that the C library had for it at first."""
    try:
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    except OSError:
        return set()
    inodes = {int(line.split(maxsplit=5)[4]) for line in lines if f" {FOLDER}/" in line}
    return {Path(entry) for entry in os.scandir(FOLDER) if entry.inode() in inodes} if inodes else set()
