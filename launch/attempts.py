"""Attempts at a run: when the ranks of the next one may start, what becomes of one that ended, and who says so."""

import contextlib
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from launch import train
from launch.config import Config
from launch.hang import Elsewhere, Readings
from launch.launcher import LOST_SERVER, Failure
from launch.nodes.smaller import Share
from launch.run_folder import RunFolder
from parallel.checkpoint import step_of


class Attempts(Elsewhere, Protocol):
    """Who decides about the attempts of a run: this launcher, or all nodes together."""

    @property
    def first_rank(self) -> int:
        """Of those that this node starts."""

    @property
    def share(self) -> Share:
        """What this node runs of the attempt that was waited for."""

    @property
    def recovering(self) -> Failure | None:
        """From what the attempt that was waited for recovers."""

    @property
    def start(self) -> str | None:
        """Of the command, where it was given on several nodes: the same for all of them."""

    def asked_to_stop(self, number: int) -> None:
        """Signal ``number`` was sent to this launcher; called where nothing can be waited for."""

    def wait(self) -> int | None:
        """Until the ranks of the next attempt may start; no rank is alive on this node. The command's status when
        there is none."""

    def rendezvous(self) -> Mapping[str, Any]:
        """How torch's launcher is to find the other nodes of the attempt: fields of its ``LaunchConfig``."""

    def ended_elsewhere(self) -> bool:
        """Whether the ranks of this node are to end, because those of another one did."""

    def node_lost(self) -> bool:
        """Whether that was because a whole node was lost: no rank here has anything to say about it."""

    def regroups(self) -> bool:
        """Whether the ranks of this node are to have all stop after their step, and go on on more nodes."""

    def break_off(self) -> None:
        """A rank of this node ended too early; why is said with ``settle``."""

    def settle(self, failure: Failure | None) -> int | None:
        """No rank of the attempt is alive on this node. ``failure``: how it looks from here, None when it succeeded.
        The command's status, None when there may be another attempt."""


class Alone:
    """One node, which decides by itself."""

    first_rank = 0
    start = None

    def __init__(self, config: Config) -> None:
        self.share = Share(1, config.layout.world_size, config.layout)
        self.recovering: Failure | None = None
        self._journal = Journal(config)
        self._most, self._restarts = config.recovery.max_restarts, 0

    def asked_to_stop(self, number: int) -> None:
        pass

    def wait(self) -> int | None:
        self._journal.begin()
        return None

    def rendezvous(self) -> Mapping[str, Any]:
        return rendezvous_alone()

    def ended_elsewhere(self) -> bool:
        return False

    def node_lost(self) -> bool:
        return False

    def regroups(self) -> bool:
        return False

    def tell_stuck(self, readings: Readings | None) -> None:
        pass

    def stuck_elsewhere(self) -> Readings | None:
        return None

    def break_off(self) -> None:
        pass

    def settle(self, failure: Failure | None) -> int | None:
        if failure is None:
            return 0
        if not failure.can_recover:
            return status_of(failure)
        failure = self._journal.explained(failure)
        self._journal.note(failure.rank, failure.cause)
        if self._restarts == self._most:
            say_the_end(failure, self._most)
            return train.FAILED
        self._restarts += 1
        self._journal.say_restart(failure.cause, self._restarts)
        self.recovering = failure
        return None


def rendezvous_alone() -> dict[str, Any]:
    """Of the ranks of one node, with a store of its own: ranks that meet the addresses which the ranks before them left
    in a store connect to nobody."""
    return {
        "min_nodes": 1,
        "max_nodes": 1,
        "run_id": uuid.uuid4().hex,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
    }


class Journal:
    """What is said about attempts, on the screen and in ``events.jsonl``; and read from there."""

    def __init__(self, config: Config) -> None:
        self._config, self._folder = config, RunFolder(config)
        self._known = 0

    def begin(self) -> None:
        """Of an attempt."""
        self._known = len(self._folder.events.entries())

    def explained(self, failure: Failure) -> Failure:
        """With the rank's own words, where it has written some in this attempt."""
        return _explained(failure, self._folder.events.entries()[self._known :])

    def note(self, rank: int | None, cause: str, event: str = "failure", **details: Any) -> None:
        """Record how an attempt ended, if there is a folder to record it in; on the screen it is said anyway."""
        with contextlib.suppress(OSError):
            self._folder.events.write(event, rank=rank, cause=cause, step=self._folder.last_step(), **details)

    def note_out_of_time(self, asked: signal.Signals) -> None:
        """Say and record that ranks were killed ``recovery.grace_seconds`` after signal ``asked``."""
        grace, newest = self._config.recovery.grace_seconds, self._folder.newest_checkpoint()
        last, saved = self._folder.last_step(), (0 if newest is None else step_of(newest))
        lost = f"steps {saved + 1} to {last} have no checkpoint" if last > saved else "their step is lost"
        with contextlib.suppress(OSError):
            self._folder.events.write(
                "out of time", seconds=grace, step=last, checkpoint=None if newest is None else str(newest)
            )
        print(
            f"error: ranks were killed that were not done recovery.grace_seconds={grace} after {asked.name}: {lost}; "
            f"{self._folder.outlook()}",
            file=sys.stderr,
            flush=True,
        )

    def note_while_stopping(self, failure: Failure) -> None:
        """Say and record that a rank failed while the run was about to stop."""
        failure = self.explained(failure)
        self.note(failure.rank, failure.cause)
        print(f"error: {failure.cause} while the run stopped; {self._folder.outlook()}", file=sys.stderr, flush=True)

    def say_restart(self, cause: str, number: int) -> None:
        recovery = self._config.recovery
        source = "memory or the newest checkpoint" if recovery.replicate_every else "the newest checkpoint"
        print(f"{cause}; restart {number} of {recovery.max_restarts}, from {source}", file=sys.stderr, flush=True)


def status_of(failure: Failure) -> int:
    """The command's, for a failure that ends the run. Ranks may have been asked to stop by others than the launcher."""
    stopped = 128 < failure.status < LOST_SERVER
    return failure.status if stopped or failure.status == train.USER_ERROR else train.FAILED


def say_the_end(failure: Failure, most: int) -> None:
    """One line about a failure that is not recovered from, where the rank itself could not say it all."""
    spent = f"; recovery.max_restarts={most} is used up" if most else ""
    if spent or failure.status != train.FAILED:
        print(f"error: {failure.cause}{spent}; to go on, give the same command", file=sys.stderr, flush=True)


def _explained(failure: Failure, events: Sequence[Mapping[str, Any]]) -> Failure:
    if failure.status != train.FAILED:
        return failure
    names = ("failed", "lost a peer")
    own = next((e for e in events if e.get("event") in names and e.get("rank") == failure.rank), None)
    if own is None:
        return failure
    follows = failure.follows or own["event"] == "lost a peer"
    return replace(failure, cause=f"{failure.cause}: {own['error']}", follows=follows)
