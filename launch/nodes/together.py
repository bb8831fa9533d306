"""Attempts that several nodes decide about together, by the roster in the run's folder."""

import hashlib
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

from launch.attempts import Journal, say_the_end, status_of
from launch.config import Config, ConfigError, dump
from launch.hang import Readings
from launch.keeper import Keeper
from launch.launcher import Failure
from launch.nodes import rendezvous, stuck
from launch.nodes.member import Member
from launch.nodes.reach import Listener, Reach
from launch.nodes.roster import Ending, NodeCount, Roster
from launch.nodes.roster_file import RosterFile
from launch.nodes.smaller import Share, largest, shares
from launch.run_folder import RunFolder
from launch.train import FAILED, REGROUPED, USER_ERROR
from parallel.mesh import Layout


class Together:
    """This launcher as one of several nodes. ``address``: of this host, as the others reach it; ``keeper``: the memory
    of its ranks. A context manager: joins, and leaves. Raises ConfigError."""

    def __init__(self, config: Config, nodes: NodeCount, address: str, keeper: Keeper | None) -> None:
        self._shares = shares_of(config, nodes)
        self.share = self._shares[0]
        """What the nodes train in the attempt that was waited for, or will in the first."""
        self._config, self._address, self._keeper = config, address, keeper
        self._journal, folder = Journal(config), RunFolder(config)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir={folder.path} must be a folder that can be written: {error.strerror}") from None
        job = hashlib.sha256(dump(config).encode()).hexdigest()
        self._open = ExitStack()
        self._listener = self._open.enter_context(Listener(address))
        terms = job, nodes, [share.nodes for share in self._shares], config.recovery.max_restarts
        self.member = Member(RosterFile(folder.nodes_file), terms, self._note, self._listener.address)
        self.recovering: Failure | None = None
        self._attempt, self._place = 0, -1
        self._own: Failure | None = None
        """How the attempt before ended, as it looked from here, where this node had ranks in it."""
        self._announced: tuple[int | None, int, bool] = -1, 0, False
        self._told = 0
        self._said_short = 0
        rendezvous.register()

    def __enter__(self) -> "Together":
        self._open.enter_context(self.member)
        self._open.enter_context(Reach(self.member))
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
        return self._place * self.share.ranks

    def asked_to_stop(self, number: int) -> None:
        self.member.stop_asked = number

    def wait(self) -> int | None:
        member, since = self.member, time.monotonic()
        while True:
            view = member.view
            me = view.members.get(member.name)
            self._tell_ending(view)
            if view.closed:
                return 128 + view.stop if view.stop is not None else view.over
            if me is None:
                self._join_again()
                continue
            place = me.place
            self._announce(view, place, me.cut)
            if me.ready != view.attempt:
                member.look(lambda roster: self._be_ready(roster))
            elif view.running and place is not None:
                self._attempt, self._place, member.stuck = view.attempt, place, ""
                self._take(view, place)
                self.recovering = self._last_failure(view, since)
                self._journal.begin()
                return None
            elif view.running:  # a spare waits for as long as the others train
                self._take(view, place)
                self._own, since = None, time.monotonic()
                member.wait()
            elif time.monotonic() - since > self._config.recovery.node_wait_seconds:
                member.look(self._give_up)
            else:
                member.wait()

    def rendezvous(self) -> Mapping[str, Any]:
        nodes = self.share.nodes
        handler = rendezvous.PlaceRendezvous(self.member, self._attempt, nodes, self._address)
        return {
            "min_nodes": nodes,
            "max_nodes": nodes,
            "run_id": handler.get_run_id(),
            "rdzv_backend": rendezvous.BACKEND,
            "rdzv_configs": {"handler": handler},
        }

    def ended_elsewhere(self) -> bool:
        member, view = self.member, self.member.view
        return member.given_up or view.attempt != self._attempt or view.broken not in (None, member.name)

    def node_lost(self) -> bool:
        ending = self.member.view.ending
        lost = ending is not None and ending.rank is None and not ending.planned
        return lost and self.member.view.attempt == self._attempt + 1

    def regroups(self) -> bool:
        """On one node, that of rank 0, which says what became of the run: all ranks stop when one asks."""
        view = self.member.view
        return self._place == 0 and view.growing and view.attempt == self._attempt

    def tell_stuck(self, readings: Readings | None) -> None:
        self.member.stuck = "" if readings is None else stuck.pack(self._attempt, readings)

    def stuck_elsewhere(self) -> Readings | None:
        view = self.member.view
        if view.attempt != self._attempt:
            return None
        others = [view.members[name].stuck for name in view.placed() if name != self.member.name]
        return stuck.merge(self._attempt, others)

    def break_off(self) -> None:
        with suppress(OSError):  # without the file the others give this node up
            self.member.look(lambda roster: roster.break_off(self.member.name, self._attempt))

    def settle(self, failure: Failure | None) -> int | None:
        if failure is None:
            self.member.look(self._finish)
            return 0
        own = self._own = self._journal.explained(failure)
        if own.status == REGROUPED:
            self.member.end(self._regrouping())
        self._agree(own)
        view = self.member.view
        if view.over == 0:  # the other nodes are done
            say_the_end(own, 0)
            return FAILED
        if view.stop is not None and own.status == USER_ERROR:  # the last checkpoint could not be written
            return USER_ERROR
        if view.stop is not None or self.member.given_up:
            return None
        self._tell_ending(view)
        return view.over

    def _tell_ending(self, view: Roster) -> None:
        """Once an attempt: how the one before ended. By all that train in the next, some of which may have been spare;
        of the end of the run by the node that speaks."""
        ending = view.ending
        if view.attempt == self._told or ending is None or view.stop is not None:
            return
        self._told = view.attempt
        if ending.planned:  # the next attempt says what it is
            return
        if view.over is None:
            if self.member.place is not None:
                self._journal.say_restart(ending.cause, view.restarts)
        elif self.member.speaks and ending.can_recover:
            say_the_end(Failure(ending.rank, ending.status, ending.cause, 0.0), view.max_restarts)

    def _last_failure(self, view: Roster, seen: float) -> Failure | None:
        """What ended the attempt before, in all words that nodes share; ``seen``: when this node saw it, unless it had
        ranks in it."""
        if view.ending is None:
            return None
        noticed, ended = (seen, seen) if self._own is None else (self._own.noticed, self._own.ended)
        return Failure(view.ending.rank, view.ending.status, view.ending.cause, noticed, ended=ended)

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

    def _regrouping(self) -> Ending:
        there = len(self.member.view.reachable)
        cause = f"{there} nodes are there, and {self.share.nodes} trained"
        return Ending(self._attempt, self._place, self.member.host, None, cause, can_recover=True, planned=True)

    def _take(self, view: Roster, place: int | None) -> None:
        """What so many nodes train as have a place. Of what memory holds of another layout their ranks make a
        checkpoint; that of a spare is of no use."""
        before, share = self.share, largest(self._shares, view.places)
        assert share is not None, view
        if share == before:
            return
        self.share = share
        if self._keeper is not None and place is None:
            self._keeper.clear()
        if not self.member.speaks:
            return
        idle, memory = len(view.reachable) * self._shares[0].ranks - share.layout.world_size, ""
        if self._keeper is not None:
            memory = ", from a checkpoint of what memory has"
        print(
            f"{share.nodes} of {view.count.needed} nodes train, {share.ranks} ranks on each: {share.keys}, "
            f"{idle} ranks idle{memory}",
            file=sys.stderr,
            flush=True,
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
        self._own = None
        print("this node was given up by the others, as nothing was heard of it; it joins again", file=sys.stderr)
        if self._keeper is not None:
            self._keeper.clear()
        self.member.join()

    def _announce(self, view: Roster, place: int | None, cut: bool) -> None:
        if view.attempt > view.first and not view.running and len(view.reachable) < view.places:
            self._say_short(view)
        if (place, view.places, cut) == self._announced:
            return
        self._announced = place, view.places, cut
        there = f"{len(view.placed())} of {view.places} nodes are there"
        if cut:
            print(
                f"this node ({self.member.host}) was cut off: it does not reach {len(view.reachable)} nodes, which go "
                "on; its ranks were ended, and it waits to reach them again",
                file=sys.stderr,
                flush=True,
            )
            return
        if place is None:
            print(f"spare node ({self.member.host}): {there}", file=sys.stderr, flush=True)
            return
        share = largest(self._shares, view.places)
        assert share is not None, view
        ranks = f"ranks {place * share.ranks} to {(place + 1) * share.ranks - 1}"
        print(f"node {place} ({self.member.host}), {ranks}: {there}", file=sys.stderr, flush=True)

    def _say_short(self, view: Roster) -> None:
        """Once an attempt: why it does not begin."""
        if self._said_short == view.attempt or not self.member.speaks:
            return
        self._said_short = view.attempt
        recovery, fewer = self._config.recovery, ""
        if recovery.on_node_loss == "shrink":
            fewer = f", and no layout with layout.pipeline={self._config.layout.pipeline} fits on fewer"
        print(
            f"{len(view.reachable)} of {view.places} nodes are there{fewer}: waiting for another, for "
            f"recovery.node_wait_seconds={recovery.node_wait_seconds:g} at most",
            file=sys.stderr,
            flush=True,
        )

    def _note(self, ending: Ending) -> None:
        event = "regroup" if ending.planned else "failure"
        self._journal.note(ending.rank, ending.cause, event, node=ending.place, host=ending.host)


def shares_of(config: Config, nodes: NodeCount) -> list[Share]:
    """What the nodes of a run may train, the run's own layout first. Raises ConfigError."""
    wanted = Share(nodes.needed, nodes.ranks_on_each(config.layout.world_size), config.layout)
    policy = config.recovery.on_node_loss
    if policy == "wait" and nodes.most > nodes.needed:
        raise ConfigError(f"--nnodes={nodes} must be {nodes.needed}: recovery.on_node_loss=wait has no spares")
    if policy != "shrink":
        return [wanted]

    def fits(layout: Layout) -> bool:
        try:
            replace(config, layout=layout)
        except ConfigError:
            return False
        return True

    found = shares(wanted, fits)
    if len(found) == 1:
        raise ConfigError(
            f"recovery.on_node_loss=shrink: no layout with layout.pipeline={config.layout.pipeline} and "
            f"train.global_batch_size={config.train.global_batch_size} fits on fewer than {nodes.needed} nodes of "
            f"{wanted.ranks} ranks"
        )
    return found
