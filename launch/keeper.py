"""Memory that outlives the ranks: held by the launcher, gone with it, whatever ends it."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from launch.memory_file import MemoryFile

Regions = tuple[Path, Path]
"""The files for a rank's own snapshots, and for those that it keeps for its peer (``parallel/replica.py``)."""


class Keeper:
    """Two regions for each of so many ranks of this node, empty until a rank makes room in them. Linux only."""

    def __init__(self, ranks: int) -> None:
        self._open = ExitStack()
        self._files = [self._open.enter_context(MemoryFile(f"dualpipe-{number}")) for number in range(2 * ranks)]
        paths = [file.path for file in self._files]
        self.regions: list[Regions] = list(zip(paths[::2], paths[1::2], strict=True))

    def clear(self) -> None:
        """Lose all that is in it."""
        for file in self._files:
            file.clear()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
