"""Where documents come from: the standard library's own source, or .txt, .jsonl and .parquet files.

One document is in memory at a time, and of a .parquet file a batch of the rows of one row group.
"""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config_file import brief, show

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_KINDS = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
# Third-party packages differ between machines, and test suites are half of the library's text.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_BATCH_ROWS = 256


class DataError(ValueError):
    """The data cannot be trained on; the message is one line that names the key, its value and the rule."""

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))


@dataclass(frozen=True)
class Source:
    """Files of documents, in an order that does not depend on the machine's."""

    setting: str
    """'data.source=...', as messages begin."""
    files: tuple[Path, ...]
    text_field: str
    """What holds the text in an object of a .jsonl file, or in a row of a .parquet file."""
    field_key: str
    """Of ``text_field``, for messages."""

    def identity(self) -> list[tuple[str, int, int]]:
        """(path, bytes, modification time in ns) of each file: equal as long as nobody touched them."""
        try:
            stats = [(path, path.stat()) for path in self.files]
        except OSError as error:
            raise self._unreadable(error) from None
        return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def documents(self) -> Iterator[bytes]:
        """The bytes of every document: a file, a line's object in a .jsonl file, a row in a .parquet file."""
        for path in self.files:
            try:
                if path.suffix == ".jsonl":
                    yield from self._lines(path)
                elif path.suffix == ".parquet":
                    yield from self._rows(path)
                else:
                    yield path.read_bytes()
            except OSError as error:
                raise self._unreadable(error) from None

    def _lines(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value: Any = json.loads(line)
                except (ValueError, RecursionError):
                    raise DataError(f"{self.setting}: {path}:{number} must be one JSON object") from None
                text = value.get(self.text_field) if isinstance(value, dict) else None
                if not isinstance(text, str):
                    raise DataError(
                        f"{self.setting}: {path}:{number} must be a JSON object with a string "
                        f"{self.text_field!r}, as {self.field_key} names it"
                    )
                # JSON can name half of a surrogate pair, which strict UTF-8 has no bytes for.
                yield text.encode("utf-8", "surrogatepass")

    def _rows(self, path: Path) -> Iterator[bytes]:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise DataError(
                f"{self.setting}: {path} needs the package 'pyarrow', which is not installed: it comes with "
                "pip install 'dualpipe-trainer[parquet]'"
            ) from None
        try:
            with ParquetFile(path) as file:
                self._check_column(path, file.schema_arrow)
                number = 0
                for group in range(file.num_row_groups):
                    batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self.text_field])
                    for text in (text for batch in batches for text in batch.column(0).to_pylist()):
                        number += 1
                        if text is None:
                            raise DataError(
                                f"{self.setting}: {path}, row {number}: {self.text_field!r} must not be null"
                            )
                        yield text.encode()
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.setting}: {path} must be a whole .parquet file: {reason}") from None

    def _check_column(self, path: Path, schema: Any) -> None:
        """Refuse a file without a column of text under the name."""
        strings = [field.name for field in schema if str(field.type) in ("string", "large_string", "string_view")]
        if self.text_field not in strings:
            there = f"its columns of text are {', '.join(strings)}" if strings else "it has no column of text"
            raise DataError(
                f"{self.setting}: {self.field_key}={show(self.text_field)} must be a column of text in {path}; {there}"
            )

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"{self.setting} must be readable: {error.filename}: {error.strerror}")


def find_source(
    source: str, key: str = "data.source", text_field: str = "text", field_key: str = "data.text_field"
) -> Source:
    """The files that ``source``, the value of ``key``, names. Raises DataError when there are none.

    A folder gives all files of documents below it, a glob those that it matches (``**`` crosses folders). A folder
    that is itself called stdlib is ./stdlib.
    """
    setting = f"{key}={show(source)}"
    indexed = ""
    try:
        path = Path(source).expanduser()
        if source == "stdlib":
            library = Path(sysconfig.get_path("stdlib"))
            files = _below(library, (".py",), _NOT_LIBRARY)
        elif path.is_dir():
            files = _below(path, _SUFFIXES, set())
            indexed = "" if files else _prefixes(path)
        elif path.exists():
            files = [path]
            if not path.is_file():
                raise DataError(f"{setting} must be a regular file, a folder, a glob or 'stdlib'")
            if path.suffix not in _SUFFIXES:
                raise DataError(f"{setting} must be a {_KINDS} file, a folder, a glob or 'stdlib'")
        else:
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [match for match in matches if match.suffix in _SUFFIXES and match.is_file()]
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{setting} must be readable: {reason}") from None
    if not files:
        if source == "stdlib":
            raise DataError(f"{setting} must name at least one .py file, and none was found")
        if indexed:
            raise DataError(f"{setting} must name Megatron's files by their prefix, not their folder; it has {indexed}")
        raise DataError(
            f"{setting} must name at least one {_KINDS} file, or what Megatron's PREFIX.bin and PREFIX.idx begin with, "
            "and none was found"
        )
    return Source(setting, tuple(files), text_field, field_key)


def _prefixes(folder: Path) -> str:
    """Megatron's data sets below a folder, as ``data.source`` names them; no more than three."""
    found = [path.with_suffix("") for path in _below(folder, (".idx",), set()) if path.with_suffix(".bin").is_file()]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(map(str, found[:3])) + more


def _below(folder: Path, suffixes: tuple[str, ...], skipped: set[str]) -> list[Path]:
    """Files with one of the suffixes below a folder, by relative path; a folder that cannot be listed is an error."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(parent, name) for name in names if name.endswith(suffixes)]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())
