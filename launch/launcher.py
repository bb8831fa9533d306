"""What ranks know of the launcher of their node, and what that knows of how they ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

from launch import train
from launch.keeper import Regions

LOST_SERVER = 255
"""What multiprocessing reports for a rank whose fork server is gone."""


@dataclass(frozen=True)
class Failure:
    """How an attempt ended. ``status``: the rank's exit status, negative for a signal; ``noticed``: when it was seen
    to be gone, in the seconds of ``time.monotonic``, which all processes of a machine share."""

    rank: int
    status: int
    cause: str
    noticed: float

    @property
    def can_recover(self) -> bool:
        """Whether the ranks may do better when started again: not after bad input, a divergence or a wish to stop."""
        return self.status < 0 or self.status in (train.FAILED, LOST_SERVER)


@dataclass(frozen=True)
class Launcher:
    """What it does for its ranks, which torchrun's agents do not. ``asked``: set when somebody asked it to stop;
    ``memory``: for each rank of the node, what outlives it; ``board``: where they write down what they do, None when
    nobody watches them; ``recovering``: from what, after a restart."""

    asked: Event
    memory: Sequence[Regions] | None = None
    board: Path | None = None
    recovering: Failure | None = None
