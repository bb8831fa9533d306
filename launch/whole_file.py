"""Files that are there whole or not at all."""

import contextlib
import errno
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file, so that a crash or a full disk leaves the old one or the new one, and nothing beside it.

    Raises OSError.
    """
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def check_whole(path: Path) -> None:
    """Whether ``write_whole`` may write a file, before what it will hold is made; leaves nothing. Raises OSError."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    aside = path.with_name(path.name + ".part")
    aside.touch()
    aside.unlink()
