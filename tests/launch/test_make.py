"""``make`` builds the environment once, finishes one that was cut short, and installs for a command what it needs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Stands in for Python: makes an environment whose pip and commands are this script again, and writes down each call.
PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
    *"-m venv"*)
        for last in "$@"; do :; done
        rm -rf "$last"
        mkdir -p "$last/bin"
        test -z "$CUT_SHORT" || exit 1
        touch "$last/pip"
        for name in python dualpipe; do cp "$0" "$last/bin/$name"; done ;;
    *"pip --version"*) test -e "$(dirname "$0")/../pip" ;;
    *"pip install"*) test -z "$CUT_SHORT" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def make(checkout: Path, target: str, cut_short: str = "") -> tuple[int, list[str]]:
    """The exit status, and the calls that were made."""
    log = checkout / "log"
    log.write_text("")
    # What the make that may have started these tests was given, it hands on.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    result = subprocess.run(
        ["make", "-C", str(checkout), target, f"PYTHON={checkout / 'python'}"],
        capture_output=True,
        env={**kept, "LOG": str(log), "CUT_SHORT": cut_short},
    )
    return result.returncode, log.read_text().splitlines()


def installs(calls: list[str]) -> list[str]:
    return [call.split()[-1] for call in calls if "pip install" in call]


def test_training_installs_no_more_than_it_needs(checkout: Path) -> None:
    assert installs(make(checkout, "train")[1]) == ["."]
    status, calls = make(checkout, "train")
    assert status == 0 and calls == ["train configs/tiny-cpu.yaml"]
    assert installs(make(checkout, "test")[1]) == [".[test]"]
    assert installs(make(checkout, "test")[1]) == []


@pytest.mark.parametrize("pip", ["absent", "present"])
def test_an_environment_that_was_cut_short_is_finished_the_next_time(checkout: Path, pip: str) -> None:
    if pip == "present":
        assert make(checkout, "train")[0] == 0
        (checkout / ".venv" / ".installed-run").unlink()
    assert make(checkout, "train", cut_short="yes")[0] != 0
    status, calls = make(checkout, "train")
    assert status == 0 and installs(calls) == ["."]
    assert any("venv --clear" in call for call in calls) == (pip == "absent")
