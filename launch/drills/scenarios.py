"""What is drilled. Every run takes ``STEPS`` steps and writes a checkpoint after each second one, so that a fault in
step 6 finds checkpoints of steps 2 and 4, and one step after them already taken."""

import enum
import signal
from dataclasses import dataclass, replace

from launch.drills.damage import Damage
from launch.drills.fault import SAVING, Action, Fault, Point
from launch.recovery_config import RecoveryConfig

STEPS = 8
EVERY = 2
_FAULT_STEP = 6


class Again(enum.Enum):
    """Who starts the ranks again."""

    NOBODY = "nobody: the run goes on"
    LAUNCHER = "the launcher"
    USER = "the user"


@dataclass(frozen=True)
class Scenario:
    """``faults`` break ranks; or ``interrupt`` is sent to the launcher, once a step after the second checkpoint is
    done. The first start ends with ``status``. Before the user's second start, ``damage`` is done to the newest
    checkpoint."""

    name: str
    broken: str
    lost_steps: int
    """How many steps may have to be taken again after a fault, at most; where nobody starts anything again, how far the
    run may go back: for 0 it must not."""
    faults: tuple[Fault, ...] = ()
    interrupt: signal.Signals | None = None
    damage: Damage | None = None
    again: Again = Again.USER
    status: int = 0
    asynchronous: bool = False
    """Whether checkpoints are written behind the loop. Otherwise it is known which steps a checkpoint has."""
    every: int = EVERY
    """Steps from a checkpoint to the next; 0: there is none before the run ends."""
    replicated: bool = False
    """Whether memory keeps every step."""
    restarts: int | None = None
    """How often the launcher starts the ranks again; by default once for each fault where that is its task, and not at
    all otherwise."""
    fewest_ranks: int = 1
    """With fewer the scenario means nothing."""
    nodes: int = 1
    """Launchers that start a part of the ranks each."""
    spares: int = 0
    """Launchers that wait beside them."""
    hosts: bool = False
    """Whether each of them is a node of an emulated cluster, whose network is mended once the run goes on."""
    returns: bool = False
    """Whether one is started again once the run goes on without; it has to train with fewer nodes, then with all."""
    guard: RecoveryConfig | None = None
    """What watches the numbers, or the ranks, or bounds their time."""
    skips: bool = False
    """Whether the batch of the step is left out in the end, as in a run in which that was planned."""


def _rank_dies(name: str, action: Action, point: Point, broken: str, rank: int = -1) -> Scenario:
    # Where the rank's part of the step is done, the others may be done with it before they miss the rank.
    lost_steps = EVERY if point in (*SAVING, Point.OPTIMIZER) else 1
    return Scenario(name, broken, lost_steps, (Fault(action, rank, _FAULT_STEP, point),), again=Again.LAUNCHER)


def _hangs(name: str, action: Action, point: Point, broken: str, rank: int = -1) -> Scenario:
    return replace(_rank_dies(name, action, point, broken, rank), guard=RecoveryConfig(hang_factor=10.0))


def _unsaved(name: str, action: Action, broken: str) -> Scenario:
    killed = Fault(action, -1, _FAULT_STEP, Point.FORWARD)
    return Scenario(name, broken, 1, (killed,), again=Again.LAUNCHER, every=0, replicated=True)


def _loses_node(name: str, rank: int, broken: str) -> Scenario:
    lost = Fault(Action.LOSE_NODE, rank, _FAULT_STEP, Point.FORWARD)
    return replace(_unsaved(name, Action.LOSE_NODE, broken), faults=(lost,), fewest_ranks=2, nodes=2, spares=1)


def _slow(times: float) -> Scenario:
    # From step 3 on, and measured from step 2: the first one warms up.
    fault = Fault(Action.SLOW, -1, 3, Point.FORWARD, times)
    guard = RecoveryConfig(slow_factor=1.5, hang_factor=10.0)
    broken = f"last rank computes {times:g} times as long"
    return Scenario(f"slow-{times:g}x", broken, 0, (fault,), again=Again.NOBODY, guard=guard, fewest_ranks=2)


def _damaged(damage: Damage) -> Scenario:
    name = damage.name.lower().replace("_", "-")
    killed = Fault(Action.KILL, -1, _FAULT_STEP, Point.FORWARD)
    # Step 5, and those since the checkpoint before.
    ranks = 2 if damage is Damage.SWAPPED_SHARDS else 1
    broken = f"newest checkpoint: {damage.value}"
    return Scenario(name, broken, 1 + EVERY, (killed,), damage=damage, status=1, fewest_ranks=ranks)


def _goes_bad(name: str, action: Action, point: Point, broken: str, guard: RecoveryConfig, skips: bool) -> Scenario:
    fault = Fault(action, -1, _FAULT_STEP, point)
    return Scenario(name, broken, EVERY - 1, (fault,), again=Again.NOBODY, guard=guard, skips=skips)


_SKIPS = Scenario(
    "skip-collective",
    "last rank leaves out a gather of parameters",
    lost_steps=1,
    faults=(Fault(Action.SKIP, -1, _FAULT_STEP - 1, Point.GATHER),),
    again=Again.LAUNCHER,
    fewest_ranks=3,  # of two that wait for each other, nobody knows which one left it out
    guard=RecoveryConfig(hang_factor=10.0),
)

_ALL = (
    _rank_dies("kill-forward", Action.KILL, Point.FORWARD, "last rank killed in a forward"),
    _rank_dies("kill-dispatch", Action.KILL, Point.DISPATCH, "last rank killed in a dispatch to experts"),
    _rank_dies("kill-backward", Action.KILL, Point.BACKWARD, "last rank killed in a backward"),
    _rank_dies("kill-optimizer", Action.KILL, Point.OPTIMIZER, "last rank killed after its part of the update"),
    _rank_dies("kill-save", Action.KILL, Point.SHARD, "last rank killed while it writes its shard"),
    _rank_dies("kill-publish", Action.KILL, Point.PUBLISH, "rank 0 killed as it publishes a checkpoint", rank=0),
    _rank_dies("exception", Action.RAISE, Point.BACKWARD, "exception in a backward of the last rank"),
    _rank_dies("segfault", Action.SEGFAULT, Point.FORWARD, "segmentation fault in the last rank"),
    _rank_dies("abort", Action.ABORT, Point.BACKWARD, "abort in the last rank"),
    _hangs("stop", Action.STOP, Point.FORWARD, "last rank stopped (SIGSTOP) in a forward"),
    _hangs("hang", Action.HANG, Point.BACKWARD, "rank 0 hangs in a backward", rank=0),
    Scenario(
        "kill-writer",
        "last rank killed while it writes behind the loop",
        lost_steps=EVERY + 1,  # the next step may be taken meanwhile
        faults=(Fault(Action.KILL, -1, _FAULT_STEP, Point.SHARD),),
        again=Again.LAUNCHER,
        asynchronous=True,
    ),
    _unsaved("kill-unsaved", Action.KILL, "last rank killed, and there is no checkpoint"),
    _unsaved("lose-memory", Action.LOSE_MEMORY, "last rank and its node's memory lost; no checkpoint"),
    _loses_node("lose-node", -1, "node 1 of 2 lost, one is spare; no checkpoint"),
    _loses_node("lose-node-store", 0, "node 0 of 2 lost, which has the store; no checkpoint"),
    Scenario(
        "partition",
        "node 1 of 2 cut off, one is spare; mended later; no checkpoint",
        lost_steps=1,
        faults=(
            Fault(Action.CUT, -1, _FAULT_STEP, Point.FORWARD),
            Fault(Action.HOLD, 0, _FAULT_STEP + 1, Point.FORWARD),
        ),
        again=Again.LAUNCHER,
        every=0,
        replicated=True,
        fewest_ranks=2,
        nodes=2,
        spares=1,
        hosts=True,
    ),
    Scenario(
        "shrink",
        "node 1 of 2 lost, none is spare, and back later",
        lost_steps=1,
        faults=(
            Fault(Action.LOSE_NODE, -1, EVERY + 2, Point.FORWARD),
            Fault(Action.HOLD, 0, EVERY + 3, Point.FORWARD),
        ),
        again=Again.LAUNCHER,
        every=0,
        replicated=True,
        fewest_ranks=2,
        nodes=2,
        returns=True,
        guard=RecoveryConfig(on_node_loss="shrink", max_restarts=1),
    ),
    Scenario(
        "kill-two",
        "first and last rank killed at once",
        lost_steps=1,
        faults=tuple(Fault(Action.KILL, rank, _FAULT_STEP, Point.FORWARD) for rank in (0, -1)),
        again=Again.LAUNCHER,
    ),
    Scenario(
        "kill-restart",
        "last rank killed, and rank 0 as it starts again",
        lost_steps=1,
        faults=(Fault(Action.KILL, -1, _FAULT_STEP, Point.FORWARD), Fault(Action.KILL, 0, 4, Point.LOAD)),
        again=Again.LAUNCHER,
    ),
    Scenario(
        "restarts-spent",
        "a rank killed, then another; one restart is allowed",
        lost_steps=1,
        faults=(
            Fault(Action.KILL, -1, _FAULT_STEP, Point.FORWARD),
            Fault(Action.KILL, 0, _FAULT_STEP + 1, Point.FORWARD),
        ),
        status=1,
        restarts=1,
    ),
    _SKIPS,
    replace(_SKIPS, name="skip-nodes", broken="last rank of node 1 of 2 leaves out a gather of parameters", nodes=2),
    _slow(2),
    _slow(5),
    Scenario("terminate", "SIGTERM to the launcher", 0, interrupt=signal.SIGTERM, status=128 + signal.SIGTERM, every=0),
    Scenario(
        "terminate-short",
        "SIGTERM, too little grace for a step that hangs",
        lost_steps=1,
        faults=(Fault(Action.HANG, -1, _FAULT_STEP, Point.FORWARD),),
        interrupt=signal.SIGTERM,
        status=128 + signal.SIGTERM,
        guard=RecoveryConfig(grace_seconds=2),
    ),
    Scenario(
        "kill-launcher",
        "launcher killed",
        lost_steps=1,
        faults=(Fault(Action.HOLD, 0, _FAULT_STEP, Point.FORWARD),),  # or those who outlive it would soon be done
        interrupt=signal.SIGKILL,
        status=-signal.SIGKILL,
    ),
    *(_damaged(damage) for damage in Damage),
    _goes_bad(
        "nan", Action.NAN, Point.REDUCE, "a gradient of the last rank is NaN", RecoveryConfig(max_bad_steps=1), True
    ),
    _goes_bad(
        "spike",
        Action.SPIKE,
        Point.REDUCE,
        "loss and gradients of the last rank are wild",
        RecoveryConfig(max_bad_steps=1, spike_factor=10.0),
        True,
    ),
    _goes_bad(
        "flipped-master",
        Action.FLIP,
        Point.FORWARD,
        "one bit of a master weight of the last rank flipped",
        RecoveryConfig(max_bad_steps=1, hash_every=1),
        False,
    ),
    replace(
        _goes_bad(
            "flipped-moment",
            Action.FLIP_MOMENT,
            Point.BACKWARD,
            "last bit of a second moment of the last rank flipped",
            RecoveryConfig(max_bad_steps=1, hash_every=1),
            False,
        ),
        replicated=True,
        restarts=1,
    ),
    Scenario(
        "disk-full",
        "no room for the last rank's shard",
        lost_steps=EVERY,
        faults=(Fault(Action.FULL_DISK, -1, _FAULT_STEP, Point.SHARD),),
        status=2,
    ),
    Scenario(
        "read-only",
        "the folder of checkpoints cannot be written any more",
        lost_steps=EVERY,
        faults=(Fault(Action.READ_ONLY, 0, _FAULT_STEP, Point.FORWARD),),
        status=2,
    ),
    Scenario(
        "disk-full-behind",
        "no room for a shard that is written behind the loop",
        lost_steps=EVERY + 2,  # until the other ranks know, they may take a step or two
        faults=(Fault(Action.FULL_DISK, -1, 2 * EVERY, Point.SHARD),),
        status=2,
        asynchronous=True,
    ),
)

SCENARIOS = {scenario.name: scenario for scenario in _ALL}
