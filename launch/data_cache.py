"""Tokens on disk, so that a corpus is tokenised once and shared by all ranks of a machine through the page cache.

One file a corpus, in ``$XDG_CACHE_HOME/dualpipe`` (``~/.cache/dualpipe``): a header of one JSON line, padded to 4096
bytes, then the tokens as little-endian 16-bit integers. It is written aside and renamed, so that ranks that start at
once see all of it or nothing. A cache that cannot be written costs time, never the run.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_FORMAT = 1
_HEADER_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training tokens, then validation tokens, and what is known about them."""

    tokens: npt.NDArray[np.uint16]
    train_tokens: int
    documents: int
    bytes: int
    fingerprint: str


def key(files: list[tuple[str, int, int]], validation_fraction: float, sequence_length: int) -> str:
    """A name that changes with everything that the tokens of the two splits depend on."""
    return hashlib.sha256(json.dumps([_FORMAT, files, validation_fraction, sequence_length]).encode()).hexdigest()


def read(name: str) -> Corpus | None:
    """The cached corpus, mapped and not loaded; None when it is absent or not whole."""
    path = _path(name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
            if os.fstat(file.fileno()).st_size != _HEADER_BYTES + 2 * header["tokens"]:
                return None
            tokens = np.memmap(file, dtype="<u2", mode="r", offset=_HEADER_BYTES, shape=(header["tokens"],))
        return Corpus(tokens, header["train_tokens"], header["documents"], header["bytes"], header["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(name: str, corpus: Corpus) -> None:
    """Keep a corpus, if the cache can be written at all."""
    path = _path(name)
    if path is None:
        return
    header: dict[str, Any] = {
        "format": _FORMAT,
        "tokens": len(corpus.tokens),
        "train_tokens": corpus.train_tokens,
        "documents": corpus.documents,
        "bytes": corpus.bytes,
        "fingerprint": corpus.fingerprint,
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f"{name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
                file.write(corpus.tokens.astype("<u2", copy=False).data)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise


def _path(name: str) -> Path | None:
    """Where the corpus is kept; None for a user without a home."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "dualpipe" / f"{name}.tokens"
