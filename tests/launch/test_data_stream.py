"""The stream of tokens depends on seed and step alone, and its loss is counted in bits per byte."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data import Dataset, bits_per_byte
from launch.data_corpus import Corpus


def stream(train_tokens: int, sequence_length: int, seed: int) -> Dataset:
    """A data set whose training token i has the value i, so that a window shows where it came from."""
    tokens = np.arange(train_tokens, dtype=np.uint16)
    corpus = Corpus("numbers", tokens, tokens, 1, 1.0, "")
    return Dataset((corpus,), (1.0,), sequence_length, seed)


sizes = {
    "tokens": st.integers(30, 400),
    "length": st.integers(1, 20),
    "seed": st.integers(0, 9),
}


@given(**sizes)
def test_an_epoch_visits_every_window_once(tokens: int, length: int, seed: int) -> None:
    data = stream(tokens, length, seed)
    windows = data.corpora[0].windows(length)
    rows = data.visits(0, 2 * windows)
    assert (rows == rows[:, :1] + np.arange(length + 1)).all(), "a row is a contiguous window"
    every_start = Counter(range(0, windows * length, length))
    for epoch in (0, 1):
        visited = rows[epoch * windows : (epoch + 1) * windows, 0]
        assert Counter(visited.tolist()) == every_start


@given(**sizes, first=st.integers(0, 50_000), batch=st.integers(1, 50), cuts=st.lists(st.integers(0, 50), max_size=5))
def test_rows_do_not_depend_on_how_a_step_is_shared_out(
    tokens: int, length: int, seed: int, first: int, batch: int, cuts: list[int]
) -> None:
    whole = stream(tokens, length, seed).visits(first, batch)
    assert whole.shape == (batch, length + 1) and whole.dtype == np.int64
    edges = sorted({0, batch, *(min(cut, batch) for cut in cuts)})
    other = stream(tokens, length, seed)
    pieces = [other.visits(first + start, end - start) for start, end in pairwise(edges)]
    assert (np.concatenate(pieces) == whole).all()


def test_seed_and_epoch_change_the_order() -> None:
    data = stream(4000, 4, seed=1)
    assert data.corpora[0].windows(4) == 999
    first, second = data.visits(0, 999), data.visits(999, 999)
    assert (first != second).any()
    assert (first != replace(data, seed=2).visits(0, 999)).any()
    assert (first[:, 0] != np.sort(first[:, 0])).any()


@given(tokens=st.integers(2, 400), length=st.integers(1, 20), count=st.integers(0, 40))
def test_validation_windows_are_distinct_whole_and_spread_evenly(tokens: int, length: int, count: int) -> None:
    data = stream(tokens, 1, seed=1)
    rows = data.validation_sequences(count, length)
    available = (tokens - 1) // length
    assert rows.shape == (min(count, available), length + 1)
    assert (rows == rows[:, :1] + np.arange(length + 1)).all()
    gaps = np.diff(rows[:, 0])
    if len(gaps):
        assert gaps.min() >= length and gaps.max() - gaps.min() <= length


@pytest.mark.parametrize("targets", [1, 1000])
def test_a_uniform_guess_over_256_bytes_costs_eight_bits(targets: int) -> None:
    assert bits_per_byte(targets * float(np.log(256)), targets) == pytest.approx(8)


def test_bits_per_byte_divides_by_the_bytes_of_the_tokens() -> None:
    assert bits_per_byte(10 * float(np.log(256)), 10, bytes_per_token=4.0) == pytest.approx(2)
