"""Attempts that several nodes decide about together, by the roster in the run's folder."""

import hashlib
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from launch.attempts import Journal, say_the_end, status_of
from launch.config import Config, ConfigError, dump
from launch.keeper import Keeper
from launch.launcher import Failure
from launch.nodes import rendezvous
from launch.nodes.member import Member
from launch.nodes.roster import Ending, NodeCount, Roster
from launch.nodes.roster_file import RosterFile
from launch.run_folder import RunFolder
from launch.train import FAILED


class Together:
    """This launcher as one of several nodes. ``address``: of this host, as the others reach it; ``keeper``: the memory
    of its ranks. A context manager: joins, and leaves. Raises ConfigError."""

    def __init__(self, config: Config, nodes: NodeCount, address: str, keeper: Keeper | None) -> None:
        self.ranks_per_node = nodes.ranks_on_each(config.layout.world_size)
        self._config, self._address, self._keeper = config, address, keeper
        self._journal, folder = Journal(config), RunFolder(config)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir={folder.path} must be a folder that can be written: {error.strerror}") from None
        job = hashlib.sha256(dump(config).encode()).hexdigest()
        most_restarts = config.recovery.max_restarts
        self.member = Member(RosterFile(folder.nodes_file), (job, nodes, most_restarts), self._note)
        self.recovering: Failure | None = None
        self.begun = False
        self._attempt, self._place = 0, -1
        self._noticed: float | None = None
        self._announced: int | None = -1
        self._open = ExitStack()
        rendezvous.register()

    def __enter__(self) -> "Together":
        self._open.enter_context(self.member)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def start(self) -> str | None:
        return f"{self.member.view.job} {self.member.view.first}"

    @property
    def first_rank(self) -> int:
        return self._place * self.ranks_per_node

    def asked_to_stop(self, number: int) -> None:
        self.member.stop_asked = number

    def wait(self) -> int | None:
        member, since = self.member, time.monotonic()
        while True:
            view, place = member.view, member.place
            if view.closed:
                return 128 + view.stop if view.stop is not None else view.over
            if member.given_up:
                self._join_again()
                continue
            self._announce(view, place)
            if view.members[member.name].ready != view.attempt:
                member.look(lambda roster: self._be_ready(roster))
            elif view.running and place is not None:
                self._attempt, self._place = view.attempt, place
                self.recovering = self._last_failure(view, since)
                self._journal.begin()
                return None
            elif view.running:  # a spare waits for as long as the others train
                since = time.monotonic()
                member.wait()
            elif time.monotonic() - since > self._config.recovery.node_wait_seconds:
                member.look(self._give_up)
            else:
                member.wait()

    def rendezvous(self) -> Mapping[str, Any]:
        handler = rendezvous.PlaceRendezvous(self.member, self._attempt, self._address)
        needed = self.member.view.count.needed
        return {
            "min_nodes": needed,
            "max_nodes": needed,
            "run_id": handler.get_run_id(),
            "rdzv_backend": rendezvous.BACKEND,
            "rdzv_configs": {"handler": handler},
        }

    def ended_elsewhere(self) -> bool:
        member, view = self.member, self.member.view
        return member.given_up or view.attempt != self._attempt or view.broken not in (None, member.name)

    def break_off(self) -> None:
        with suppress(OSError):  # without the file the others give this node up
            self.member.look(lambda roster: roster.break_off(self.member.name, self._attempt))

    def settle(self, failure: Failure | None) -> int | None:
        self.begun = True
        if failure is None:
            self.member.look(self._finish)
            return 0
        own = self._journal.explained(failure)
        self._noticed = own.noticed
        self._agree(own)
        view = self.member.view
        if view.over == 0:  # the other nodes are done
            say_the_end(own, 0)
            return FAILED
        if view.stop is not None or self.member.given_up:
            return None
        agreed = self._last_failure(view, own.noticed)
        assert agreed is not None, view
        if self.member.speaks and view.over is None:
            self._journal.say_restart(agreed.cause, view.restarts)
        elif self.member.speaks and view.ending is not None and view.ending.can_recover:
            say_the_end(agreed, view.max_restarts)
        return view.over

    def _last_failure(self, view: Roster, seen: float) -> Failure | None:
        """What ended the attempt before, in all words that nodes share; ``seen``: when this node saw it, unless it had
        ranks in it."""
        if view.ending is None:
            return None
        noticed = seen if self._noticed is None else self._noticed
        return Failure(view.ending.rank, view.ending.status, view.ending.cause, noticed)

    def _agree(self, own: Failure) -> None:
        """Return once it is known why the attempt ended. What this node knows is said at once if it is a cause; if its
        rank may have ended because of another, it is said only when nobody else has anything to say."""
        member, patience = self.member, time.monotonic() + 2 * self.member.silent_seconds
        follows = own.follows or own.status >= 128  # those that a signal asked to stop; the roster will say so
        while not (member.given_up or member.view.closed or member.view.attempt != self._attempt):
            first = member.view.broken in (None, member.name)
            if not follows or (first and time.monotonic() > patience):
                member.end(self._ending(own))
            else:
                member.wait()

    def _ending(self, own: Failure) -> Ending:
        cause = f"{own.cause} (node {self._place}, {self.member.host})"
        return Ending(
            self._attempt, self._place, self.member.host, own.rank, cause, own.can_recover, status=status_of(own)
        )

    def _be_ready(self, roster: Roster) -> None:
        if self.member.name in roster.members:
            roster.be_ready(self.member.name)

    def _finish(self, roster: Roster) -> None:
        if roster.attempt == self._attempt:
            roster.over = 0 if roster.over is None else roster.over

    def _give_up(self, roster: Roster) -> None:
        if roster.running or roster.closed:
            return
        roster.over = FAILED
        wait, there = self._config.recovery.node_wait_seconds, len(roster.placed())
        print(
            f"error: {there} of {roster.count.needed} nodes were there after recovery.node_wait_seconds={wait:g}; "
            "to go on, give the same command",
            file=sys.stderr,
        )

    def _join_again(self) -> None:
        """The others went on without this node: what its memory holds is of ranks that others may be now."""
        self._noticed = None
        print("this node was given up by the others, as nothing was heard of it; it joins again", file=sys.stderr)
        if self._keeper is not None:
            self._keeper.clear()
        self.member.join()

    def _announce(self, view: Roster, place: int | None) -> None:
        if place == self._announced:
            return
        self._announced = place
        there = f"{len(view.placed())} of {view.count.needed} nodes are there"
        if place is None:
            print(f"spare node ({self.member.host}): {there}", file=sys.stderr, flush=True)
            return
        ranks = f"ranks {place * self.ranks_per_node} to {(place + 1) * self.ranks_per_node - 1}"
        print(f"node {place} ({self.member.host}), {ranks}: {there}", file=sys.stderr, flush=True)

    def _note(self, ending: Ending) -> None:
        self._journal.note(ending.rank, ending.cause, node=ending.place, host=ending.host)
