"""A folder that appears under its name only when it is whole, and is gone on with after an interruption.

It is built as ``.NAME.partial`` beside its place. ``source.json`` in there says what it is built from: an attempt from
the same source goes on with the files that are whole, any other one starts again.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SOURCE, _LOCK = "source.json", ".lock"


class TargetError(ValueError):
    """A folder cannot be made; one line that names it and says why."""


@contextmanager
def built_aside(target: Path, option: str, source: dict[str, Any]) -> Iterator[Path]:
    """The folder to build in; when the block ends without an exception, it becomes ``target``.

    ``option``: how the user names the target, as messages begin. Raises TargetError when the target exists, cannot be
    written, or is being built by another process.
    """
    setting = f"{option}={target}"
    if os.path.lexists(target):
        raise TargetError(f"{setting} must not exist: nothing that is there is replaced")
    partial = target.parent / f".{target.name}.partial"
    lock = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / _LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _begin(partial, source)
        yield partial
        for name in (_SOURCE, _LOCK):
            (partial / name).unlink()
        os.rename(partial, target)
        _flush_name(target)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on with {partial}", file=sys.stderr)
        raise
    except BlockingIOError:
        raise TargetError(f"{setting} is being written by another process") from None
    except OSError as error:
        raise TargetError(f"{setting} cannot be written: {error.strerror or error}") from error
    finally:
        if lock is not None:
            lock.close()


def _begin(partial: Path, source: dict[str, Any]) -> None:
    """Empty the folder unless it was begun from the same source."""
    note = partial / _SOURCE
    try:
        if json.loads(note.read_text()) == json.loads(json.dumps(source)):
            return
    except (OSError, ValueError):
        pass
    for path in partial.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    note.write_text(json.dumps(source))


def _flush_name(path: Path) -> None:
    """Make a rename last."""
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
