"""A file without a name, in memory: whoever ends, the kernel frees it with the last process that has it open."""

import os
from pathlib import Path
from types import TracebackType


class MemoryFile:
    """Empty at first. Who knows the process that made it finds it among that process's open files, at ``path``. Linux
    only (``available``)."""

    def __init__(self, name: str) -> None:
        self.descriptor = os.memfd_create(name)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")

    @staticmethod
    def available() -> bool:
        return hasattr(os, "memfd_create")

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def clear(self, size: int = 0) -> None:
        """Make it ``size`` zeros."""
        os.ftruncate(self.descriptor, 0)
        os.ftruncate(self.descriptor, size)
