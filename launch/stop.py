"""Signals that ask a run to stop.

A launcher that has started no rank yet ends at once (``Stopped``). A rank finishes its step first and writes a
checkpoint (``StopRequest``). Its signals wake a thread of their own, through the descriptor that Python writes to the
moment a signal arrives: the main thread may sit in a collective for as long as a peer takes, and whoever asks twice
wants no answer after the timeout.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.launcher import Flag

ONE_REQUEST_SECONDS = 2.0
"""One Ctrl-C reaches a rank twice, from the terminal and from the launcher: what follows within this time is the same
request."""

ASKED_SECONDS = 0.5
"""A signal to a whole group of processes reaches the launcher and its ranks in any order; in this time, both."""


class Stopped(BaseException):
    """Signal ``number`` ended the command before there was a rank. No Exception: nobody handles it on its way up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def heeded() -> list[signal.Signals]:
    """The signals that stop a run. ``nohup`` has SIGHUP ignored, and so it stays."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def end_at_once() -> None:
    """Raise Stopped in the main thread on every signal that stops a run."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for heard in heeded():
        signal.signal(heard, handle)


def heed_no_more() -> None:
    """There is nothing left to stop: what a signal would interrupt is the end of the process."""
    for heard in heeded():
        signal.signal(heard, signal.SIG_IGN)


def say_not_begun() -> None:
    print("stopped before the first step", file=sys.stderr, flush=True)


def say_between_attempts() -> None:
    print("stopped while no rank trained; to go on, give the same command", file=sys.stderr, flush=True)


class StopRequest:
    """Whether a rank was asked to stop: ``signal`` is the number that asked, or None.

    Until ``graceful`` is set there is no step to finish, and a signal ends the process at once, with status 128 + N.
    Asked again, after ``ONE_REQUEST_SECONDS``, it ends at once too. The rank that ``leads`` says what happens. Signals
    that the process was started with blocked are let in here. ``outlook``: what the next start goes on from, in words.
    ``asked``: set by a launcher that passes a signal on; SIGTERM is also what torch sends to those that outlive another
    rank, and then nobody is told that the run stops.
    """

    def __init__(self, leads: bool, outlook: Callable[[], str], asked: "Flag | None" = None) -> None:
        self.signal: int | None = None
        self.graceful = False
        self.terminated = threading.Event()
        """Set by SIGTERM, whoever sent it."""
        self._leads, self._outlook, self._asked = leads, outlook, asked
        self._when, self._hushed = 0.0, False
        self._terminations = 0
        arrivals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        heard = heeded()
        for number in heard:
            signal.signal(number, lambda number, frame: None)  # without a handler of Python's own, no wakeup
        threading.Thread(target=self._watch, args=(arrivals, heard), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*heard, signal.SIGQUIT})

    def hush(self) -> None:
        """Say nothing from here on, and end at no signal: the process is about to end for a reason of its own."""
        self.graceful, self._leads, self._hushed = True, False, True

    def wait_to_be_ended(self, seconds: float) -> bool:
        """Whether SIGTERM came, but for that which asked the run to stop, by the end of so many seconds at the latest:
        torch sends it to those that outlive another rank, maybe before they miss it."""
        deadline = time.monotonic() + seconds
        while not self._ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._ended()

    def _ended(self) -> bool:
        asked = self.signal == signal.SIGTERM and self._asked is not None and self._asked.is_set()
        return self._terminations > int(asked)

    def _watch(self, arrivals: int, heard: list[signal.Signals]) -> None:
        while True:
            for number in os.read(arrivals, 64):
                if number in heard:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._terminations += 1
            self.terminated.set()
        if not self.graceful:
            if self._leads and self._is_asked(number):
                say_not_begun()
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._when = number, time.monotonic()
            if self._is_asked(number):
                self._say("stopping after this step; asked once more, it stops at once")
        elif not self._hushed and time.monotonic() - self._when > ONE_REQUEST_SECONDS:
            try:
                self._say(f"stopped at once; {self._outlook()}")
            finally:
                os._exit(128 + number)

    def _is_asked(self, number: int) -> bool:
        """Whether a person asked, by signal ``number``."""
        return number != signal.SIGTERM or self._asked is None or self._asked.wait(ASKED_SECONDS)

    def _say(self, text: str) -> None:
        if self._leads:
            print(text, file=sys.stderr, flush=True)
