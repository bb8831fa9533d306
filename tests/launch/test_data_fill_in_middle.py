"""Fill in the middle: which documents, where they are cut, and that nothing of them is lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config import from_dict
from launch.data import DataError, open_dataset
from launch.data_corpus import Corpus
from launch.data_fill_in_middle import cut

PREFIX, SUFFIX, MIDDLE, END = 257, 258, 259, 256
TEXTS = [f"document {number} says {'word ' * (number % 5)}é" for number in range(200)]


@settings(max_examples=50)
@given(st.text())
def test_a_text_is_cut_in_three_between_characters(text: str) -> None:
    pieces = cut(text.encode(), 1.0)
    assert pieces is not None and b"".join(pieces) == text.encode()
    for piece in pieces:
        piece.decode()
    assert cut(text.encode(), 0.0) is None and cut(text.encode(), 1.0) == pieces


@given(st.binary(), st.floats(0, 1))
def test_any_bytes_are_cut_and_a_higher_rate_cuts_the_same_ones_and_more(text: bytes, rate: float) -> None:
    pieces = cut(text, rate)
    assert pieces is None or (b"".join(pieces) == text and cut(text, 1.0) == pieces)


def test_the_rate_is_a_share_of_the_documents_and_cuts_are_everywhere() -> None:
    texts = [f"{number:06}{'x' * 94}".encode() for number in range(20_000)]
    pieces = [found for text in texts if (found := cut(text, 0.1)) is not None]
    assert abs(len(pieces) - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    lengths = np.array([[len(piece) for piece in found] for found in pieces])
    # The two cuts are uniform: a third of the text each, on average, with a deviation of sqrt(1/18) of it.
    assert (abs(lengths.mean(axis=0) - 100 / 3) < 4 * 100 * (1 / 18 / len(pieces)) ** 0.5).all()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(tmp_path: Path, rate: float, vocab_size: int = 260, **data: Any) -> Corpus:
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    source = {"source": str(tmp_path / "texts.jsonl"), "validation_fraction": 0.3, "fill_in_middle": rate, **data}
    train = {"steps": 1, "sequence_length": 8, "global_batch_size": 4}
    model = {"vocab_size": vocab_size}
    (corpus,) = open_dataset(
        from_dict({"train": train, "data": source, "model": model, "run": {"dir": "unused"}})
    ).corpora
    return corpus


def documents(tokens: np.ndarray) -> list[list[int]]:
    ends = np.flatnonzero(tokens == END)
    return [tokens[start:end].tolist() for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True)]


def restored(document: list[int]) -> str:
    """The text of a document, whether or not it was cut."""
    if document[0] == PREFIX:
        suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
        document = document[1:suffix] + document[middle + 1 :] + document[suffix + 1 : middle]
    return bytes(document).decode()


def test_training_documents_are_cut_and_the_others_left(tmp_path: Path) -> None:
    plain, some = opened(tmp_path, 0.0), opened(tmp_path, 0.5)
    assert plain.fingerprint != some.fingerprint and opened(tmp_path, 0.5).fingerprint == some.fingerprint
    assert (plain.validation == some.validation).all()
    train = documents(some.train)
    assert [restored(document) for document in train] == [
        bytes(document).decode() for document in documents(plain.train)
    ]
    share = sum(document[0] == PREFIX for document in train) / len(train)
    assert 0.3 < share < 0.7
    assert max(len(set(document) & {PREFIX, SUFFIX, MIDDLE}) for document in train) == 3


def published(folder: Path, marks: list[str]) -> Path:
    """A Hugging Face folder whose tokens are words, and the marks."""
    folder.mkdir()
    known = ["?", "document", "says", "word", *map(str, range(200))]
    added = [
        {"id": 204 + at, "content": mark, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for at, mark in enumerate(marks)
    ]
    model = {"type": "WordLevel", "vocab": {word: at for at, word in enumerate(known)}, "unk_token": "?"}
    tokenizer = {"version": "1.0", "added_tokens": added, "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 299}))
    return folder


DEEPSEEK = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]  # noqa: RUF001, as DeepSeek writes them


@pytest.mark.parametrize("marks", [DEEPSEEK, ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]])
def test_a_published_tokenizer_brings_its_own_marks(tmp_path: Path, marks: list[str]) -> None:
    folder = published(tmp_path / "words", marks)
    corpus = opened(tmp_path, 1.0, 303, tokenizer=str(folder))
    ends = np.flatnonzero(corpus.train == 299)
    assert len(ends) > 50
    for mark in (204, 205, 206):  # behind the words, whatever the file says
        assert (corpus.train == mark).sum() == len(ends)
    assert (corpus.train[ends[:-1] + 1] == 204).all() and corpus.validation.tolist().count(299) > 20
    assert not np.isin(corpus.validation, [204, 205, 206]).any()


def test_a_tokenizer_or_a_model_without_the_marks_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "words", DEEPSEEK[:2])
    with pytest.raises(DataError, match=r"data\.fill_in_middle=0\.1 needs a tokenizer with the three marks"):
        opened(tmp_path, 0.1, 303, tokenizer=str(folder))
    with pytest.raises(DataError, match=r"model\.vocab_size=259 must be at least 260: .* three marks"):
        opened(tmp_path, 0.1, 259)
    assert opened(tmp_path, 0.0, 257).documents == len(TEXTS)
