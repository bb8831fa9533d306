"""A folder that is built aside has its name only when it is whole."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from launch.aside import TargetError, built_aside


def build(target: Path, source: dict[str, str] | None = None) -> None:
    with built_aside(target, "--run", source or {"from": "a"}) as partial:
        (partial / "content").write_text("whole")


def test_it_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "run"
    with built_aside(target, "--run", {"from": "a"}) as partial:
        assert not target.exists() and partial.parent == target.parent
        (partial / "content").write_text("whole")
    assert [path.name for path in target.parent.iterdir()] == ["run"]
    assert [path.name for path in target.iterdir()] == ["content"]


def test_only_an_attempt_from_the_same_source_goes_on(tmp_path: Path) -> None:
    target, found = tmp_path / "run", []
    for source in ("a", "a", "b"):
        with pytest.raises(KeyboardInterrupt), built_aside(target, "--run", {"from": source}) as partial:
            found.append(sorted(path.name for path in partial.iterdir() if not path.name.startswith(".")))
            (partial / "part").mkdir(exist_ok=True)
            raise KeyboardInterrupt
    assert found == [["source.json"], ["part", "source.json"], ["source.json"]]


def test_what_exists_is_refused_even_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(TargetError, match=rf"--run=.*/{name} must not exist"):
            build(tmp_path / name)


def test_two_at_once_are_not_possible(tmp_path: Path) -> None:
    with built_aside(tmp_path / "run", "--run", {"from": "a"}) as partial:
        (partial / "content").write_text("first")
        with pytest.raises(TargetError, match=r"--run=.*/run is being written by another process"):
            build(tmp_path / "run", {"from": "b"})
    assert (tmp_path / "run" / "content").read_text() == "first"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match=r"--run=.*/file/run cannot be written: Not a directory"):
        build(tmp_path / "file" / "run")
    with (
        pytest.raises(TargetError, match=r"--run=.*/run cannot be written: No space left on device"),
        built_aside(tmp_path / "run", "--run", {"from": "a"}),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    build(tmp_path / "run")  # and when there is space again it goes on


def test_a_failed_attempt_holds_no_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), built_aside(tmp_path / "run", "--run", {}):
        raise ValueError("broken")
    with (tmp_path / ".run.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
