"""Text as tokens, and an endless row of training sequences that can be entered anywhere.

Tokenisation is by byte (token 0..255 is the byte of that value, and 256, ``END_OF_DOCUMENT``, follows every document),
or by a published tokenizer, whose own end follows every document then. The tokens of a source's training split stand in
one row; sequence i is the window of ``sequence_length + 1`` tokens that begins at ``i * sequence_length`` (inputs are
all but its last token, targets all but its first). An epoch of a source visits each of its windows once, in a
permutation drawn from (seed, epoch). The mixture (``data_mix.py``) says from which source each visit is. So visit v
depends on the seed and v alone, and the row of visits can be entered anywhere without a state. A run reads it in order:
how many visits its steps take, and which it leaves out, is the run's (``trainer.py``).
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from launch.config import Config, show
from launch.data_corpus import Batch, Corpus
from launch.data_megatron import find_megatron, open_megatron
from launch.data_mix import Mixture
from launch.data_source import DataError, find_source
from launch.data_text import open_text, vocabulary_of
from launch.tokenizer import END_OF_DOCUMENT, VOCABULARY, Tokenizer, TokenizerError, open_tokenizer

__all__ = ["END_OF_DOCUMENT", "VOCABULARY", "DataError", "Dataset", "bits_per_byte", "open_dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """All sources, and the order in which a run visits their training windows. ``weights``: of each corpus, in any
    unit."""

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    sequence_length: int
    seed: int
    document_end: int = END_OF_DOCUMENT
    """The token between documents: the last of one, and what the next one begins with."""

    @cached_property
    def mixture(self) -> Mixture:
        return Mixture(self.weights)

    @cached_property
    def _orders(self) -> list["_Orders"]:
        return [_Orders(self.seed, corpus.windows(self.sequence_length)) for corpus in self.corpora]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal; equal fingerprints train on equal data, in equal shares."""
        if len(self.corpora) == 1:
            return self.corpora[0].fingerprint
        shares = zip(self.corpora, self.mixture.shares, strict=True)
        return hashlib.sha256(json.dumps([[c.fingerprint, str(share)] for c, share in shares]).encode()).hexdigest()

    @property
    def documents(self) -> int:
        """Documents with anything in them, over all sources and both splits."""
        return sum(corpus.documents for corpus in self.corpora)

    def visits(self, first: int, count: int) -> Batch:
        """``count`` sequences of the endless row of visits, from position ``first`` of it,
        ``[count, sequence_length + 1]``; reads nothing else."""
        sources, places = self.mixture.place(first + np.arange(count, dtype=np.int64))
        rows = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for source, corpus in enumerate(self.corpora):
            here = sources == source
            if here.any():
                chosen = self._orders[source].windows_of(places[here])
                rows[here] = corpus.read(corpus.train, chosen, self.sequence_length)
        return rows

    def source_tokens(self, visits: int) -> dict[str, int]:
        """Training tokens of each source among the first ``visits`` sequences."""
        counts = self.mixture.counts(np.array([visits], dtype=np.int64))[:, 0]
        return {c.name: int(n) * self.sequence_length for c, n in zip(self.corpora, counts, strict=True)}

    def validation_sequences(self, count: int, sequence_length: int | None = None) -> Batch:
        """``[count, sequence_length + 1]`` from the validation splits, in the sources' shares: the same ones at every
        call.

        The windows overlap by the one token that is a target of the first and an input of the second, and are spread
        evenly over the split. Fewer than ``count`` come back when a split holds no more.
        """
        length = sequence_length or self.sequence_length
        parts = [np.empty((0, length + 1), dtype=np.int64)]
        for corpus, share in zip(self.corpora, self._validation_shares(count, length), strict=True):
            chosen = np.arange(share, dtype=np.int64) * corpus.validation_windows(length) // max(share, 1)
            parts.append(corpus.read(corpus.validation, chosen, length))
        return np.concatenate(parts)

    def validation_bytes_per_token(self, count: int) -> float:
        """Of the validation splits, in the proportion in which ``validation_sequences(count)`` has them, at least one;
        the end of a document counts as one byte."""
        shares = self._validation_shares(count, self.sequence_length)
        each = [corpus.bytes_per_token for corpus in self.corpora]
        return sum(share * size for share, size in zip(shares, each, strict=True)) / sum(shares)

    def _validation_shares(self, count: int, length: int) -> list[int]:
        """How many of ``count`` validation sequences are from each source: no more than its split holds."""
        shares = self.mixture.counts(np.array([count], dtype=np.int64))[:, 0].tolist()
        return [min(share, c.validation_windows(length)) for c, share in zip(self.corpora, shares, strict=True)]

    def summary(self, sequences: int) -> Iterator[str]:
        """A line for each source, and one for a run of so many sequences in all."""
        seen = self.source_tokens(sequences)
        for corpus, share in zip(self.corpora, self.mixture.shares, strict=True):
            epoch = corpus.windows(self.sequence_length) * self.sequence_length
            part = f"{float(share):.1%} of the run, " if len(self.corpora) > 1 else ""
            yield (
                f"data: {corpus.name}, {part}{corpus.documents:,} document{'s' * (corpus.documents != 1)}, "
                f"{len(corpus.train):,} tokens to train on and {len(corpus.validation):,} to validate on; "
                f"{seen[corpus.name] / epoch:.3g} epochs of it"
            )
        yield f"run: {sequences:,} sequences of {self.sequence_length:,} tokens, {sum(seen.values()):,} tokens in all"


def open_dataset(config: Config) -> Dataset:
    """The sources that ``data`` names; text is tokenised once and kept in the user's cache folder.

    Raises DataError: no such data, unreadable, too short for one sequence of either split, or a
    ``model.vocab_size`` too small for its tokens. Any number of processes may call it at once.
    """
    data, train = config.data, config.train
    try:
        tokenizer = open_tokenizer(data.tokenizer)
    except TokenizerError as error:
        raise DataError(f"data.tokenizer={show(data.tokenizer)}: {error}") from None
    _check_tokenizer(config, tokenizer)
    parts = data.named()
    return Dataset(
        corpora=tuple(_open(config, tokenizer, part.source, key) for key, part in parts),
        weights=tuple(part.weight for _, part in parts),
        sequence_length=train.sequence_length,
        seed=train.seed,
        document_end=tokenizer.end,
    )


def _open(config: Config, tokenizer: Tokenizer, name: str, key: str) -> Corpus:
    data, length = config.data, config.train.sequence_length
    prefix = find_megatron(name)
    if prefix is None:
        return open_text(name, find_source(name, key, data.text_field), tokenizer, data, length)
    setting = f"{key}={show(name)}"
    if data.fill_in_middle:
        raise DataError(
            f"{setting} must be text for data.fill_in_middle={data.fill_in_middle}, and it is tokens already"
        )
    return open_megatron(name, prefix, setting, tokenizer, config.model.vocab_size, data.validation_fraction, length)


def _check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    fill = config.data.fill_in_middle
    if fill and tokenizer.sentinels is None:
        raise DataError(
            f"data.fill_in_middle={fill} needs a tokenizer with the three marks of prefix, suffix and middle, and "
            f"data.tokenizer={show(config.data.tokenizer)} has none that are known"
        )
    size = vocabulary_of(tokenizer, fill > 0)
    if config.model.vocab_size < size:
        what = "the tokens of data.tokenizer"
        if config.data.tokenizer == "bytes":
            what = "256 byte values and the end of a document" + (
                ", and three marks to fill in the middle" * (fill > 0)
            )
        raise DataError(f"model.vocab_size={config.model.vocab_size} must be at least {size}: {what}")


def bits_per_byte(loss_sum_nats: float, targets: int, bytes_per_token: float = 1.0) -> float:
    """Validation loss in bits per byte, from the sum of the cross-entropy over ``targets`` tokens.

    The end of a document counts as a byte too, since it has to be predicted like any other. Where tokens are longer,
    ``bytes_per_token`` is that of the whole split, of which the targets are a sample.
    """
    return loss_sum_nats / math.log(2) / (targets * bytes_per_token)


class _Orders:
    """Which of its ``windows`` a source's visits are to: a permutation an epoch. The last two that were used are kept,
    since a step may straddle two epochs; each source keeps its own, so that no number of sources drives them out."""

    def __init__(self, seed: int, windows: int) -> None:
        self._seed, self._windows = seed, windows
        self._kept: dict[int, npt.NDArray[np.int64]] = {}

    def windows_of(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The windows that visits ``places`` of this source are to."""
        epochs, places = np.divmod(places, self._windows)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = self._order(epoch)[places[here]]
        return chosen

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        order = self._kept.pop(epoch, None)
        if order is None:
            order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self._windows)
        self._kept[epoch] = order
        if len(self._kept) > 2:
            del self._kept[next(iter(self._kept))]
        return order
