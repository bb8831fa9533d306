"""Text as tokens, and a stream of batches that can be entered at any step.

Tokenisation is by byte (token 0..255 is the byte of that value, and 256, ``END_OF_DOCUMENT``, follows every document),
or by a published tokenizer, whose own end follows every document then.
The tokens of the training split stand in one row; sequence i is the window of ``sequence_length + 1`` tokens that
begins at ``i * sequence_length`` (inputs are all but its last token, targets all but its first). An epoch visits every
window once, in a permutation drawn from (seed, epoch). Row r of step n is visit ``n * global_batch_size + r`` of the
endless row of epochs: it depends on seed and step alone, never on the layout, and needs no state to resume.

A document goes to validation when the hash of its bytes falls below ``validation_fraction``, so that adding documents
moves no other one, and two copies of one text stay on one side. When that leaves either side with less than one
sequence (a single document, say), the split is by position instead: of all documents in a row the last
``validation_fraction`` of the tokens, at least one sequence, is validation.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from launch import data_cache
from launch.config import Config, DataConfig, show
from launch.data_source import DataError, Source, find_source
from launch.tokenizer import END_OF_DOCUMENT, VOCABULARY, ByteTokenizer, Tokenizer, TokenizerError, open_tokenizer

__all__ = ["END_OF_DOCUMENT", "VOCABULARY", "DataError", "Dataset", "bits_per_byte", "open_dataset"]

Tokens: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Batch: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Both splits of a corpus, and the order in which a run visits the training windows."""

    train: Tokens
    validation: Tokens
    documents: int
    """Documents with any text, over both splits."""
    bytes: int
    """Bytes of text, over both splits, without the ends of documents."""
    bytes_per_token: float
    """Of the validation split; the end of a document counts as one byte."""
    fingerprint: str
    """SHA-256, in hexadecimal, of the tokens of both splits; equal fingerprints train on equal data."""
    sequence_length: int
    global_batch_size: int
    seed: int
    document_end: int = END_OF_DOCUMENT
    """The token between documents: the last of one, and what the next one begins with."""

    @property
    def windows(self) -> int:
        """Training sequences of one epoch."""
        return _windows(self.train, self.sequence_length)

    def batch(self, step: int) -> Batch:
        """Every sequence of one step, ``[global_batch_size, sequence_length + 1]``; ``step`` counts from 0."""
        return self.sequences(step, 0, self.global_batch_size)

    def sequences(self, step: int, first: int, count: int) -> Batch:
        """Rows ``first`` to ``first + count`` of ``batch(step)``; reads nothing else."""
        assert step >= 0 and 0 <= first <= first + count <= self.global_batch_size, (step, first, count)
        return self.visits(step * self.global_batch_size + first, count)

    def visits(self, first: int, count: int) -> Batch:
        """``count`` sequences of the endless row of epochs, from position ``first`` of it."""
        visits = first + np.arange(count, dtype=np.int64)
        epochs, places = np.divmod(visits, self.windows)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = _permutation(self.seed, int(epoch), self.windows)[places[here]]
        return _read_windows(self.train, chosen, self.sequence_length)

    def validation_sequences(self, count: int, sequence_length: int | None = None) -> Batch:
        """``[count, sequence_length + 1]`` from the validation split: the same ones at every call.

        The windows overlap by the one token that is a target of the first and an input of the second, and are spread
        evenly over the split. Fewer than ``count`` come back when the split holds no more.
        """
        length = sequence_length or self.sequence_length
        windows = _windows(self.validation, length)
        count = min(count, windows)
        return _read_windows(self.validation, np.arange(count, dtype=np.int64) * windows // max(count, 1), length)


def open_dataset(config: Config) -> Dataset:
    """The corpus that ``data.source`` names, tokenised once and kept in the user's cache folder.

    Raises DataError: no such data, unreadable, too short for one sequence of either split, or a
    ``model.vocab_size`` too small for its tokens. Any number of processes may call it at once.
    """
    try:
        tokenizer = open_tokenizer(config.data.tokenizer)
    except TokenizerError as error:
        raise DataError(f"data.tokenizer={show(config.data.tokenizer)}: {error}") from None
    size = max(tokenizer.size, tokenizer.end + 1)
    if config.model.vocab_size < size:
        what = "256 byte values and the end of a document" if size == VOCABULARY else "the tokens of data.tokenizer"
        raise DataError(f"model.vocab_size={config.model.vocab_size} must be at least {size}: {what}")
    train = config.train
    corpus = _corpus(config.data, tokenizer, train.sequence_length)
    return Dataset(
        train=corpus.tokens[: corpus.train_tokens],
        validation=corpus.tokens[corpus.train_tokens :],
        documents=corpus.documents,
        bytes=corpus.bytes,
        bytes_per_token=corpus.validation_bytes / (len(corpus.tokens) - corpus.train_tokens),
        fingerprint=corpus.fingerprint,
        sequence_length=train.sequence_length,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        document_end=tokenizer.end,
    )


def bits_per_byte(loss_sum_nats: float, targets: int, bytes_per_token: float = 1.0) -> float:
    """Validation loss in bits per byte, from the sum of the cross-entropy over ``targets`` tokens.

    The end of a document counts as a byte too, since it has to be predicted like any other. Where tokens are longer,
    ``bytes_per_token`` is that of the whole split, of which the targets are a sample.
    """
    return loss_sum_nats / math.log(2) / (targets * bytes_per_token)


def _corpus(data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> data_cache.Corpus:
    source = find_source(data.source)
    key = data_cache.key(source.identity(), tokenizer.identity(), data.validation_fraction, sequence_length)
    corpus = data_cache.read(key)
    if corpus is None:
        corpus = _tokenise(source, tokenizer, data.validation_fraction, sequence_length)
        data_cache.write(key, corpus)
    return corpus


def _tokenise(
    source: Source, tokenizer: Tokenizer, validation_fraction: float, sequence_length: int
) -> data_cache.Corpus:
    documents: list[bytes] = [text for text in source.documents() if text]
    if not documents:
        raise DataError(f"{source.setting} must hold text, and every document in it is empty")
    held_out = [_is_held_out(text, validation_fraction) for text in documents]
    train = _tokens((text for text, held in zip(documents, held_out, strict=True) if not held), tokenizer)
    validation = _tokens((text for text, held in zip(documents, held_out, strict=True) if held), tokenizer)
    validation_bytes: float = sum(len(text) + 1 for text, held in zip(documents, held_out, strict=True) if held)
    size = sum(map(len, documents))
    if min(len(train), len(validation)) <= sequence_length:
        whole = _tokens(documents, tokenizer)
        train, validation = _split_by_position(source, whole, validation_fraction, sequence_length)
        validation_bytes = (size + len(documents)) * len(validation) / len(whole)
    tokens = np.concatenate([train, validation])
    digest = hashlib.sha256(f"{len(train)} {len(validation)}\n".encode())
    digest.update(tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).data)
    return data_cache.Corpus(tokens, len(train), len(documents), size, validation_bytes, digest.hexdigest())


def _is_held_out(text: bytes, validation_fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < validation_fraction * 2**64


def _split_by_position(
    source: Source, tokens: Tokens, validation_fraction: float, sequence_length: int
) -> tuple[Tokens, Tokens]:
    window = sequence_length + 1
    if len(tokens) < 2 * window:
        raise DataError(
            f"{source.setting} must hold at least {2 * window} tokens, a sequence of train.sequence_length="
            f"{sequence_length} and its last target for training and for validation each; it has {len(tokens)}"
        )
    validation_tokens = min(max(round(len(tokens) * validation_fraction), window), len(tokens) - window)
    return tokens[:-validation_tokens], tokens[-validation_tokens:]


def _tokens(documents: Iterable[bytes], tokenizer: Tokenizer) -> Tokens:
    """The documents in a row, each with its end; in two bytes a token where that is enough."""
    dtype = np.uint16 if max(tokenizer.size, tokenizer.end + 1) <= 2**16 else np.uint32
    end = np.array([tokenizer.end], dtype=dtype)
    parts: list[npt.NDArray[Any]] = [np.empty(0, dtype=dtype)]
    for text in documents:
        if isinstance(tokenizer, ByteTokenizer):  # a list of every byte would take minutes
            parts += [np.frombuffer(text, dtype=np.uint8), end]
        else:
            parts += [np.array(tokenizer.encode(text), dtype=dtype), end]
    return np.concatenate(parts, dtype=dtype)


def _windows(tokens: Tokens, sequence_length: int) -> int:
    return max(len(tokens) - 1, 0) // sequence_length


def _read_windows(tokens: Tokens, windows: npt.NDArray[np.int64], sequence_length: int) -> Batch:
    rows = np.empty((len(windows), sequence_length + 1), dtype=np.int64)
    for row, window in zip(rows, windows, strict=True):
        start = int(window) * sequence_length
        row[:] = tokens[start : start + sequence_length + 1]
    return rows


@lru_cache(maxsize=2)  # a step may straddle two epochs
def _permutation(seed: int, epoch: int, windows: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(windows)
