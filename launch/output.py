"""stdout and stderr of a command whose work matters more than its audience.

What a run is worth is in its folder. So a reader that leaves (``| head``, a closed terminal) ends the output and not
the run; a stream that was closed from the start is the null device, lest the next file that is opened takes its number
and its text; a character that the stream's encoding lacks is escaped. A stream that cannot be written for another
reason, such as a full disk, is an error like any other.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

_READER_LEFT = (errno.EPIPE, errno.EIO)


class OutputError(ValueError):
    """A standard stream cannot be written; one line that says which, and why."""


def prepare() -> None:
    """Give this process such streams. To be called before files are opened; again, it does no harm."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _to_null(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, it lives as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # without a descriptor, it is in memory
                setattr(sys, name, _tolerant(stream))


def _tolerant(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Stream(io.FileIO):
    """A descriptor that, once writing to it has failed, leads to the null device."""

    def write(self, data: Any) -> int:
        """All of ``data`` or as much as the descriptor takes, in bytes. Raises OutputError."""
        try:
            written = super().write(data)
            while written is None:  # another process made the shared terminal or pipe non-blocking, and it is full
                select.select([], [self], [])
                written = super().write(data)
        except OSError as error:
            _to_null(self.fileno())
            if error.errno in _READER_LEFT:
                return memoryview(data).nbytes
            name = {1: "output", 2: "error"}.get(self.fileno(), f"stream {self.fileno()}")
            raise OutputError(f"standard {name} cannot be written: {error.strerror}") from None
        return written


def _to_null(number: int) -> None:
    """Make a descriptor the null device, for the processes that inherit it too."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, number)
        os.close(null)
