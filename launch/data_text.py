"""A source of text as a corpus: tokenised once, split, and kept in the user's cache folder.

A document goes to validation when the hash of its bytes falls below ``validation_fraction``, so that adding documents
moves no other one, and two copies of one text stay on one side. When that leaves either side with less than one
sequence (a single document, say), the split is by position instead: of all documents in a row the last
``validation_fraction`` of the tokens, at least one sequence, is validation.

Fill in the middle is for training documents only, but where the split is by position: there it comes first.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from launch import data_cache
from launch.config import DataConfig
from launch.data_cache import Spool
from launch.data_corpus import Corpus, Tokens, split_at, too_short
from launch.data_fill_in_middle import cut
from launch.data_source import DataError, Source
from launch.tokenizer import Tokenizer, token_array

_HASH_TOKENS = 2**20


def open_text(name: str, source: Source, tokenizer: Tokenizer, data: DataConfig, sequence_length: int) -> Corpus:
    """The corpus of a source, from the cache if it is there. Raises DataError: unreadable, or too short for one
    sequence of either split. Any number of processes may call it at once."""
    parts = (tokenizer.identity(), data.text_field, data.validation_fraction, data.fill_in_middle, sequence_length)
    key = data_cache.key(source.identity(), *parts)
    found = data_cache.read(key)
    if found is None:
        bytes_each = 2 if vocabulary_of(tokenizer, data.fill_in_middle > 0) <= 2**16 else 4
        encode = _encoder(tokenizer, data.fill_in_middle, bytes_each)
        try:
            found = _tokenise(source, encode, bytes_each, data.validation_fraction, sequence_length)
        except OSError as error:
            raise DataError(f"{source.setting}: its tokens must have room on disk: {error.strerror}") from None
        data_cache.write(key, *found)
        found = data_cache.read(key) or found  # the spools would hold their disk for as long as the run lasts
    train, validation, known = found
    return Corpus(name, train, validation, known["documents"], known["bytes_per_token"], known["fingerprint"])


Encode = Callable[[bytes, bool], list[npt.NDArray[Any]]]
"""A document, and whether it may be cut to fill in its middle -> its tokens in pieces, the end of a document last."""


def vocabulary_of(tokenizer: Tokenizer, fill_in_middle: bool) -> int:
    """What every token of a corpus is below."""
    sentinels = tokenizer.sentinels if fill_in_middle and tokenizer.sentinels is not None else ()
    return max(tokenizer.size - 1, tokenizer.end, *sentinels) + 1


def _encoder(tokenizer: Tokenizer, rate: float, bytes_each: int) -> Encode:
    dtype = f"<u{bytes_each}"
    end, sentinels = np.array([tokenizer.end], dtype), tokenizer.sentinels

    def plain(text: bytes) -> npt.NDArray[Any]:
        return token_array(tokenizer, text).astype(dtype)

    def encode(text: bytes, cuttable: bool) -> list[npt.NDArray[Any]]:
        pieces = cut(text, rate) if cuttable else None
        if pieces is None:
            return [plain(text), end]
        assert sentinels is not None
        prefix, middle, suffix = pieces
        marked = zip(sentinels, (prefix, suffix, middle), strict=True)
        return [tokens for mark, part in marked for tokens in (np.array([mark], dtype), plain(part))] + [end]

    return encode


def _tokenise(
    source: Source, encode: Encode, bytes_each: int, validation_fraction: float, sequence_length: int
) -> tuple[Tokens, Tokens, dict[str, Any]]:
    """(training tokens, validation tokens, what else is known)."""
    train, validation = Spool(bytes_each), Spool(bytes_each)
    documents = size = 0
    held_bytes: float = 0
    for text in _texts(source):
        held = _is_held_out(text, validation_fraction)
        for tokens in encode(text, not held):
            (validation if held else train).append(tokens)
        documents, size = documents + 1, size + len(text)
        held_bytes += (len(text) + 1) * held
    if not documents:
        raise DataError(f"{source.setting} must hold text, and every document in it is empty")
    if min(len(train), len(validation)) > sequence_length:
        rows = train.tokens(), validation.tokens()
    else:
        whole = Spool(bytes_each)
        for text in _texts(source):
            for tokens in encode(text, True):
                whole.append(tokens)
        if len(whole) < 2 * (sequence_length + 1):
            raise too_short(source.setting, len(whole), sequence_length)
        at = split_at(len(whole), validation_fraction, sequence_length)
        rows = whole.tokens()[:at], whole.tokens()[at:]
        held_bytes = (size + documents) * len(rows[1]) / len(whole)
    known = {"documents": documents, "bytes_per_token": held_bytes / len(rows[1]), "fingerprint": _fingerprint(*rows)}
    return *rows, known


def _texts(source: Source) -> Iterator[bytes]:
    return (text for text in source.documents() if text)


def _is_held_out(text: bytes, validation_fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < validation_fraction * 2**64


def _fingerprint(train: Tokens, validation: Tokens) -> str:
    digest = hashlib.sha256(f"{len(train)} {len(validation)}\n".encode())
    for tokens in (train, validation):
        for start in range(0, len(tokens), _HASH_TOKENS):
            digest.update(tokens[start : start + _HASH_TOKENS].data)
    return digest.hexdigest()
