"""What the tests of the commands share."""

import random
from pathlib import Path

import pytest

from tests.launch.runs import write_config


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokens are kept, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dualpipe"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of four ranks over made-up text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers writes it."""
    from tests.launch.hugging_face import write

    return write(tmp_path_factory.mktemp("hugging_face") / "model")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to train on, and a cache of its own for its tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = random.Random(0).choices(["pipeline", "bubble", "expert", "stage", "token"], k=600)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path / "text.txt"
