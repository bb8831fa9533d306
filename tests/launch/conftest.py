"""What the tests of the commands share."""

import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import ROOT, Start, command, write_config


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


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the train command. One that a failed test leaves running is killed, and takes its ranks with it."""
    started = []

    def begin(config: Path, *overrides: str, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        started.append(subprocess.Popen(command(config, *overrides), cwd=ROOT, text=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        with process:
            process.kill()


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


@pytest.fixture
def signals() -> Iterator[None]:
    """As they were: the command listens to them for as long as its process lives."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
