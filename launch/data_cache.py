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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_FORMAT = 2
_HEADER_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training tokens, then validation tokens, and what is known about them."""

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    train_tokens: int
    documents: int
    bytes: int
    validation_bytes: float
    fingerprint: str


def key(files: list[tuple[str, int, int]], tokenizer: str, validation_fraction: float, sequence_length: int) -> str:
    """A name that changes with everything that the tokens of the two splits depend on."""
    parts = [_FORMAT, files, tokenizer, validation_fraction, sequence_length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read(name: str) -> Corpus | None:
    """The cached corpus, mapped and not loaded; None when it is absent or not whole."""
    path = _path(name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
            width = header["bytes_each"]
            if width not in (2, 4) or os.fstat(file.fileno()).st_size != _HEADER_BYTES + width * header["tokens"]:
                return None
            tokens = np.memmap(file, dtype=f"<u{width}", mode="r", offset=_HEADER_BYTES, shape=(header["tokens"],))
        known = (header[k] for k in ("train_tokens", "documents", "bytes", "validation_bytes", "fingerprint"))
        return Corpus(tokens, *known)
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
        "bytes_each": corpus.tokens.dtype.itemsize,
        "train_tokens": corpus.train_tokens,
        "documents": corpus.documents,
        "bytes": corpus.bytes,
        "validation_bytes": corpus.validation_bytes,
        "fingerprint": corpus.fingerprint,
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f"{name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
                file.write(corpus.tokens.astype(corpus.tokens.dtype.newbyteorder("<"), copy=False).data)
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
