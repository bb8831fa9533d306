"""Sources with weights: exact shares, at any step, and no sequence lost or repeated."""

from collections import Counter
from dataclasses import replace
from math import log2
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config import Config, ConfigError, from_dict
from launch.data import Dataset, open_dataset
from launch.data_corpus import Corpus
from launch.data_mix import Mixture

weights = st.lists(st.floats(0.001, 1000, allow_subnormal=False), min_size=1, max_size=5)


@given(weights, st.integers(1, 3000))
def test_no_source_is_far_from_its_share_after_any_number_of_visits(parts: list[float], visits: int) -> None:
    sources, places = Mixture(parts).place(np.arange(visits))
    for source, weight in enumerate(parts):
        mine = places[sources == source]
        assert mine.tolist() == list(range(len(mine))), "every visit to a source is its next one"
        ideal = np.arange(1, visits + 1) * (weight / sum(parts))
        off = np.abs(np.cumsum(sources == source) - ideal)
        assert (off <= 2 + np.log2(np.arange(1, visits + 1))).all()


@given(weights, st.integers(0, 2**60), st.integers(1, 50))
def test_the_mixture_may_be_entered_anywhere(parts: list[float], first: int, count: int) -> None:
    """Far from the beginning the counts go on as the visits say, and are in proportion."""
    mixture = Mixture(parts)
    sources, places = mixture.place(np.arange(first, first + count))
    running = mixture.counts(np.array([first]))[:, 0]
    assert running.sum() == first
    for share, number in zip(mixture.shares, running.tolist(), strict=True):
        assert abs(number - first * share) <= 2 + log2(first + 1)
    for source, place in zip(sources, places, strict=True):
        assert place == running[source]
        running[source] += 1


def test_weights_that_are_binary_fractions_are_exact_in_every_block() -> None:
    sources, _ = Mixture([1, 5, 2]).place(np.arange(80))
    for block in sources.reshape(-1, 8):
        assert sorted(Counter(block.tolist()).items()) == [(0, 1), (1, 5), (2, 2)]


def numbers(name: str, first: int, count: int) -> Corpus:
    tokens = np.arange(first, first + count)
    return Corpus(name, tokens, tokens, 1, 1.0, name)


def test_of_many_sources_each_order_is_drawn_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    generator = np.random.PCG64
    monkeypatch.setattr(np.random, "PCG64", lambda seed: drawn.append(seed) or generator(seed))
    sources = tuple(numbers(str(n), 100 * n, 21) for n in range(40))  # ten windows of two tokens and one more each
    data = Dataset(sources, (1.0,) * 40, 2, seed=7)
    for first in range(0, 1000, 20):
        data.visits(first, 20)
    assert Counter(map(str, drawn)) == {f"[7, {epoch}]": 40 for epoch in range(3)}


@settings(max_examples=40)
@given(st.integers(5, 60), st.integers(5, 60), st.floats(0.1, 9), st.integers(1, 4), st.integers(0, 9))
def test_a_mixed_stream_visits_every_window_of_a_source_once_an_epoch_and_needs_no_state(
    one: int, two: int, weight: float, length: int, seed: int
) -> None:
    data = Dataset((numbers("a", 0, one), numbers("b", 1000, two)), (weight, 1.0), length, seed)
    rows = data.visits(0, 200)
    assert (rows == rows[:, :1] + np.arange(length + 1)).all(), "a row is a window of one source"
    for corpus, start in zip(data.corpora, (0, 1000), strict=True):
        firsts = [int(row[0]) for row in rows if (row[0] >= 1000) == (start == 1000)]
        assert len(firsts) * length == data.source_tokens(len(rows))[corpus.name]
        epoch = corpus.windows(length)
        every = list(range(start, start + epoch * length, length))
        for at in range(0, len(firsts) - epoch + 1, epoch):
            assert sorted(firsts[at : at + epoch]) == every
    again = Dataset(data.corpora, data.weights, length, seed)
    for place in (199, 100, 0):
        assert (again.visits(place, 1)[0] == rows[place]).all(), "entered anywhere"


def test_bytes_of_a_token_are_those_of_the_sequences_that_are_validated() -> None:
    """A source with too few validation windows for its share counts for those that it has."""
    many, few = numbers("many", 0, 100), numbers("few", 0, 5)
    data = Dataset((replace(many, bytes_per_token=4.0), replace(few, bytes_per_token=2.0)), (1.0, 1.0), 4, seed=0)
    assert len(data.validation_sequences(8)) == 5, "four of the one, and the one that the other has"
    assert data.validation_bytes_per_token(8) == (4 * 4.0 + 1 * 2.0) / 5
    assert data.validation_bytes_per_token(2) == 3.0


def configured(tmp_path: Path, *parts: dict[str, object], **data: object) -> Config:
    train = {"steps": 1, "sequence_length": 8, "global_batch_size": 4}
    return from_dict({"train": train, "data": {"sources": list(parts), **data}, "run": {"dir": "unused"}})


def write(tmp_path: Path, name: str, letter: str) -> str:
    (tmp_path / name).write_text(letter * 300)
    return str(tmp_path / name)


def test_the_fingerprint_is_of_the_texts_and_of_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    a, b = write(tmp_path, "a.txt", "a"), write(tmp_path, "b.txt", "b")

    def opened(*parts: tuple[str, float]) -> Dataset:
        return open_dataset(configured(tmp_path, *({"source": name, "weight": weight} for name, weight in parts)))

    data = opened((a, 0.3), (b, 0.7))
    assert data.fingerprint == opened((a, 3), (b, 7)).fingerprint
    others = {opened((a, 3), (b, 6)).fingerprint, opened((a, 7), (b, 3)).fingerprint, opened((a, 1)).fingerprint}
    assert len({data.fingerprint, *others}) == 4
    letters = Counter(bytes(data.visits(0, 100)[:, :8].flatten().astype(np.uint8)).decode())
    assert abs(letters["a"] - 240) <= 3 * 8 and letters["a"] + letters["b"] == 800
    held = data.validation_sequences(2)
    assert sorted(set(held[:, 0].tolist())) == [97, 98], "both are validated"
    lines = list(data.summary(100))
    assert lines[-1] == "run: 100 sequences of 8 tokens, 800 tokens in all"
    assert f"data: {b}, 70.0% of the run, 1 document, 286 tokens to train on and 15 to validate on;" in lines[1]
    assert lines[1].endswith(f"; {letters['b'] / (35 * 8):.3g} epochs of it")


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ([{"source": "a", "weight": 0}], "data.sources[0].weight=0.0 must be positive"),
        ([{"source": "a"}, {"source": "b", "weight": -1.0}], "data.sources[1].weight=-1.0 must be positive"),
        ([{"source": "a", "weight": 1e-9}, {"source": "b", "weight": 1e9}], "a billionth of all weights at least"),
        ([{"source": "a"}, {"source": "a"}], "data.sources[1].source='a' must appear once"),
        ([{"source": " "}], "data.sources[0].source=' ' must be"),
    ],
)
def test_sources_that_cannot_be_mixed_are_refused(tmp_path: Path, parts: list[dict[str, object]], rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, *parts)
    assert rule in str(refused.value)
    with pytest.raises(ConfigError, match=r"data\.source='a' and data\.sources must not both be given"):
        configured(tmp_path, {"source": "b"}, source="a")
