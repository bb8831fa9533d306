"""A kill at any moment of a save costs no committed checkpoint; the command does a thousand of them."""

from pathlib import Path
from unittest.mock import patch

from benchmarks.kill_saves import kill_saves
from parallel import checkpoint


def test_no_kill_loses_a_committed_checkpoint(tmp_path: Path) -> None:
    outcome = kill_saves(tmp_path, kills=40, seed=1)
    assert outcome.lost == []
    assert outcome.kills == 40 and {"write", "fsync", "os.rename"} <= set(outcome.at)


def test_a_save_that_does_not_wait_for_the_disk_is_caught(tmp_path: Path) -> None:
    with patch.object(checkpoint, "fsync", lambda path: None):
        assert kill_saves(tmp_path, kills=5, seed=1).lost
