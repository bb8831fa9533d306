"""Which nodes train, in which place, and which attempt they are in. Plain state and its rules; time, files and
processes are elsewhere.

A node is a launcher. As many as are needed have a *place*, which says what ranks a node runs; others are spare. An
attempt runs when every place is held by a node that is ready for it, and ends as a whole: with the first failure that
is told, or with the loss of a node. Survivors keep their places, because their memory is that of their ranks; a spare,
or a node that joins, takes what became free.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.config_file import ConfigError

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
    as long as its launcher lives."""

    host: str
    place: int | None = None
    ready: int = 0
    beat: int = 0


@dataclass
class Ending:
    """Why ``attempt`` ended. ``rank``: None when a whole node was lost; ``place`` and ``host``: the node's."""

    attempt: int
    place: int
    host: str
    rank: int | None
    cause: str
    can_recover: bool
    status: int = FAILED
    """Of the command, where it does not go on."""


@dataclass
class Roster:
    """``job``: what all nodes have to agree about; ``broken``: the node that saw the attempt end, before anybody knows
    why; ``address``: of the attempt's store; ``stop``: the signal that asked the run to stop; ``over``: the exit
    status, once nothing goes on; ``ending``: of the last attempt that ended; ``members``: in the order in which they
    joined."""

    job: str = ""
    count: NodeCount = NodeCount()
    max_restarts: int = 0
    first: int = 1
    """The first attempt of this start of the command."""
    attempt: int = 1
    running: bool = False
    broken: str | None = None
    address: tuple[str, int] | None = None
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

    def begin(self, job: str, count: NodeCount, max_restarts: int) -> None:
        """A new start of the command, whatever the nodes of an earlier one left. Attempts are counted on."""
        fresh = Roster(job, count, max_restarts, first=self.attempt + 1, attempt=self.attempt + 1)
        vars(self).update(vars(fresh))

    def join(self, name: str, host: str) -> None:
        assert name not in self.members and len(self.members) < self.count.most, self
        self.members[name] = Member(host)
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
        self.ending, self.running, self.broken, self.address = ending, False, None, None
        self.attempt += 1
        if not ending.can_recover or self.restarts == self.max_restarts:
            self.over = ending.status
        else:
            self.restarts += 1
        return True

    def remove(self, name: str, cause: str) -> Ending | None:
        """A node is gone -> how that ended the attempt, if it did."""
        member = self.members.pop(name)
        if member.place is None or not self.running or self.closed:
            self._fill()
            return None
        ending = Ending(self.attempt, member.place, member.host, None, cause, can_recover=True)
        self.end(ending)
        self._fill()
        return ending

    def _fill(self) -> None:
        """Give free places away, and start the attempt when all who have one are ready."""
        held = {member.place for member in self.members.values()}
        free = [place for place in range(self.count.needed) if place not in held]
        for member in self.members.values():
            if member.place is None and free:
                member.place = free.pop(0)
        ready = [name for name in self.placed() if self.members[name].ready == self.attempt]
        if not self.running and not self.closed and len(ready) == self.count.needed:
            self.running = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Roster":
        """Of ``as_dict``, through JSON or not. Raises TypeError or KeyError for anything else."""
        ending, address = values["ending"], values["address"]
        members = {name: Member(**member) for name, member in values["members"].items()}
        return cls(
            **{
                **values,
                "count": NodeCount(**values["count"]),
                "ending": None if ending is None else Ending(**ending),
                "address": None if address is None else (address[0], address[1]),
                "members": members,
            }
        )
