"""Tokens on disk, so that a corpus is tokenised once and shared by all ranks of a machine through the page cache.

One file a corpus, in ``$XDG_CACHE_HOME/dualpipe`` (``~/.cache/dualpipe``): a header of one JSON line, padded to 4096
bytes, then the tokens as little-endian integers of 16 or 32 bits. It is written aside and renamed, so that ranks that
start at once see all of it or nothing. A cache that cannot be written costs time, never the run.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from launch.data_corpus import Tokens

_FORMAT = 3
_HEADER_BYTES = 4096
_BUFFER_BYTES = 2**20


class Spool:
    """A row of tokens that grows in a nameless file: of a corpus, no more than a document is in memory."""

    def __init__(self, bytes_each: int) -> None:
        self._dtype = np.dtype(f"<u{bytes_each}")
        self._file = _nameless_file()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, tokens: Tokens) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).data)
        self._length += len(tokens)

    def tokens(self) -> Tokens:
        """What is there so far, mapped and not loaded."""
        self._file.flush()
        if not self._length:
            return np.empty(0, self._dtype)
        return np.memmap(self._file, dtype=self._dtype, mode="r", shape=(self._length,))


def key(*parts: object) -> str:
    """A name that changes with everything that the tokens of the two splits depend on."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()


def read(name: str) -> tuple[Tokens, Tokens, dict[str, Any]] | None:
    """Training and validation tokens, mapped and not loaded, and what ``write`` was told about them; None when there is
    nothing or it is not whole."""
    try:
        with _path(name).open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
            width, count, train = header["bytes_each"], header["tokens"], header["train_tokens"]
            if width not in (2, 4) or os.fstat(file.fileno()).st_size != _HEADER_BYTES + width * count:
                return None
            tokens = np.memmap(file, dtype=f"<u{width}", mode="r", offset=_HEADER_BYTES, shape=(count,))
        return tokens[:train], tokens[train:], dict(header["known"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def write(name: str, train: Tokens, validation: Tokens, known: Mapping[str, Any]) -> None:
    """Keep a corpus, if the cache can be written at all; ``known`` is what else there is to say about it, as JSON."""
    header = {
        "tokens": len(train) + len(validation),
        "bytes_each": train.dtype.itemsize,
        "train_tokens": len(train),
        "known": dict(known),
    }
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f"{name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
                for tokens in (train, validation):
                    for start in range(0, len(tokens), _BUFFER_BYTES):
                        file.write(tokens[start : start + _BUFFER_BYTES].data)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise


def _nameless_file() -> IO[bytes]:
    """Where corpora are kept, if that can be written, or else where temporary files are."""
    with contextlib.suppress(OSError, RuntimeError):
        _folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=_folder(), buffering=_BUFFER_BYTES)
    return tempfile.TemporaryFile(buffering=_BUFFER_BYTES)


def _path(name: str) -> Path:
    return _folder() / f"{name}.tokens"


def _folder() -> Path:
    """Where corpora are kept. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualpipe"
