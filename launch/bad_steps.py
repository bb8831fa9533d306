"""Steps that are not taken, and the data that they are blamed on.

A step is bad when its loss or gradient is not finite, when its cross-entropy is a spike, or when bits of its parameters
changed by themselves. All ranks find the same, before anything is updated.

A spike is a cross-entropy above

    median + recovery.spike_factor x max(1.4826 x median absolute deviation, 1 % of the median)

of the last ``WINDOW`` steps that were taken, once there are ``LEAST`` of them. Neither moves with a single outlier, and
1.4826 makes the deviation the standard deviation of a normal distribution.
"""

import json
import math
import statistics
import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from launch.config_file import ConfigError
from launch.metrics import read_jsonl
from launch.whole_file import write_whole

WINDOW, LEAST = 32, 5
_NORMAL, _FLOOR = 1.4826, 0.01


class SpikeRule:
    """``factor`` 0: nothing is a spike."""

    def __init__(self, factor: float, losses: Iterable[float] = ()) -> None:
        self.factor = factor
        self._losses = deque(losses, maxlen=WINDOW)

    def add(self, loss: float) -> None:
        """The cross-entropy of a step that was taken."""
        self._losses.append(loss)

    @property
    def limit(self) -> float:
        """The cross-entropy above which a step is a spike, in the unit of those added."""
        if not self.factor or len(self._losses) < LEAST:
            return math.inf
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.factor * max(_NORMAL * deviation, _FLOOR * median)


class SkippedBatches:
    """Positions in the data, in sequences, of batches that no step takes: ``planned``, by the configuration, and
    ``found``, which bad steps were blamed on. A batch that holds such a position is skipped as a whole."""

    def __init__(self, planned: Iterable[int], found: Iterable[int] = ()) -> None:
        self.found = list(found)
        self._positions = sorted({*planned, *self.found})

    def add(self, position: int) -> None:
        self.found.append(position)
        insort(self._positions, position)

    def next_batch(self, position: int, size: int) -> int:
        """The beginning of the first batch of ``size`` sequences, from ``position`` on, that is not skipped."""
        at = bisect_left(self._positions, position)
        while at < len(self._positions) and self._positions[at] < position + size:
            position += size
            at = bisect_left(self._positions, position)
        return position


def write_found(file: Path, skipped: SkippedBatches) -> None:
    """Keep what was found over all starts of the run."""
    write_whole(file, json.dumps({"first_sequences": skipped.found}) + "\n")


def read_found(file: Path) -> list[int]:
    """What ``write_found`` kept; nothing when there is no such file. Raises ConfigError for another file."""
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text())["first_sequences"]
        if type(found) is not list or not all(type(position) is int and position >= 0 for position in found):
            raise TypeError("first_sequences must be counts")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"run.dir has a damaged {file} ({error!r})") from None
    return list(found)


def usual_losses(metrics_file: Path, step: int) -> list[float]:
    """The cross-entropies of the last steps up to ``step``, for a rule that goes on after it. A line without one, which
    somebody else wrote or which was null, says nothing about what is usual."""
    entries = [entry for entry in read_jsonl(metrics_file) if type(entry.get("step")) is int]
    losses = [entry.get("cross_entropy") for entry in entries if step - WINDOW < entry["step"] <= step]
    numbers = [loss for loss in losses if isinstance(loss, (int, float)) and not isinstance(loss, bool)]
    return [float(loss) for loss in numbers if abs(loss) <= sys.float_info.max]
