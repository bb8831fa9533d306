"""Where documents come from: the standard library's own source, or .txt and .jsonl files."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config_file import brief, show

_SUFFIXES = (".txt", ".jsonl")
# Third-party packages differ between machines, and test suites are half of the library's text.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class DataError(ValueError):
    """The data cannot be trained on; the message is one line that names ``data.source`` and the rule."""

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))


@dataclass(frozen=True)
class Source:
    """Files of documents, in an order that does not depend on the machine's."""

    setting: str
    """'data.source=...', as messages begin."""
    files: tuple[Path, ...]

    def identity(self) -> list[tuple[str, int, int]]:
        """(path, bytes, modification time in ns) of each file: equal as long as nobody touched them."""
        try:
            stats = [(path, path.stat()) for path in self.files]
        except OSError as error:
            raise self._unreadable(error) from None
        return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def documents(self) -> Iterator[bytes]:
        """The bytes of every document: a file, or a line's ``text`` in a .jsonl file."""
        for path in self.files:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise self._unreadable(error) from None
            if path.suffix == ".jsonl":
                yield from self._texts(path, content)
            else:
                yield content

    def _texts(self, path: Path, content: bytes) -> Iterator[bytes]:
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                value: Any = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{self.setting}: {path}:{number} must be one JSON object") from None
            text = value.get("text") if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{self.setting}: {path}:{number} must be a JSON object with a string 'text'")
            # JSON can name half of a surrogate pair, which strict UTF-8 has no bytes for.
            yield text.encode("utf-8", "surrogatepass")

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"{self.setting} must be readable: {error.filename}: {error.strerror}")


def find_source(source: str) -> Source:
    """The files that ``data.source`` names. Raises DataError when there are none.

    A folder gives all .txt and .jsonl files below it, a glob those that it matches (``**`` crosses folders). A folder
    that is itself called stdlib is ./stdlib.
    """
    setting = f"data.source={show(source)}"
    try:
        path = Path(source).expanduser()
        if source == "stdlib":
            library = Path(sysconfig.get_path("stdlib"))
            files = _below(library, (".py",), _NOT_LIBRARY)
        elif path.is_dir():
            files = _below(path, _SUFFIXES, set())
        elif path.exists():
            files = [path]
            if not path.is_file():
                raise DataError(f"{setting} must be a regular file, a folder, a glob or 'stdlib'")
            if path.suffix not in _SUFFIXES:
                raise DataError(f"{setting} must be a .txt or .jsonl file, a folder, a glob or 'stdlib'")
        else:
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [match for match in matches if match.suffix in _SUFFIXES and match.is_file()]
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{setting} must be readable: {reason}") from None
    if not files:
        kinds = ".py" if source == "stdlib" else ".txt or .jsonl"
        raise DataError(f"{setting} must name at least one {kinds} file, and none was found")
    return Source(setting, tuple(files))


def _below(folder: Path, suffixes: tuple[str, ...], skipped: set[str]) -> list[Path]:
    """Files with one of the suffixes below a folder, by relative path; a folder that cannot be listed is an error."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(parent, name) for name in names if name.endswith(suffixes)]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())
