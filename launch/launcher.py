"""What ranks know of the launcher of their node, and what that knows of how they ended."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import train
from launch.config import Config
from launch.keeper import Regions
from parallel.mesh import Layout

LOST_SERVER = 255
"""What multiprocessing reports for a rank whose fork server is gone."""
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Failure:
    """How an attempt ended. ``rank``: None when a whole node was lost; ``status``: the rank's exit status, negative for
    a signal; ``noticed``: when it was seen to be gone, in the seconds of ``time.monotonic``, which all processes of a
    machine share; ``follows``: whether the rank ended because another one, maybe of another node, was gone; ``ended``:
    when no rank was alive any more on this node, None while one is."""

    rank: int | None
    status: int
    cause: str
    noticed: float
    follows: bool = False
    ended: float | None = None

    @property
    def can_recover(self) -> bool:
        """Whether the ranks may do better when started again: not after bad input, a divergence or a wish to stop."""
        return self.status < 0 or self.status in (train.FAILED, LOST_SERVER)


@dataclass(frozen=True)
class Flag:
    """Something that happened, known to all processes of a node: the file at ``path`` is there. multiprocessing's Event
    can be left locked by a process that is killed while it sets it, or waits for it."""

    path: Path

    def set(self) -> None:
        self.path.touch()

    def is_set(self) -> bool:
        return self.path.exists()

    def wait(self, seconds: float) -> bool:
        """Whether it happens within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.is_set() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return self.is_set()


@dataclass(frozen=True)
class Launcher:
    """What it does for its ranks, which torchrun's agents do not. ``asked``: set when somebody asked it to stop;
    ``memory``: for each rank of the node, what outlives it; ``board``: where they write down what they do, None when
    nobody watches them; ``recovering``: from what, after a restart; ``start``: of the command, the same for all nodes
    and attempts of it, None for one node; ``wanted``: the run's layout, whatever the one that the nodes hold that are
    there; ``regroup``: set when all are to stop after their step, to go on on more nodes."""

    asked: Flag
    memory: Sequence[Regions] | None = None
    board: Path | None = None
    recovering: Failure | None = None
    start: str | None = None
    wanted: Layout | None = None
    regroup: Flag | None = None

    def given(self, config: Config) -> Config:
        """An attempt's configuration as the user gave it."""
        return config if self.wanted is None else replace(config, layout=self.wanted)
