"""Tokens are made once, kept, and made again when they are not what they should be."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from launch.config import Config
from launch.data import open_dataset
from tests.launch.corpora import TEXTS, configured, corpus, documents, opened

pytestmark = pytest.mark.usefixtures("cache")


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


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what is mapped")
def test_what_is_read_is_the_cached_file_and_nothing_else_stays_on_disk(tmp_path: Path, cache: Path) -> None:
    config = configured(corpus(tmp_path / "texts", TEXTS))
    data = opened(config)
    (stored,) = cache.iterdir()
    mapped = [
        line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if str(cache) in line
    ]
    assert len(data.train) and set(mapped) == {str(stored)}


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
    return data.fingerprint, int(data.visits(12, 4).sum())


def test_ranks_that_start_at_once_see_the_same_data(tmp_path: Path, cache: Path) -> None:
    config = configured(corpus(tmp_path / "texts", TEXTS))
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        assert len(set(pool.map(_open, [config] * 8))) == 1
    assert [path.suffix for path in cache.iterdir()] == [".tokens"], "no temporary file stays"
