"""Which nodes train, in which place, and which attempt they are in. Plain state and its rules; time, files and
processes are elsewhere.

A node is a launcher. As many as are needed have a *place*, which says what ranks a node runs; others are spare. An
attempt runs when every place is held by a node that is ready for it, and ends as a whole: with the first failure that
is told, or with the loss of a node. Survivors keep their places, because their memory is that of their ranks; a spare,
or a node that joins, takes what became free. Where nobody is there to take it, the run goes on with fewer places if it
may (``sizes``), and with more again, after an orderly end of the attempt, when there are more nodes.

Nodes that share this roster may still not reach each other. Then those go on that do (``reach.py``). The others are
*cut off*: they have no place, and because they can still write to the run's folder, no attempt begins before they have
said that no rank is alive on them.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.config_file import ConfigError
from launch.nodes.reach import Address, quorum

FAILED = 1
"""The command's exit status, as ``launch.train`` has it."""


@dataclass(frozen=True)
class NodeCount:
    """``needed`` nodes train; up to ``most`` take part, of which the others are spare."""

    needed: int = 1
    most: int = 1

    @classmethod
    def parse(cls, text: str) -> "NodeCount":
        """``"16"``, or ``"16:18"`` with two that are spare. Raises ConfigError."""
        found = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
        if not found or not 0 < int(found[1]) <= int(found[2] or found[1]):
            rule = "must be the number of nodes, such as 16, or 16:18 with two that are spare"
            raise ConfigError(f"--nnodes={text} {rule}")
        return cls(int(found[1]), int(found[2] or found[1]))

    def __str__(self) -> str:
        return f"{self.needed}:{self.most}" if self.most > self.needed else str(self.needed)

    def ranks_on_each(self, ranks: int) -> int:
        """Raises ConfigError unless all nodes have as many."""
        if ranks % self.needed:
            raise ConfigError(f"--nnodes={self} must divide the {ranks} ranks of layout.pipeline x layout.data")
        return ranks // self.needed


@dataclass
class Member:
    """``ready``: the attempt that it can start ranks for, because none of an earlier one is alive on it; ``beat`` grows
    as long as its launcher lives; ``stuck``: what its ranks do, if none of them comes further (``stuck.py``);
    ``address``: where it answers; ``checked``: the last check of who reaches whom that it made, with whom it was
    ``missing``."""

    host: str
    place: int | None = None
    ready: int = 0
    beat: int = 0
    stuck: str = ""
    address: Address | None = None
    checked: int = 0
    missing: list[str] = field(default_factory=list)
    cut: bool = False


@dataclass
class Ending:
    """Why ``attempt`` ended. ``rank``: None when it was none; ``place`` and ``host``: the node's."""

    attempt: int
    place: int
    host: str
    rank: int | None
    cause: str
    can_recover: bool
    status: int = FAILED
    """Of the command, where it does not go on."""
    planned: bool = False
    """Nothing failed: it goes on with more nodes."""


@dataclass
class Roster:
    """``job``: what all nodes have to agree about; ``sizes``: with how many nodes it trains, the most first;
    ``broken``: the node that saw the attempt end, before anybody knows why; ``address``: of the attempt's store;
    ``stop``: the signal that asked the run to stop; ``over``: the exit status, once nothing goes on; ``ending``: of the
    last attempt that ended; ``members``: in the order in which they joined."""

    job: str = ""
    count: NodeCount = NodeCount()
    sizes: Sequence[int] = (1,)
    max_restarts: int = 0
    first: int = 1
    """The first attempt of this start of the command."""
    attempt: int = 1
    places: int = 1
    """Of the attempt."""
    running: bool = False
    growing: bool = False
    """Whether the attempt is to end after its step, because there are nodes for more places."""
    broken: str | None = None
    address: Address | None = None
    check: int = 0
    """The last check of who reaches whom that was asked for."""
    restarts: int = 0
    ending: Ending | None = None
    stop: int | None = None
    over: int | None = None
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        return self.over is not None or self.stop is not None

    def placed(self) -> list[str]:
        """The nodes with a place, by place."""
        held = [(member.place, name) for name, member in self.members.items() if member.place is not None]
        return [name for _, name in sorted(held)]

    def begin(self, job: str, count: NodeCount, sizes: Sequence[int], max_restarts: int) -> None:
        """A new start of the command, whatever the nodes of an earlier one left. Attempts are counted on."""
        number = self.attempt + 1
        vars(self).update(vars(Roster(job, count, sizes, max_restarts, number, number, count.needed)))

    @property
    def reachable(self) -> list[str]:
        """The nodes that are not cut off, in the order in which they joined."""
        return [name for name, member in self.members.items() if not member.cut]

    def neighbour(self, name: str) -> str | None:
        """Whom a node tries to reach beat by beat: the next one in the ring of places, or the first one."""
        ring = self.placed()
        after = ring.index(name) + 1 if name in ring else 0
        return next((other for other in (*ring[after:], *ring) if other != name), None)

    def join(self, name: str, host: str, address: Address | None = None) -> None:
        assert name not in self.members and len(self.members) < self.count.most, self
        self.members[name] = Member(host, address=address, checked=self.check)
        self._fill()

    def be_ready(self, name: str) -> None:
        """No rank is alive on this node."""
        self.members[name].ready = self.attempt
        self._fill()

    def break_off(self, name: str, attempt: int) -> None:
        """A rank of this node ended too early: the others need not wait for theirs."""
        if self.running and self.attempt == attempt and self.broken is None:
            self.broken = name

    def end(self, ending: Ending) -> bool:
        """An attempt ended for this reason -> whether that is its reason: the first that is told is."""
        if not self.running or self.attempt != ending.attempt:
            return False
        self.ending, self.running, self.growing, self.broken, self.address = ending, False, False, None, None
        self.attempt += 1
        if not ending.can_recover or (self.restarts == self.max_restarts and not ending.planned):
            self.over = ending.status
        elif not ending.planned:
            self.restarts += 1
        self._fill()
        return True

    def remove(self, name: str, cause: str) -> Ending | None:
        """A node is gone -> how that ended the attempt, if it did."""
        member = self.members.pop(name)
        for other in self.members.values():
            other.missing = [missed for missed in other.missing if missed != name]
        ending = self._without(member, cause)
        return self._choose_side() or ending

    def suspect(self) -> None:
        """A node is not reached any more, or again: all are to look, unless they are about to."""
        if all(member.checked == self.check for member in self.members.values()):
            self.check += 1

    def report(self, name: str, missing: Collection[str]) -> Ending | None:
        """What a node found when it looked -> how that ended the attempt, if it did."""
        if name not in self.members:
            return None
        self.members[name].checked, self.members[name].missing = self.check, sorted(missing)
        return self._choose_side()

    def _choose_side(self) -> Ending | None:
        """Once all have looked: cut off who is not on the side that goes on."""
        ending, placed = None, self.placed()
        if all(member.checked == self.check for member in self.members.values()):
            order = placed + [name for name in self.members if name not in placed]
            side = quorum({name: member.missing for name, member in self.members.items()}, order)
            for name, member in self.members.items():
                member.cut = name not in side
            for member in [self.members[name] for name in placed if name not in side]:
                cause = f"was cut off: it does not reach {len(side)} nodes, which go on"
                ending = self._without(member, f"node {member.place} ({member.host}) {cause}") or ending
                member.place = None
        self._fill()
        return ending

    def _without(self, member: Member, cause: str) -> Ending | None:
        """A node trains no more -> how that ended the attempt, if it did."""
        if member.place is None or not self.running or self.closed:
            return None
        ending = Ending(self.attempt, member.place, member.host, None, cause, can_recover=True)
        self.end(ending)
        return ending

    def _fill(self) -> None:
        """Give free places away, and start the attempt when all who have one are ready."""
        if not self.running and self.attempt > self.first:  # the first one waits for all
            self._choose_places()
        held = {member.place for member in self.members.values()}
        free = [place for place in range(self.places) if place not in held]
        for name in self.reachable:
            if self.members[name].place is None and free:
                self.members[name].place = free.pop(0)
        waited_for = [m for m in self.members.values() if m.place is not None or m.cut]
        ready = len(self.placed()) == self.places and all(m.ready == self.attempt for m in waited_for)
        if not self.running and not self.closed and ready:
            self.running = True
        reachable = (self.members[name] for name in self.reachable)
        there = [member for member in reachable if member.place is not None or member.ready == self.attempt]
        self.growing = self.running and self._size(len(there)) > self.places

    def _choose_places(self) -> None:
        """As many as the nodes that are there can fill; where even the fewest cannot be filled, no others."""
        self.places = self._size(len(self.reachable)) or self.places
        for member in self.members.values():
            if member.place is not None and member.place >= self.places:
                member.place = None

    def _size(self, nodes: int) -> int:
        """How many of so many nodes train; 0 where they are too few."""
        return next((size for size in self.sizes if size <= nodes), 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Roster":
        """Of ``as_dict``, through JSON or not. Raises TypeError or KeyError for anything else."""
        ending, address = values["ending"], values["address"]
        members = {name: _member(**member) for name, member in values["members"].items()}
        return cls(
            **{
                **values,
                "count": NodeCount(**values["count"]),
                "ending": None if ending is None else Ending(**ending),
                "address": None if address is None else (address[0], address[1]),
                "members": members,
            }
        )


def _member(address: Sequence[Any] | None, **values: Any) -> Member:
    return Member(**values, address=None if address is None else (address[0], address[1]))
