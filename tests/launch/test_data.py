"""The stream of tokens: what is in it, and that it depends on seed and step alone."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config import Config, from_dict
from launch.data import END_OF_DOCUMENT, DataError, Dataset, bits_per_byte, open_dataset
from launch.data_corpus import Corpus
from launch.data_source import find_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dualpipe"


def configured(source: object, **changes: object) -> Config:
    train = {"steps": 1, "sequence_length": 8, "global_batch_size": 4, **changes}
    fraction = train.pop("validation_fraction", 0.3)
    tokenizer = str(train.pop("tokenizer", "bytes"))
    field = train.pop("text_field", "text")
    return from_dict(
        {
            "train": train,
            "model": {"vocab_size": train.pop("vocab_size", 257)},
            "data": {
                "source": str(source),
                "validation_fraction": fraction,
                "tokenizer": tokenizer,
                "text_field": field,
            },
            "run": {"dir": "unused"},
        }
    )


def corpus(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_bytes(text.encode())
    return folder


def documents(tokens: np.ndarray) -> list[bytes]:
    """The documents in a split, from its tokens."""
    ends = np.flatnonzero(tokens == END_OF_DOCUMENT)
    starts = [0, *(ends[:-1] + 1)]
    return [bytes(tokens[start:end].astype(np.uint8)) for start, end in zip(starts, ends, strict=True)]


def opened(config: Config) -> Corpus:
    """The one corpus of a configuration."""
    (only,) = open_dataset(config).corpora
    return only


def stream(train_tokens: int, sequence_length: int, global_batch_size: int, seed: int) -> Dataset:
    """A data set whose training token i has the value i, so that a window shows where it came from."""
    tokens = np.arange(train_tokens, dtype=np.uint16)
    corpus = Corpus("numbers", tokens, tokens, 1, 1.0, "")
    return Dataset((corpus,), (1.0,), sequence_length, global_batch_size, seed)


TEXTS = [f"document {number} says {'word ' * (number % 5)}" for number in range(60)]
sizes = {
    "tokens": st.integers(30, 400),
    "length": st.integers(1, 20),
    "batch": st.integers(1, 50),
    "seed": st.integers(0, 9),
}


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


def test_jsonl_and_txt_hold_the_same_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": ""})]) + "\n")
    from_lines = opened(configured(tmp_path / "texts.jsonl"))
    from_files = opened(configured(corpus(tmp_path / "texts", TEXTS)))
    assert from_lines.fingerprint == from_files.fingerprint
    assert from_lines.documents == len(TEXTS)


def test_a_folder_a_glob_and_the_order_of_creation_agree(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "texts", TEXTS)
    (folder / "notes.md").write_text("not a document")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for path in sorted(folder.glob("*.txt"), reverse=True):
        (mirror / path.name).write_bytes(path.read_bytes())
    prints = {
        opened(configured(source)).fingerprint for source in (folder, f"{folder}/*", mirror, f"{folder}/**/*.txt")
    }
    assert len(prints) == 1


def test_bytes_that_are_not_utf8_are_tokens_too(tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_bytes(bytes(range(256)))
    data = opened(configured(tmp_path / "raw.txt"))
    assert [*data.train, *data.validation] == [*range(256), END_OF_DOCUMENT]


def test_the_standard_library_needs_no_network_and_leaves_packages_and_tests_out(tmp_path: Path) -> None:
    data = opened(configured("stdlib", sequence_length=256, validation_fraction=0.05))
    texts = set(documents(data.train)) | set(documents(data.validation))
    assert Path(json.__file__).read_bytes() in texts
    assert Path(pytest.__file__).read_bytes() not in texts
    assert len(data.train) > 5_000_000
    assert 0.01 < len(data.validation) / len(data.train) < 0.2


@given(**sizes)
def test_an_epoch_visits_every_window_once(tokens: int, length: int, batch: int, seed: int) -> None:
    data = stream(tokens, length, batch, seed)
    windows = data.corpora[0].windows(length)
    steps = -(-2 * windows // batch)
    rows = np.concatenate([data.batch(step) for step in range(steps)])
    assert (rows == rows[:, :1] + np.arange(length + 1)).all(), "a row is a contiguous window"
    every_start = Counter(range(0, windows * length, length))
    for epoch in (0, 1):
        visited = rows[epoch * windows : (epoch + 1) * windows, 0]
        assert Counter(visited.tolist()) == every_start


@given(**sizes, step=st.integers(0, 1000), cuts=st.lists(st.integers(0, 50), max_size=5))
def test_rows_do_not_depend_on_how_a_step_is_shared_out(
    tokens: int, length: int, batch: int, seed: int, step: int, cuts: list[int]
) -> None:
    whole = stream(tokens, length, batch, seed).batch(step)
    assert whole.shape == (batch, length + 1) and whole.dtype == np.int64
    edges = sorted({0, batch, *(min(cut, batch) for cut in cuts)})
    other = stream(tokens, length, batch, seed)
    pieces = [other.sequences(step, first, end - first) for first, end in pairwise(edges)]
    assert (np.concatenate(pieces) == whole).all()


def test_seed_and_epoch_change_the_order() -> None:
    data = stream(4000, 4, 999, 1)
    assert data.corpora[0].windows(4) == 999
    first, second = data.batch(0), data.batch(1)
    assert (first != second).any()
    assert (first != replace(data, seed=2).batch(0)).any()
    assert (first[:, 0] != np.sort(first[:, 0])).any()


@given(tokens=st.integers(2, 400), length=st.integers(1, 20), count=st.integers(0, 40))
def test_validation_windows_are_distinct_whole_and_spread_evenly(tokens: int, length: int, count: int) -> None:
    data = stream(tokens, 1, 1, 1)
    rows = data.validation_sequences(count, length)
    available = (tokens - 1) // length
    assert rows.shape == (min(count, available), length + 1)
    assert (rows == rows[:, :1] + np.arange(length + 1)).all()
    gaps = np.diff(rows[:, 0])
    if len(gaps):
        assert gaps.min() >= length and gaps.max() - gaps.min() <= length


def test_the_second_time_nothing_is_tokenised(tmp_path: Path, cache: Path) -> None:
    config = configured(corpus(tmp_path / "texts", TEXTS))
    first = opened(config)
    (stored,) = cache.iterdir()
    written = stored.stat()
    second = opened(config)
    assert stored.stat() == written
    assert isinstance(second.train.base, np.memmap) or isinstance(second.train, np.memmap)
    assert (second.train == first.train).all() and (second.validation == first.validation).all()
    assert (second.fingerprint, second.documents) == (first.fingerprint, first.documents)


@pytest.mark.parametrize("change", ["content", "fraction", "new file"])
def test_the_cache_does_not_outlive_what_it_was_made_from(tmp_path: Path, change: str) -> None:
    folder = corpus(tmp_path / "texts", TEXTS)
    before = opened(configured(folder))
    if change == "content":
        (folder / "0000.txt").write_text("another text")
    if change == "new file":
        (folder / "9999.txt").write_text("another text")
    after = opened(configured(folder, validation_fraction=0.6 if change == "fraction" else 0.3))
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 5000])
def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path, damage: bytes) -> None:
    config = configured(corpus(tmp_path / "texts", TEXTS))
    fingerprint = opened(config).fingerprint
    (stored,) = cache.iterdir()
    stored.write_bytes(damage)
    again = opened(config)
    assert again.fingerprint == fingerprint
    assert len(documents(again.train)) + len(documents(again.validation)) == len(TEXTS)


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(corpus(tmp_path / "texts", TEXTS))
    fingerprint = opened(config).fingerprint
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert opened(config).fingerprint == fingerprint


def _open(config: Config) -> tuple[str, int]:
    data = open_dataset(config)
    return data.fingerprint, int(data.batch(3).sum())


def test_ranks_that_start_at_once_see_the_same_data(tmp_path: Path, cache: Path) -> None:
    config = configured(corpus(tmp_path / "texts", TEXTS))
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        assert len(set(pool.map(_open, [config] * 8))) == 1
    assert [path.suffix for path in cache.iterdir()] == [".tokens"], "no temporary file stays"


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("empty.txt", b"", "must hold text"),
        ("short.txt", b"seventeen tokens", "at least 18 tokens"),
        ("image.png", b"x" * 100, "must be a .txt, .jsonl or .parquet file"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": }\n', "bad.jsonl:2 must be one JSON object"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1 must be a JSON object with a string 'text'"),
        ("number.jsonl", b'\n{"text": 3}\n', "number.jsonl:2 must be a JSON object with a string 'text'"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "latin.jsonl:1 must be one JSON object"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path: Path, name: str, content: bytes, rule: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        opened(configured(path))
    assert f"data.source={str(path)!r}" in str(refused.value)
    assert rule in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_source_that_names_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only.md").write_text("not a document")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    absent = (tmp_path / "absent.txt", tmp_path / "*.txt", "~nobody-of-this-name/x.txt")
    for source in (*absent, tmp_path, tmp_path / "pipe", "/dev/null", "nul\0.txt"):
        with pytest.raises(DataError, match=re.escape(f"data.source={str(source)!r}")):
            opened(configured(source))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="regular file"):
        opened(configured(tmp_path / "pipe.txt"))


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "texts", TEXTS)
    (folder / "0003.txt").chmod(0)
    with pytest.raises(DataError, match=r"data\.source=.*0003\.txt: Permission denied"):
        opened(configured(folder))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus(tmp_path / "texts", TEXTS)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DataError, match=r"data\.source=.*0000\.txt: Permission denied"):
        opened(configured(folder))


def test_a_vocabulary_without_room_for_the_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 must be at least 257"):
        opened(configured(corpus(tmp_path / "texts", TEXTS), vocab_size=256))


@pytest.mark.parametrize("targets", [1, 1000])
def test_a_uniform_guess_over_256_bytes_costs_eight_bits(targets: int) -> None:
    assert bits_per_byte(targets * float(np.log(256)), targets) == pytest.approx(8)


def words(folder: Path, end: int, offset: int = 0) -> Path:
    """A Hugging Face folder whose tokens are words; ``offset`` moves their numbers up."""
    folder.mkdir()
    known = ["?", "document", "says", "word", *map(str, range(60))]
    model = {"type": "WordLevel", "vocab": {w: offset + n for n, w in enumerate(known)}, "unk_token": "?"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
    return folder


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


def test_bits_per_byte_divides_by_the_bytes_of_the_tokens() -> None:
    assert bits_per_byte(10 * float(np.log(256)), 10, bytes_per_token=4.0) == pytest.approx(2)


def parquet(
    path: Path, texts: Sequence[str | None], rows: int = 7, name: str = "content", **columns: list[int]
) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({name: texts, **columns}), path, row_group_size=rows)
    return path


def test_parquet_and_jsonl_hold_the_same_documents_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"content": text}) for text in TEXTS[30:]))
    parquet(tmp_path / "a.parquet", [*TEXTS[:30], ""], id=list(range(31)))
    mixed = opened(configured(tmp_path, text_field="content"))
    assert mixed.fingerprint == opened(configured(corpus(tmp_path / "texts", TEXTS))).fingerprint
    assert mixed.documents == len(TEXTS)


def test_of_a_parquet_file_a_part_of_a_row_group_is_in_memory(tmp_path: Path) -> None:
    """Forty groups of 1 MB each of text that compresses badly; pyarrow counts what it holds."""
    pyarrow = pytest.importorskip("pyarrow")
    path = parquet(tmp_path / "a.parquet", [os.urandom(5000).hex() for _ in range(4000)], rows=100)
    before, most, total = pyarrow.total_allocated_bytes(), 0, 0
    for text in find_source(str(path), text_field="content").documents():
        most, total = max(most, pyarrow.total_allocated_bytes() - before), total + len(text)
    assert total == 40_000_000
    assert most < 8_000_000


@pytest.mark.parametrize(
    ("texts", "field", "rule"),
    [
        (["a", None], "content", "row 2: 'content' must not be null"),
        (["a"], "text", "data.text_field='text' must be a column of text in "),
        (["a"], "id", "its columns of text are content"),
    ],
)
def test_parquet_without_text_is_refused(tmp_path: Path, texts: list[str | None], field: str, rule: str) -> None:
    path = parquet(tmp_path / "a.parquet", texts, id=list(range(len(texts))))
    with pytest.raises(DataError) as refused:
        opened(configured(path, text_field=field))
    assert str(refused.value).startswith(f"data.source={str(path)!r}") and rule in str(refused.value)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet must be a whole \.parquet file"):
        opened(configured(path))


def test_parquet_without_pyarrow_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the package 'pyarrow'.*pip install 'dualpipe-trainer\[parquet\]'"):
        opened(configured(tmp_path / "a.parquet"))
