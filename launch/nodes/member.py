"""A node's side of the roster: a thread beats, and looks whether the other nodes do.

A node that did not beat for ``SILENT_BEATS`` is given up: it is taken off the roster, and its attempt ends. Clocks are
not compared: every node measures with its own how long another's beat stood still, and leaves out the time in which it
did not get to look itself. A node that finds that it was given up, because it was stopped or cut off, must not go on.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

from launch.config import ConfigError
from launch.nodes.reach import Address
from launch.nodes.roster import Ending, NodeCount, Roster
from launch.nodes.roster_file import RosterFile

BEAT_SECONDS = 0.25
SILENT_BEATS = 8
_LOOKS_PER_SECOND = 50
"""Of all nodes together, at most: where there are many of them, each beats less often."""

Result = TypeVar("Result")
Terms = tuple[str, NodeCount, Sequence[int], int]


class Member:
    """This launcher, as one of the nodes of a job, whose ``terms`` are what ``Roster.begin`` takes; ``told``: called by
    the node whose word ended an attempt, while no other can look; ``address``: where others can try to reach it. A
    context manager: joins, and leaves. Raises ConfigError when there is no room for one more, and OSError."""

    def __init__(
        self, file: RosterFile, terms: Terms, told: Callable[[Ending], None], address: Address | None = None
    ) -> None:
        self.host = socket.gethostname()
        self.name = f"{self.host}:{os.getpid()}:{time.time_ns():x}"
        self.beat_seconds = max(BEAT_SECONDS, terms[1].most / _LOOKS_PER_SECOND)
        self.silent_seconds = SILENT_BEATS * self.beat_seconds
        self.stop_asked: int | None = None
        """A signal that this launcher got; the others will know with the next beat."""
        self.stuck = ""
        """What the ranks here do, for the others to know with the next beat."""
        self.view = Roster()
        """The roster as this node saw it last. Never changed, only replaced."""
        self._file, self._told, self._address = file, told, address
        self._terms = terms
        self._silence = _Silence(self.silent_seconds, 2 * self.beat_seconds)
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def __enter__(self) -> "Member":
        self.join()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

        def leave(roster: Roster) -> None:
            self._pass_stop_on(roster)
            if self.name in roster.members:
                self._remove(roster, self.name, "its launcher ended")

        with suppress(OSError):
            self.look(leave)

    @property
    def place(self) -> int | None:
        member = self.view.members.get(self.name)
        return None if member is None else member.place

    @property
    def given_up(self) -> bool:
        """Whether the others go on without this node."""
        return self.name not in self.view.members

    @property
    def speaks(self) -> bool:
        """Whether this is the node that says what concerns all."""
        return self.view.placed()[:1] == [self.name]

    def look(self, change: Callable[[Roster], Result]) -> Result:
        """Read the roster, and change it, while no other node can. Raises OSError."""
        with self._file.open() as roster:
            result = change(roster)
            self.view = roster  # in here, or a thread that read it earlier could put an older one back
        with self._changed:
            self._changed.notify_all()
        return result

    def wait(self) -> None:
        """Until something may have changed."""
        with self._changed:
            self._changed.wait(self.beat_seconds)

    def join(self) -> None:
        """Become a member, as soon as those that are there are known to be alive, or to be left from an earlier start.
        Raises ConfigError."""
        silence, began = _Silence(self.silent_seconds, 2 * self.beat_seconds), time.monotonic()
        while (refusal := self.look(lambda roster: self._try_to_join(roster, silence))) is not None:
            if silence.heard and not self.view.closed and time.monotonic() - began > 2 * self.silent_seconds:
                raise ConfigError(refusal)
            time.sleep(self.beat_seconds)

    def end(self, ending: Ending) -> None:
        """Say why an attempt ended, unless another node has said so already."""

        self.settle(lambda roster: ending if roster.end(ending) else None)

    def settle(self, change: Callable[[Roster], Ending | None]) -> None:
        """As ``look``, for what may end the attempt."""

        def settled(roster: Roster) -> None:
            ending = change(roster)
            if ending is not None:
                self._told(ending)

        self.look(settled)

    def _try_to_join(self, roster: Roster, silence: "_Silence") -> str | None:
        """Why it cannot join now; None when it did."""
        job, count, *_ = self._terms
        beats = {name: member.beat for name, member in roster.members.items()}
        if len(silence.of(time.monotonic(), beats)) == len(beats):
            roster.begin(*self._terms)
        elif roster.closed or not silence.heard:
            return "the nodes that are there are about to leave"
        elif roster.count != count:
            return f"--nnodes={count} must be {roster.count}, as on the nodes that are there"
        elif roster.job != job:
            return "CONFIG and key=value must give what the nodes that are there were given, every value"
        elif len(beats) == count.most:
            return f"--nnodes={count} must be more: as many nodes are there, and none of them is silent"
        roster.join(self.name, self.host, self._address)
        return None

    def _run(self) -> None:
        while not self._over.wait(self.beat_seconds):
            with suppress(OSError):  # without the file the others give this node up, which it sees once it is back
                self.look(self._beat)

    def _beat(self, roster: Roster) -> None:
        me = roster.members.get(self.name)
        if me is None:
            return
        me.beat += 1
        me.stuck = self.stuck
        self._pass_stop_on(roster)
        beats = {name: member.beat for name, member in roster.members.items() if name != self.name}
        for name in self._silence.of(time.monotonic(), beats):
            self._remove(roster, name, f"nothing was heard of it for {self.silent_seconds:.1f} s")

    def _pass_stop_on(self, roster: Roster) -> None:
        me = roster.members.get(self.name)
        if self.stop_asked is not None and me is not None and me.place is not None:  # a spare may go by itself
            roster.stop = roster.stop or self.stop_asked

    def _remove(self, roster: Roster, name: str, why: str) -> None:
        member = roster.members[name]
        ending = roster.remove(name, f"node {member.place} ({member.host}) was lost: {why}")
        if ending is not None:
            self._told(ending)


class _Silence:
    """How long the beats of others stood still, by this node's clock. Of the time between two looks no more than
    ``longest_gap`` seconds count."""

    def __init__(self, seconds: float, longest_gap: float) -> None:
        self._seconds, self._longest_gap = seconds, longest_gap
        self._looked: float | None = None
        self._clock = 0.0
        self._heard: dict[str, tuple[int, float]] = {}
        self.heard = False
        """Whether any of them ever beat meanwhile."""

    def of(self, now: float, beats: dict[str, int]) -> list[str]:
        """Those whose beat has not changed for too long."""
        self._clock += 0.0 if self._looked is None else min(now - self._looked, self._longest_gap)
        self._looked = now
        self.heard |= any(beats.get(name, beat) != beat for name, (beat, _) in self._heard.items())
        self._heard = {
            name: self._heard[name] if self._heard.get(name, (None, 0))[0] == beat else (beat, self._clock)
            for name, beat in beats.items()
        }
        return [name for name, (_, since) in self._heard.items() if self._clock - since >= self._seconds]
