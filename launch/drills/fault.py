"""A fault plan: which rank breaks how, and at which point of which step. Plain data, kept in a file.

A rank looks for a plan only when the variable ``DUALPIPE_FAULT_PLAN`` names its file, and the plan is only for a run
whose folder lies beside that file: left in a shell by accident, the variable stops every other run at its start.
"""

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.config import Config, ConfigError

PLAN = "DUALPIPE_FAULT_PLAN"


class Point(enum.Enum):
    """Where in a step; a rank passes the computing points several times in a step, and breaks at the first."""

    FORWARD = "forward"
    """Before a forward, alone or half of a pair."""
    BACKWARD = "backward"
    """Before a backward, a whole one or that for inputs, alone or half of a pair."""
    REDUCE = "reduce"
    """Before the gradients of the rank's first stage are summed over its copies."""
    OPTIMIZER = "optimizer"
    """After the rank's masters were updated, before the new parameters are gathered."""
    DISPATCH = "dispatch"
    """While tokens are on their way to their experts."""
    GATHER = "gather"
    """Before the parameters of the rank's first bucket are gathered from its copies, after the step."""
    SHARD = "shard"
    """In the save after the step, when the rank opens the file of its shard."""
    PUBLISH = "publish"
    """In that save, when all is written and rank 0 is about to give the checkpoint its name."""
    LOAD = "load"
    """When ranks that were started again open a shard of the checkpoint of the step, to go on from it."""


class Action(enum.Enum):
    KILL = "SIGKILL"
    SEGFAULT = "SIGSEGV"
    ABORT = "SIGABRT"
    RAISE = "InjectedError"
    LOSE_MEMORY = "SIGKILL, memory lost"
    """SIGKILL, after all that memory held with this rank is gone, its own snapshots and its peer's: as with a node."""
    LOSE_NODE = "was lost"
    """SIGKILL to the launcher of the rank and to all that it started, as when a node loses its power."""
    CUT = "was cut off"
    """The node of the rank reaches no other any more, nor do others reach it; its processes, and what they see of the
    file system, are as before. In a node of ``dualpipe hosts``."""
    NAN = "not finite"
    """One of the rank's gradients is no number any more."""
    SPIKE = "spike"
    """The rank's loss is far too large, and its gradients point away from where they did."""
    FLIP = "master weights"
    """One bit of the rank's largest master weight changes: its value doubles, or halves."""
    FLIP_MOMENT = "second moments"
    """One bit of the rank's largest second moment changes, which no weight shows before the next update."""
    STOP = "silent"
    """SIGSTOP: the process is there, and does nothing more."""
    HANG = "did not come"
    """It never comes back from what it computes."""
    FULL_DISK = "File too large"
    """From here on no file that the rank writes may grow beyond a few bytes: the kernel's limit for the process."""
    READ_ONLY = "Permission denied"
    """From here on the folder of the checkpoints takes no new name, not from root either."""
    SLOW = "slow"
    """From here on the rank computes ``Fault.times`` as long."""
    ASK = "asked to stop"
    """The rank is asked to stop, by SIGTERM: all stop after this step."""
    HOLD = "held"
    """The rank waits there until the drill lets it go on, or its launcher asks for a regrouping: what happens meanwhile
    happens before the run is over. Nothing breaks."""
    SKIP = "left out"
    """The rank does not take part in what all ranks with a copy of a stage do together, and goes on."""

    @property
    def shows_as(self) -> str:
        """The word by which the run has to name this cause."""
        return self.value.partition(",")[0]


SAVING = (Point.SHARD, Point.PUBLISH)
OF_A_CHECKPOINT = (*SAVING, Point.LOAD)
BY_THE_CLOCK = (Point.FORWARD, Point.BACKWARD, Point.DISPATCH, Point.REDUCE, Point.OPTIMIZER)
"""Where a fault may strike that is not bound to a step."""


@dataclass(frozen=True)
class Fault:
    """``rank`` below 0 counts from the last one, as indices do; ``step`` counts from 1. ``times``: for SLOW only.

    With ``wait_seconds`` it strikes by the clock: at the point that comes next once so much time has gone by since the
    fault before it in the plan struck, or since the first forward of the run. Then ``step`` counts from where the ranks
    were last started, and is the first one that it may strike in."""

    action: Action
    rank: int
    step: int
    point: Point
    times: float = 1.0
    wait_seconds: float = 0.0

    def happens_to(self, rank: int, world_size: int) -> bool:
        return rank == (self.rank if self.rank >= 0 else world_size + self.rank)


@dataclass(frozen=True)
class Plan:
    """The faults that ``file`` holds. ``protected``: False has ranks do without what guards them by itself, which is
    what a drill compares them with: checkpoints are loaded without a look at their checksums, SIGTERM ends a rank at
    once, and a rank outlives its launcher."""

    file: Path
    faults: tuple[Fault, ...] = ()
    protected: bool = True

    def write(self) -> None:
        faults = [{**asdict(f), "action": f.action.name, "point": f.point.name} for f in self.faults]
        values = {"faults": faults, "protected": self.protected}
        self.file.write_text(json.dumps(values, indent=1) + "\n")

    def mark(self, fault: Fault) -> Path:
        """The file that says when a fault happened, in seconds of ``time.time``; each happens once."""
        return self.file.with_name(f"{self.file.name}.happened-{self.faults.index(fault)}")

    @property
    def released(self) -> Path:
        """The file that lets ranks go on that are held."""
        return self.file.with_name(f"{self.file.name}.released")

    @property
    def spared(self) -> Path:
        """The file from which on no fault strikes that strikes by the clock."""
        return self.file.with_name(f"{self.file.name}.spared")

    @property
    def forwards(self) -> Path:
        """The file in which every rank that starts says when its first forward began, a line each."""
        return self.file.with_name(f"{self.file.name}.forwards")

    def due(self, fault: Fault) -> float | None:
        """When one that strikes by the clock may, in seconds of ``time.time``; None before that is known."""
        place = self.faults.index(fault)
        since = self.mark(self.faults[place - 1]) if place else self.forwards
        first = since.read_text().split()[:1] if since.exists() else []
        return float(first[0]) + fault.wait_seconds if first else None

    def check(self, config: Config) -> None:
        """Refuse a fault that would never happen to the run. Raises ConfigError."""
        ranks, steps, every = config.layout.world_size, config.train.steps, config.checkpoint.every
        for fault in self.faults:
            what = f"{fault.action.name} of rank {fault.rank} at {fault.point.value} in step {fault.step}"
            if not -ranks <= fault.rank < ranks:
                raise ConfigError(f"the fault {what} would never happen: the run has {ranks} ranks")
            if not 1 <= fault.step <= steps:
                raise ConfigError(f"the fault {what} would never happen: train.steps={steps}")
            saves = fault.step == steps or (every > 0 and fault.step % every == 0)
            if fault.point in OF_A_CHECKPOINT and not saves:
                raise ConfigError(f"the fault {what} would never happen: checkpoint.every={every}")
            if fault.point is Point.PUBLISH and not fault.happens_to(0, ranks):
                raise ConfigError(f"the fault {what} would never happen: rank 0 publishes")
            if fault.point is Point.LOAD and all(other.point is Point.LOAD for other in self.faults):
                raise ConfigError(f"the fault {what} would never happen: nothing before it ends a rank")
            if (fault.action is Action.SKIP) != (fault.point is Point.GATHER):
                raise ConfigError(f"the fault {what} would never happen: what is left out is a gather, and only that")
            if fault.action is Action.SLOW and fault.times <= 1:
                raise ConfigError(f"the fault {what} would never happen: times={fault.times:g} is no slower")
            if fault.wait_seconds < 0:
                raise ConfigError(f"the fault {what} would never happen: wait_seconds={fault.wait_seconds:g}")
            if fault.wait_seconds and (fault.point not in BY_THE_CLOCK or fault.action is Action.SLOW):
                raise ConfigError(f"the fault {what} would never happen: no clock is looked at there")
            if self.faults.count(fault) > 1:
                raise ConfigError(
                    f"the fault {what} would never happen twice: it is there {self.faults.count(fault)} times"
                )
        self._check_ranks(ranks)

    def _check_ranks(self, ranks: int) -> None:
        """Refuse two faults of one rank at once: the first would have ended it. Raises ConfigError."""
        for step in {fault.step for fault in self.faults}:
            planned = (fault for fault in self.faults if fault.step == step and not fault.wait_seconds)
            at_once = [fault.rank % ranks for fault in planned]
            if len(set(at_once)) < len(at_once):
                raise ConfigError(
                    f"{len(at_once)} faults must strike as many ranks; they strike {len(set(at_once))} of {ranks}"
                )


def read(file: Path, run: Path) -> Plan:
    """The plan in ``file``, for the run in the folder ``run``. Raises ConfigError when it is for another run."""
    if not run.resolve().is_relative_to(file.parent.resolve()):
        raise ConfigError(f"{PLAN}={file} is a fault plan for a run in {file.parent}, not for run.dir={run}: unset it")
    try:
        values = json.loads(file.read_text())
        faults = tuple(_fault(fault) for fault in values["faults"])
        if type(values["protected"]) is not bool:
            raise TypeError("protected must be true or false")
        return Plan(file, faults, values["protected"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{PLAN}={file} must be a fault plan: {error!r}") from None


def _fault(values: Mapping[str, Any]) -> Fault:
    for key, kinds in (("rank", (int,)), ("step", (int,)), ("times", (int, float)), ("wait_seconds", (int, float))):
        value = values[key]
        if type(value) not in kinds or not math.isfinite(value):
            raise TypeError(f"{key}={value} must be a number{' without a fraction' if kinds == (int,) else ''}")
    place = values["rank"], values["step"], Point[values["point"]]
    return Fault(Action[values["action"]], *place, float(values["times"]), float(values["wait_seconds"]))
