"""Megatron's indexed data sets: what a writer put in is what a run trains on, and nothing else is taken for one."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config import Config, from_dict
from launch.data import DataError, Dataset, open_dataset
from launch.data_megatron import find_megatron, read_indexed, text_bytes
from launch.tokenizer import open_tokenizer
from launch.train import is_users
from launch.trainer import Trainer, UnusableSequence
from tests.launch.corpora import TEXTS, corpus, words

END = 256
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
documents = st.lists(
    st.lists(st.lists(st.integers(0, 100), max_size=6), min_size=1, max_size=3), min_size=1, max_size=8
)


def write(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], code: int = 8) -> None:
    """As Megatron's builder writes it: documents of sequences of tokens."""
    dtype = np.dtype(TYPES[code])
    sequences = [sequence for document in documents for sequence in document]
    sizes = [len(sequence) for sequence in sequences]
    firsts = [0, *np.cumsum(np.array(sizes, dtype=np.int64) * dtype.itemsize).tolist()][: len(sizes)]
    bounds = [0, *np.cumsum([len(document) for document in documents]).tolist()]
    with Path(f"{prefix}.bin").open("wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, dtype=dtype).tobytes(order="C"))
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", code))
        file.write(struct.pack("<Q", len(sizes)))
        file.write(struct.pack("<Q", len(bounds)))
        file.write(np.array(sizes, dtype=np.int32).tobytes(order="C"))
        file.write(np.array(firsts, dtype=np.int64).tobytes(order="C"))
        file.write(np.array(bounds, dtype=np.int64).tobytes(order="C"))


@given(documents, st.sampled_from(sorted(TYPES)))
def test_the_reader_sees_what_the_writer_wrote(
    tmp_path_factory: pytest.TempPathFactory, written: list[list[list[int]]], code: int
) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "data"
    write(prefix, written, code)
    read = read_indexed(prefix, "data.source=x", 101)
    assert read.tokens.dtype == np.dtype(TYPES[code]) and read.documents == len(written)
    starts = [read.start(number) for number in range(read.documents + 1)]
    found = [read.tokens[start:end].tolist() for start, end in pairwise(starts)]
    assert found == [[token for sequence in document for token in sequence] for document in written]


def configured(source: object, **changes: object) -> Config:
    train = {"steps": 1, "sequence_length": 8, "global_batch_size": 4}
    data = {"source": str(source), "validation_fraction": 0.3, **changes}
    return from_dict({"train": train, "data": data, "model": {"vocab_size": 257}, "run": {"dir": "unused"}})


def opened(prefix: Path, suffix: str = "") -> Dataset:
    return open_dataset(configured(f"{prefix}{suffix}"))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Forty documents of 1 to 20 tokens: document i says i, again and again."""
    write(tmp_path / "data", [[[number] * (number % 20 + 1), [END]] for number in range(40)])
    return tmp_path / "data"


def test_a_run_trains_on_the_files_as_they_lie(prefix: Path) -> None:
    """Whole documents are kept out, at least the fraction less one document; nothing is copied."""
    data = opened(prefix)
    (corpus,) = data.corpora
    row = np.fromfile(f"{prefix}.bin", np.uint16)
    assert (np.concatenate([corpus.train, corpus.validation]) == row).all()
    assert isinstance(corpus.train.base, np.memmap) and corpus.train[-1] == END and corpus.documents == 40
    assert 0.3 * len(row) - 21 <= len(corpus.validation) <= 0.3 * len(row)
    assert corpus.bytes_per_token == 1.0
    assert {opened(prefix, suffix).fingerprint for suffix in ("", ".bin", ".idx")} == {data.fingerprint}
    rows = data.visits(0, corpus.windows(8))
    assert sorted(rows[:, :-1].flatten().tolist()) == sorted(corpus.train[: rows.shape[0] * 8].tolist())


def test_another_token_or_another_cut_is_another_fingerprint(prefix: Path) -> None:
    before = opened(prefix).fingerprint
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[100] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    assert opened(prefix).fingerprint != before


def index(edit: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """A change to the bytes of the index."""

    def change(prefix: Path) -> None:
        content = bytearray(Path(f"{prefix}.idx").read_bytes())
        edit(content)
        Path(f"{prefix}.idx").write_bytes(content)

    return change


def put(at: int, layout: str, value: int) -> Callable[[Path], None]:
    return index(lambda content: struct.pack_into(layout, content, at, value))


def tokens(values: Sequence[int]) -> Callable[[Path], None]:
    return lambda prefix: write(prefix, [[[*values, END]]], 4)


SIZES, FIRSTS, BOUNDS = 34, 34 + 80 * 4, 34 + 80 * 12


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (put(0, "<B", 0), "data.idx must begin with MMIDIDX"),
        (index(lambda content: content.clear()), "data.idx must begin with MMIDIDX"),
        (put(9, "<Q", 2), "data.idx must be of version 1; it is of version 2"),
        (put(17, "<B", 7), "its type 7 is float32"),
        (put(17, "<B", 99), "its type 99 is unknown"),
        (put(18, "<Q", 2**60), "data.idx must have"),
        (index(lambda content: content.pop()), "data.idx must have"),
        (index(lambda content: content.extend(bytes(80))), "data.idx must have no modes"),
        (put(SIZES + 4 * 7, "<i", -1), "data.idx must have no negative size; sequence 7 has"),
        (put(SIZES, "<i", 3), "data.idx: sequence 1 must begin where the one before it ends"),
        (put(FIRSTS + 8 * 79, "<q", 0), "data.idx: sequence 79 must begin where the one before it ends"),
        (put(BOUNDS, "<q", 1), "document bounds must go from 0 to its 80 sequences"),
        (put(BOUNDS + 8 * 40, "<q", 79), "document bounds must go from 0 to its 80 sequences"),
        (put(BOUNDS + 8 * 5, "<q", 60), "document bounds must not decrease"),
        (put(17, "<B", 4), "sequence 1 must begin where the one before it ends"),
        (
            lambda prefix: Path(f"{prefix}.bin").write_bytes(b"\0" * 7),
            "data.bin must have 920 bytes, as its index says",
        ),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), "data.bin: No such file or directory"),
        (lambda prefix: Path(f"{prefix}.idx").unlink(), "data.idx: No such file or directory"),
        (tokens([257] * 30), "data.bin has token 257, and tokens must be from 0 to model.vocab_size=257 - 1"),
        (tokens([1] * 30 + [-1]), "data.bin has token -1"),
        (tokens([1] * 9), "must hold at least 18 tokens"),
        (lambda prefix: write(prefix, []), "must hold at least 18 tokens"),
        (lambda prefix: write(prefix, [[[1] * 50]]), "must end with token 256"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused_by_name(
    prefix: Path, damage: Callable[[Path], object], rule: str
) -> None:
    damage(prefix)
    with pytest.raises(DataError) as refused:
        opened(prefix, ".bin")
    assert str(refused.value).startswith(f"data.source='{prefix}.bin'") and rule in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(tmp_path: Path) -> None:
    """Of a large file pieces are seen at first; the others before they are trained on."""
    row = np.ones(20_000_000, dtype=np.uint16)
    row[-1] = END
    write(tmp_path / "data", [])
    write(tmp_path / "data", [[row]])  # type: ignore[list-item]
    with Path(f"{tmp_path / 'data'}.bin").open("r+b") as file:
        file.seek(2 * 50_000)
        file.write(struct.pack("<H", 4000))
    data = opened(tmp_path / "data")
    (corpus,) = data.corpora
    with pytest.raises(DataError, match=r"has token 4000, and tokens must be from 0 to model\.vocab_size=257 - 1"):
        corpus.read(corpus.train, np.array([3, 50_000 // 8]), 8)
    trainer = Trainer.__new__(Trainer)
    trainer.data = replace(data, corpora=(replace(corpus, train=corpus.train[50_000:50_009]),))
    with pytest.raises(UnusableSequence, match="has token 4000") as failed:
        trainer._read(0, 1)
    assert not is_users(failed.value), "one rank knows: it must not leave the words to rank 0"


def test_a_folder_of_indexed_files_is_answered_with_their_prefixes(prefix: Path) -> None:
    with pytest.raises(DataError) as refused:
        open_dataset(configured(prefix.parent))
    assert str(refused.value).endswith(f"must name Megatron's files by their prefix, not their folder; it has {prefix}")
    with pytest.raises(DataError, match=r"or what Megatron's PREFIX\.bin and PREFIX\.idx begin with, and none"):
        open_dataset(configured(f"{prefix}_text"))


def test_what_there_is_under_a_name_is_what_the_name_means(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies beside it; and a home that nobody has is said to be missing."""
    monkeypatch.chdir(tmp_path)
    for name in ("stdlib", "texts", "x", "x.bin", "a.txt"):
        Path(f"{name}.idx").touch()
    assert [find_megatron(name) for name in ("x.bin", "x", "texts")] == [Path("x"), Path("x"), Path("texts")]
    assert find_megatron("stdlib") is None
    corpus(tmp_path / "texts", TEXTS).rename("x.bin")
    corpus(tmp_path / "texts", TEXTS)
    Path("a.txt").write_text("x" * 100)
    assert [find_megatron(name) for name in ("texts", "x.bin", "a.txt", "~nobody-of-this-name/x.bin")] == [None] * 4
    assert open_dataset(configured("x.bin")).documents == len(TEXTS)
    with pytest.raises(DataError, match=r"^data\.source='~nobody-of-this-name/x\.bin' must be readable: "):
        open_dataset(configured("~nobody-of-this-name/x.bin"))


def test_each_document_is_decoded_alone(tmp_path: Path) -> None:
    """A text of any length is never one string, and no blank between two documents is a byte of either."""
    pytest.importorskip("tokenizers")
    tokenizer, texts = open_tokenizer(str(words(tmp_path / "words", 64))), ["document 1 says word", "", "word word"]
    row = np.array([token for text in texts for token in (*tokenizer.encode(text.encode()), 64)])
    assert text_bytes(row, tokenizer) == sum(map(len, texts)) + len(texts)
    assert text_bytes(row[:-1], tokenizer) == sum(map(len, texts)) + len(texts) - 1


def test_tokens_cannot_be_filled_in(prefix: Path) -> None:
    config = configured(prefix, fill_in_middle=0.1)
    wide = replace(config, model=replace(config.model, vocab_size=260))
    with pytest.raises(DataError, match=r"must be text for data\.fill_in_middle=0\.1, and it is tokens already"):
        open_dataset(wide)
    with pytest.raises(DataError, match="vocab_size=257 must be at least 260: 256 byte values"):
        open_dataset(config)
