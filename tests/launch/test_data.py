"""A text as tokens: every byte is in one split, the same one whatever else there is."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launch.data import END_OF_DOCUMENT, DataError
from tests.launch.corpora import TEXTS, configured, corpus, documents, opened, words

pytestmark = pytest.mark.usefixtures("cache")


def test_every_byte_of_every_document_is_a_token_in_exactly_one_split(tmp_path: Path) -> None:
    data = opened(configured(corpus(tmp_path / "texts", TEXTS)))
    both = documents(data.train) + documents(data.validation)
    assert sorted(both) == sorted(text.encode() for text in TEXTS)
    assert documents(data.train) and documents(data.validation)
    assert data.documents == len(TEXTS)
    assert len(data.train) + len(data.validation) == sum(map(len, TEXTS)) + len(TEXTS)


def test_adding_documents_moves_no_other_between_the_splits(tmp_path: Path) -> None:
    before = opened(configured(corpus(tmp_path / "texts", TEXTS)))
    held_out = set(documents(before.validation))
    (tmp_path / "texts" / "0000a.txt").write_text("one more, in the middle")
    after = opened(configured(tmp_path / "texts"))
    assert after.documents == before.documents + 1
    assert set(documents(after.validation)) - {b"one more, in the middle"} == held_out
    assert after.fingerprint != before.fingerprint


def test_copies_of_a_text_stay_on_one_side(tmp_path: Path) -> None:
    data = opened(configured(corpus(tmp_path / "texts", TEXTS + TEXTS)))
    assert not set(documents(data.train)) & set(documents(data.validation))


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_single_document_is_split_by_position(tmp_path: Path, fraction: float) -> None:
    text = "".join(chr(97 + number % 26) for number in range(200))
    data = opened(configured(corpus(tmp_path / "texts", [text]), validation_fraction=fraction))
    row = np.concatenate([data.train, data.validation])
    assert bytes(row[:-1].astype(np.uint8)) == text.encode() and row[-1] == END_OF_DOCUMENT
    assert len(data.validation) == min(max(round(201 * fraction), 9), 201 - 9)


def test_a_vocabulary_without_room_for_the_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 must be at least 257"):
        opened(configured(corpus(tmp_path / "texts", TEXTS), vocab_size=256))


@pytest.mark.parametrize(("offset", "dtype"), [(0, np.uint16), (100_000, np.uint32)])
def test_a_published_tokenizer_reads_the_documents(tmp_path: Path, offset: int, dtype: type) -> None:
    pytest.importorskip("tokenizers")
    end = offset + 64
    folder = words(tmp_path / "words", end, offset)
    config = configured(corpus(tmp_path / "texts", TEXTS), vocab_size=end + 1, tokenizer=folder)
    read = [opened(config), opened(config)]  # the second from the cache
    for data in read:
        assert data.train.dtype == dtype and data.validation.dtype == dtype
        row = [*data.train.tolist(), *data.validation.tolist()]
        assert row.count(end) == len(TEXTS) and row[-1] == end
        assert sorted(Counter(row).items()) == sorted(
            Counter(
                offset + {"document": 1, "says": 2, "word": 3}.get(word, 4 + int(word) if word.isdecimal() else 0)
                if word is not None
                else end
                for text in TEXTS
                for word in (*text.split(), None)
            ).items()
        )
        held_out = set(documents(opened(configured(tmp_path / "texts")).validation))
        assert data.bytes_per_token * len(data.validation) == pytest.approx(sum(len(text) + 1 for text in held_out))
    assert read[0].fingerprint == read[1].fingerprint
    other = configured(tmp_path / "texts", vocab_size=end + 2, tokenizer=words(tmp_path / "more", end + 1, offset))
    assert opened(other).fingerprint != read[0].fingerprint


def test_a_tokenizer_that_cannot_be_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    texts = corpus(tmp_path / "texts", TEXTS)
    with pytest.raises(DataError, match=r"data.tokenizer='?nowhere'?: nowhere/config.json must be readable"):
        opened(configured(texts, tokenizer="nowhere"))
    with pytest.raises(DataError, match=r"model.vocab_size=64 must be at least 65: the tokens of data.tokenizer"):
        opened(configured(texts, vocab_size=64, tokenizer=words(tmp_path / "words", 64)))
