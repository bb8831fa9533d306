"""Memory that outlives the ranks: held by the launcher, gone with it, whatever ends it."""

import os
from pathlib import Path
from types import TracebackType

Regions = tuple[Path, Path]
"""The files for a rank's own snapshots, and for those that it keeps for its peer (``parallel/replica.py``)."""


class Keeper:
    """Two regions for each of so many ranks, empty until a rank makes room in them.

    They have no name that could be left behind: who knows the launcher's process finds them among its open files, and
    the kernel frees them with the last process that has them open. Linux only (``available``).
    """

    def __init__(self, ranks: int) -> None:
        self._files = [os.memfd_create(f"dualpipe-{number}") for number in range(2 * ranks)]
        paths = [Path(f"/proc/{os.getpid()}/fd/{file}") for file in self._files]
        self.regions: list[Regions] = list(zip(paths[::2], paths[1::2], strict=True))

    @staticmethod
    def available() -> bool:
        return hasattr(os, "memfd_create")

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            os.close(file)
