"""Tokens as Megatron keeps them, read where they lie: PREFIX.bin, a row of integers, and PREFIX.idx, its index.

The index, little-endian: the 9 bytes ``MMIDIDX\\0\\0``, the version 1 (8 bytes), the type of the tokens (1), the
numbers of sequences and of document bounds (8 each); then for every sequence its tokens (4) and its first byte in .bin
(8), and for every document bound the sequence that begins there (8), from 0 to the number of sequences. Sequences of
several modalities have one more byte each. (Megatron-LM, megatron/core/datasets/indexed_dataset.py.)

Both files are mapped, nothing is converted and nothing copied. All of the index is checked, piece by piece; of the
tokens, however many there are, pieces of 16 MiB together, evenly spread, and every sequence again when it is read.
Documents have to end with the token that ends them, which ``--append-eod`` of Megatron's preprocessing sees to.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.data_corpus import Corpus, Tokens, check_vocabulary, split_at, too_short
from launch.data_source import DataError
from launch.tokenizer import ByteTokenizer, Tokenizer

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_PIECES, _PIECE_BYTES = 256, 2**16
_INDEX_PIECE = 2**20
_SAMPLED_DOCUMENTS = 1024
_DECODED_TOKENS = 2**16


@dataclass(frozen=True)
class Indexed:
    """An indexed data set that was checked. ``sizes``: tokens of each sequence; ``firsts``: its first byte;
    ``bounds``: where documents begin, in sequences, and the number of sequences at the end."""

    tokens: Tokens
    sizes: Tokens
    firsts: Tokens
    bounds: Tokens
    fingerprint: str

    @property
    def documents(self) -> int:
        return len(self.bounds) - 1

    def start(self, document: int) -> int:
        """The first token of a document."""
        sequence = int(self.bounds[document])
        return int(self.firsts[sequence]) // self.tokens.itemsize if sequence < len(self.firsts) else len(self.tokens)


def find_megatron(source: str) -> Path | None:
    """The path before .bin and .idx, when ``source`` is either of the two or what both begin with; None for any other
    source: stdlib, what there is under that very name, whatever lies beside it, and the home of nobody."""
    try:
        path = Path(source).expanduser()
        if source == "stdlib" or path.is_dir():
            return None
        if path.suffix in (".bin", ".idx"):
            return path.with_suffix("")
        return path if path.name and not path.exists() and Path(f"{path}.idx").is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def open_megatron(
    name: str,
    prefix: Path,
    setting: str,
    tokenizer: Tokenizer,
    vocabulary: int,
    validation_fraction: float,
    sequence_length: int,
) -> Corpus:
    """The corpus of an indexed data set. The documents after the first that begins behind all but
    ``validation_fraction`` of the tokens are for validation. Raises DataError."""
    indexed = open_indexed(prefix, setting, tokenizer, vocabulary)
    if len(indexed.tokens) < 2 * (sequence_length + 1):
        raise too_short(setting, len(indexed.tokens), sequence_length)
    at = _split(indexed, validation_fraction, sequence_length)
    validation = indexed.tokens[at:]
    decoded = validation[:_DECODED_TOKENS]
    return Corpus(
        name,
        indexed.tokens[:at],
        validation,
        indexed.documents,
        text_bytes(decoded, tokenizer) / len(decoded),
        indexed.fingerprint,
        setting,
        vocabulary,
    )


def open_indexed(prefix: Path, setting: str, tokenizer: Tokenizer, vocabulary: int) -> Indexed:
    """An indexed data set whose documents end as those of ``tokenizer``. Raises DataError."""
    try:
        indexed = read_indexed(prefix, setting, vocabulary)
    except OSError as error:
        raise DataError(f"{setting} must be readable: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{setting} must be readable: {error}") from None  # a NUL in the path, a file cut meanwhile
    _check_ends(indexed, setting, tokenizer.end)
    return indexed


def read_indexed(prefix: Path, setting: str, vocabulary: int) -> Indexed:
    """Raises DataError, naming the file and the rule, for files that are damaged or something else; OSError where they
    cannot be read."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        digest = hashlib.sha256(header)
        dtype, sequences, bounds_count = _header(index, header, setting)
        want = _HEADER.size + 12 * sequences + 8 * bounds_count
        have = index.stat().st_size
        if have == want + sequences and sequences:
            raise DataError(f"{setting}: {index} must have no modes: its sequences are not all text")
        if have != want:
            raise DataError(
                f"{setting}: {index} must have {want} bytes for {sequences} sequences and {bounds_count} document "
                f"bounds; it has {have}"
            )
        for content in iter(lambda: file.read(_INDEX_PIECE), b""):
            digest.update(content)
    sizes = _mapped(index, "<i4", _HEADER.size, sequences)
    firsts = _mapped(index, "<i8", _HEADER.size + 4 * sequences, sequences)
    bounds = _mapped(index, "<i8", _HEADER.size + 12 * sequences, bounds_count)
    total = _check_index(index, sizes, firsts, bounds, dtype.itemsize, setting)
    if data.stat().st_size != total:
        raise DataError(f"{setting}: {data} must have {total} bytes, as its index says; it has {data.stat().st_size}")
    tokens = _mapped(data, dtype, 0, total // dtype.itemsize)
    each = _PIECE_BYTES // dtype.itemsize
    last = max(len(tokens) - each, 0)
    for start in sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)}):
        piece = tokens[start : start + each]
        check_vocabulary(piece, vocabulary, f"{setting}: {data}")
        digest.update(piece.tobytes())
    return Indexed(tokens, sizes, firsts, bounds, digest.hexdigest())


def _header(index: Path, header: bytes, setting: str) -> tuple[np.dtype[np.integer], int, int]:
    """(type of the tokens, sequences, document bounds)."""
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{setting}: {index} must begin with MMIDIDX: it is no index of Megatron's")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != 1:
        raise DataError(f"{setting}: {index} must be of version 1; it is of version {version}")
    if code not in _TYPES:
        what = _FLOATS.get(code, "unknown")
        raise DataError(f"{setting}: {index} must be of a type of integers; its type {code} is {what}")
    return np.dtype(_TYPES[code]), sequences, bounds


def _check_index(
    index: Path,
    sizes: Tokens,
    firsts: Tokens,
    bounds: Tokens,
    bytes_each: int,
    setting: str,
) -> int:
    """The bytes of .bin. Sequences have to lie one behind the other, as every writer leaves them."""
    at = 0
    for start in range(0, len(sizes), _INDEX_PIECE):
        part = sizes[start : start + _INDEX_PIECE].astype(np.int64)
        if (part < 0).any():
            raise DataError(f"{setting}: {index} must have no negative size; sequence {start + int(part.argmin())} has")
        ends = at + np.cumsum(part) * bytes_each
        wrong = np.flatnonzero(firsts[start : start + _INDEX_PIECE] != ends - part * bytes_each)
        if len(wrong):
            raise DataError(f"{setting}: {index}: sequence {start + wrong[0]} must begin where the one before it ends")
        at = int(ends[-1])
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(sizes):
        raise DataError(f"{setting}: {index}: its document bounds must go from 0 to its {len(sizes)} sequences")
    for start in range(0, len(bounds), _INDEX_PIECE):
        if (np.diff(bounds[start : start + _INDEX_PIECE + 1]) < 0).any():
            raise DataError(f"{setting}: {index}: its document bounds must not decrease")
    return at


def _check_ends(indexed: Indexed, setting: str, end: int) -> None:
    """Look whether documents, evenly spread, end as they have to."""
    for number in sorted({indexed.documents * at // _SAMPLED_DOCUMENTS for at in range(_SAMPLED_DOCUMENTS)}):
        start, after = indexed.start(number), indexed.start(number + 1) if indexed.documents else 0
        if start < after and indexed.tokens[after - 1] != end:
            raise DataError(
                f"{setting}: its documents must end with token {end}, the end of a document of data.tokenizer, and "
                f"document {number} ends with {indexed.tokens[after - 1]} (Megatron's --append-eod adds it)"
            )


def _split(indexed: Indexed, validation_fraction: float, sequence_length: int) -> int:
    """The first validation token: where a document begins, if that leaves a sequence on either side."""
    at = split_at(len(indexed.tokens), validation_fraction, sequence_length)
    low, high = 0, indexed.documents
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if indexed.start(middle) < at else (low, middle)
    document = indexed.start(low)
    return document if document + sequence_length < len(indexed.tokens) else at


def text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Bytes of the text that the tokens stand for, and one for each end of a document. One document at a time is text
    in memory."""
    ends = np.flatnonzero(tokens == tokenizer.end)
    if isinstance(tokenizer, ByteTokenizer):
        return int((tokens < 256).sum()) + len(ends)
    starts = [0, *(ends + 1).tolist()]
    documents = (tokens[start:end] for start, end in zip(starts, [*ends.tolist(), len(tokens)], strict=True))
    return sum(len(tokenizer.decode(document.tolist()).encode()) for document in documents) + len(ends)


def _mapped(path: Path, dtype: np.dtype[np.integer] | str, offset: int, count: int) -> Tokens:
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
