"""What only a launcher of our own does for its ranks is refused where there is none."""

from pathlib import Path

import pytest

from launch.config import ConfigError, from_dict
from launch.launcher import Flag, Launcher
from launch.train import check_supervision


@pytest.mark.parametrize("recovery", [{"hang_factor": 5.0}, {"replicate_every": 1, "max_restarts": 1}])
def test_under_torchrun_what_nobody_does_is_refused(recovery: dict[str, float], tmp_path: Path) -> None:
    train = {"steps": 1, "sequence_length": 8, "global_batch_size": 4}
    config = from_dict({"train": train, "run": {"dir": str(tmp_path)}, "recovery": recovery})
    key = next(iter(recovery))
    with pytest.raises(ConfigError, match=rf"^recovery\.{key}=\S+ must be 0 under torchrun"):
        check_supervision(config, None)
    check_supervision(config, Launcher(Flag(tmp_path / "asked")))
