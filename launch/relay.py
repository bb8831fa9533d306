"""What a launcher does with a wish to stop: it passes the signal on to its ranks, and kills who outlives the grace.

torch's launcher has a way of its own, an exception in the middle of whatever it does. It is not for ranks that may come
to the regular end of the run meanwhile: their launcher would wait for them to end, and they for it to have read what
they return.
"""

import contextlib
import signal
import time
from collections.abc import Set
from pathlib import Path

import psutil

from launch.launcher import Flag
from launch.stop import ONE_REQUEST_SECONDS


class Relay:
    """For all attempts of one command. ``folder``: where the flags are that ranks see, too; ``grace_seconds``: from the
    first signal on."""

    def __init__(self, folder: Path, grace_seconds: float) -> None:
        self.asked = Flag(folder / "asked")
        """Set by a signal. Ranks look, because torch sends them the same signal when one of them has died."""
        self.complete = Flag(folder / "complete")
        """Set by ranks when the run has all of its steps: there is nothing left to stop."""
        self.signal: signal.Signals | None = None
        """The first that asked."""
        self.out_of_time = False
        """Whether ranks were killed because the grace was over."""
        self._grace_seconds = grace_seconds
        self._since, self._last = 0.0, -ONE_REQUEST_SECONDS
        self._requests: list[signal.Signals] = []
        self._told: dict[psutil.Process, int] = {}

    def hear(self, number: int) -> bool:
        """Signal ``number`` arrived -> whether that is a request; what repeats one within a moment is the same."""
        now = time.monotonic()
        if now - self._last < ONE_REQUEST_SECONDS:
            return False
        self._last = now
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
        self.asked.set()
        self._requests.append(signal.Signals(number))
        return True

    def pass_on(self, ranks: Set[psutil.Process]) -> None:
        """To be called again and again, with the ranks that are alive: each gets every request once, those too that are
        only just being started."""
        if self.signal is None:
            return
        requests = list(self._requests)
        for rank in ranks:
            if self._told.get(rank, 0) < len(requests):
                self._told[rank] = len(requests)
                self._send(rank, requests[-1])
        if ranks and time.monotonic() - self._since > self._grace_seconds:
            self.out_of_time = True
            for rank in ranks:
                self._send(rank, signal.SIGKILL)

    @staticmethod
    def _send(rank: psutil.Process, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
