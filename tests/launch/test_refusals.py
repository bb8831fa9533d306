"""Whatever a path of the train command leads to that cannot be used: one line, status 2, and nothing is made."""

import os
from pathlib import Path

import pytest

from launch.train import main

pytestmark = pytest.mark.usefixtures("signals")

LONG = "a" * 300
"""More than a file system takes as a name."""


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (f"run.dir={LONG}", "must be a folder that can be read: File name too long"),
        ("run.dir=LINK/run", "LINK is a link to nothing"),
        (f"schedule.program={LONG}", ": must be a readable program: File name too long"),
        ("data.tokenizer=~nobody-of-this-name/x", "must be readable: Could not determine home directory"),
        (f"data.source={LONG}.bin", "must be readable: File name too long"),
    ],
)
def test_a_place_that_cannot_be_is_named(
    override: str, rule: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    assert rule.replace("LINK", str(link)) in refusal(capsys, config, override.replace("LINK", str(link)))
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_cannot_be_looked_at_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a readable YAML file: File name too long" in refusal(capsys, LONG)


def test_a_working_folder_that_is_gone_is_said(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory must be there" in refusal(capsys, config)
    os.chdir(tmp_path)
