"""One source as tokens: two rows of them, to train on and to validate on, and what is known about them."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from launch.data_source import DataError

Tokens: TypeAlias = npt.NDArray[np.integer[Any]]
Batch: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Both rows are mapped from disk, and only what is read is in memory."""

    name: str
    """The source, as the user gave it."""
    train: Tokens
    validation: Tokens
    documents: int
    """Documents with anything in them, over both splits."""
    bytes_per_token: float
    """Of the validation split; the end of a document counts as one byte."""
    fingerprint: str
    """SHA-256, in hexadecimal; equal fingerprints train on equal data."""
    setting: str = ""
    """'data.source=...', as messages begin."""
    vocabulary: int | None = None
    """What every token must be below, where somebody else made the tokens and not all of them were seen."""

    def windows(self, sequence_length: int) -> int:
        """Training sequences of one epoch."""
        return windows(self.train, sequence_length)

    def validation_windows(self, sequence_length: int) -> int:
        return windows(self.validation, sequence_length)

    def read(self, split: Tokens, chosen: npt.NDArray[np.int64], sequence_length: int) -> Batch:
        """Windows of ``train`` or ``validation``, [len(chosen), sequence_length + 1]. Raises DataError for a token that
        the model has not."""
        rows = np.empty((len(chosen), sequence_length + 1), dtype=np.int64)
        for row, window in zip(rows, chosen, strict=True):
            start = int(window) * sequence_length
            row[:] = split[start : start + sequence_length + 1]
        if self.vocabulary is not None:
            check_vocabulary(rows, self.vocabulary, self.setting)
        return rows


def windows(tokens: Tokens, sequence_length: int) -> int:
    """Sequences with all of their targets that stand in a row of tokens; each begins with the last target of the one
    before."""
    return max(len(tokens) - 1, 0) // sequence_length


def check_vocabulary(tokens: Tokens, vocabulary: int, setting: str) -> None:
    """Raises DataError when the model has not all of the tokens."""
    if tokens.size:
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= vocabulary:
            token = least if least < 0 else most
            raise DataError(
                f"{setting} has token {token}, and tokens must be from 0 to model.vocab_size={vocabulary} - 1"
            )


def too_short(setting: str, tokens: int, sequence_length: int) -> DataError:
    """What a source without a sequence for either split is refused with."""
    return DataError(
        f"{setting} must hold at least {2 * (sequence_length + 1)} tokens, a sequence of train.sequence_length="
        f"{sequence_length} and its last target for training and for validation each; it has {tokens}"
    )


def split_at(tokens: int, validation_fraction: float, sequence_length: int) -> int:
    """Where a row of so many tokens is cut by position: the rest is ``validation_fraction`` of it, but leaves at least
    a sequence on either side."""
    window = sequence_length + 1
    return tokens - min(max(round(tokens * validation_fraction), window), tokens - window)
