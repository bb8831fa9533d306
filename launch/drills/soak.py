"""A run that random faults strike again and again: it has to come to the bits of one that nobody disturbed.

The faults are drawn beforehand, from a seed, and strike by the clock, 20 to 40 seconds after each other; one that is
due while the run still recovers strikes once that has taken a few steps again. When the time is over the run is asked
to stop, as a user would with SIGTERM, and a run without faults is stopped after the same step.
"""

import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch.config import Config, ConfigError
from launch.drills.drive import PLAN_FILE, Attempt, Drive
from launch.drills.fault import Action, Fault, Plan, Point
from launch.drills.verdict import Ending, ending, first_after, time_of
from launch.metrics import read_jsonl
from launch.recovery_config import RecoveryConfig
from launch.run_folder import RunFolder

GAP_SECONDS = (20.0, 40.0)
FIRST_STEP = 4
"""Of a start, that a fault may strike in: before, steps have not been measured, as the watch for hangs needs them, and
of the ranks that lost what memory held there may be one snapshot only."""
HANG_FACTOR = 4.0
"""``recovery.hang_factor``: where steps take seconds, ten of them are longer than faults are apart."""
CALIBRATION_STEPS = 8
ENDLESS_STEPS = 100_000
CHECKPOINT_EVERY = 20
POLL_SECONDS = 0.25
ASKED = 128 + signal.SIGTERM
"""The status of a run that ended at SIGTERM."""
_KINDS = (
    (Action.KILL, (Point.FORWARD, Point.BACKWARD, Point.DISPATCH, Point.REDUCE, Point.OPTIMIZER)),
    (Action.SEGFAULT, (Point.FORWARD, Point.BACKWARD)),
    (Action.ABORT, (Point.FORWARD, Point.BACKWARD)),
    (Action.RAISE, (Point.FORWARD, Point.BACKWARD, Point.DISPATCH)),
    (Action.STOP, (Point.FORWARD, Point.BACKWARD)),
    (Action.HANG, (Point.FORWARD, Point.BACKWARD)),
    (Action.LOSE_MEMORY, (Point.FORWARD, Point.BACKWARD)),
)


@dataclass(frozen=True)
class Late:
    """A fault that struck ``gap_s`` after the one before, which is more than planned: the run recovers first.
    ``after``: the kind of the one before; ``forward_s``: from that to the first forward behind it."""

    gap_s: float
    after: str
    forward_s: float | None


@dataclass
class Soaked:
    """What a soak showed. ``faults``: those that happened, by kind; ``gaps_s``: from each to the next, and ``late``
    those that are too long; ``forward_s``: from each to the first forward behind it; ``lost_steps``: the most that were
    taken again after one; ``training_s``: in steps that count, each once, of the ``seconds`` from the first forward to
    the end."""

    seconds: float
    steps: int
    faults: Counter[str]
    gaps_s: list[float]
    late: list["Late"]
    forward_s: list[float]
    lost_steps: int
    training_s: float
    bitwise_equal: bool
    problems: list[str] = field(default_factory=list)

    @property
    def effective(self) -> float:
        """The share of the time that went into steps that count."""
        return self.training_s / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "scenario": "soak",
            "passed": not self.problems,
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "faults": dict(self.faults),
            "fault_gaps_s": _spread(self.gaps_s),
            "late_faults": [asdict(late) for late in self.late],
            "forward_s": _spread(self.forward_s),
            "lost_steps": self.lost_steps,
            "effective_training_time": round(self.effective, 4),
            "bitwise_equal": self.bitwise_equal,
            "problems": self.problems,
        }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    of = {"least": min(values), "median": statistics.median(values), "most": max(values)}
    return {name: round(value, 2) for name, value in of.items()}


def draw_faults(draw: random.Random, ranks: int, seconds: float, step_seconds: float) -> tuple[Fault, ...]:
    """Faults at random for so long, every kind as likely. From when one is due it may take a step until a rank comes
    to its point."""
    faults: list[Fault] = []
    soonest, latest = GAP_SECONDS[0], max(GAP_SECONDS[0] + 1, GAP_SECONDS[1] - step_seconds)
    while sum(fault.wait_seconds for fault in faults) < seconds:
        action, points = draw.choice(_KINDS)
        place = draw.randrange(ranks), FIRST_STEP, draw.choice(points)
        faults.append(Fault(action, *place, wait_seconds=draw.uniform(soonest, latest)))
    return tuple(faults)


def soak(config: Config, folder: Path, seconds: float, seed: int, say: Callable[[str], None]) -> Soaked:
    """Train for so many seconds under faults, then without; ``say`` how it goes. Raises ConfigError for what cannot
    run."""
    say(f"{CALIBRATION_STEPS} steps without faults, to know how long one takes")
    calibrated = _run(_soaked(config, folder / "short", steps=CALIBRATION_STEPS), folder / "short")
    steps_taken = read_jsonl(calibrated.folder.metrics_file)
    if calibrated.attempt.status != 0 or len(steps_taken) < 2:
        said = (calibrated.attempt.output.strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(f"the run fails without any fault: {said.removeprefix('error: ')}")
    step_seconds = statistics.median(entry["step_seconds"] for entry in steps_taken[1:])
    faults = draw_faults(random.Random(seed), config.layout.world_size, seconds, step_seconds)
    say(f"a step takes {step_seconds:.2f} s; up to {len(faults)} faults in {seconds / 60:g} min")
    soaked = _soaked(config, folder / "soaked", restarts=len(faults))
    disturbed = _run(soaked, folder / "soaked", faults, seconds, say)
    last = len(read_jsonl(disturbed.folder.metrics_file))
    say(f"stopped after step {last}; now as many steps without faults")
    asked = (Fault(Action.ASK, 0, last, Point.FORWARD),)
    undisturbed = _run(_soaked(config, folder / "undisturbed"), folder / "undisturbed", asked)
    return judge(disturbed, ending(undisturbed.folder, last))


@dataclass(frozen=True)
class Ran:
    """A run that was driven. ``struck``: when each of its ``faults`` happened, None if it did not; ``forwards``: when
    ranks that started began their first forward."""

    folder: RunFolder
    attempt: Attempt
    faults: tuple[Fault, ...]
    struck: list[float | None]
    forwards: list[float]
    leftovers: list[str]


def _soaked(config: Config, folder: Path, steps: int = ENDLESS_STEPS, restarts: int = 0) -> Config:
    """The user's configuration, for as many steps as it takes, with what recovers from faults where there are any."""
    guard = RecoveryConfig()
    if restarts:
        guard = RecoveryConfig(max_restarts=restarts, replicate_every=1, hang_factor=HANG_FACTOR)
    every = config.checkpoint.every or CHECKPOINT_EVERY
    return replace(
        config,
        train=replace(config.train, steps=steps, validate_every=0),
        data=replace(config.data, validation_sequences=0),
        checkpoint=replace(config.checkpoint, every=every),
        recovery=guard,
        run=replace(config.run, dir=str(folder / "run"), trace=False),
    )


def _run(
    config: Config,
    folder: Path,
    faults: tuple[Fault, ...] = (),
    seconds: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Ran:
    """Train to the end, or until so many ``seconds`` are over. Then nothing strikes any more; but before the run is
    asked to stop it takes two steps, of which what has struck lets it take one at most."""
    plan, began = Plan(folder / PLAN_FILE, faults), time.monotonic()
    spared_at: int | None = None
    said = 0

    def is_due(steps: int) -> bool:
        nonlocal spared_at, said
        minutes = int((time.monotonic() - began) / 60)
        if say is not None and minutes > said:
            said = minutes
            say(f"after {minutes} min: {steps} steps, {len([when for when in drive.struck() if when])} faults")
        if seconds is None or time.monotonic() - began <= seconds:
            return False
        if spared_at is None:
            plan.spared.touch()
            spared_at = steps
        return steps >= spared_at + 2

    with Drive(config, plan) as drive:
        attempt = drive.start(None if seconds is None else signal.SIGTERM, is_due, POLL_SECONDS)
        return Ran(drive.run, attempt, faults, drive.struck(), drive.forwards(), drive.leftovers())


def judge(ran: Ran, wanted: Ending) -> Soaked:
    entries, events = read_jsonl(ran.folder.metrics_file), ran.folder.events.entries()
    end = ending(ran.folder, len(entries))
    happened = [(fault, when) for fault, when in zip(ran.faults, ran.struck, strict=True) if when is not None]
    struck, kinds = [when for _, when in happened], [_kind(fault) for fault, _ in happened]
    forward_s = [first_after(when, ran.forwards) for when in struck]
    gaps_s = [round(after - before, 2) for before, after in pairwise(struck)]
    began = min(ran.forwards, default=ran.attempt.began)
    lost, problems = _taken_again(events), []
    if ran.attempt.status != ASKED:
        said = (ran.attempt.output.strip().splitlines() or ["nothing"])[-1]
        problems.append(f"it ended with status {ran.attempt.status}, not {ASKED}, and said: {said}")
    if end.steps != list(range(1, len(entries) + 1)):
        problems.append("its metrics do not have every step once")
    if end.state is None or wanted.state is None:
        problems.append("there is no whole checkpoint of the last step")
    if end != wanted:
        different = [s for s, (a, b) in enumerate(zip(end.losses, wanted.losses, strict=False), 1) if a != b]
        problems.append(f"it is not the undisturbed run, from step {min(different, default=len(entries))} on")
    problems += _not_named(happened, events)
    if lost > 1:
        problems.append(f"{lost} steps were lost after one fault, of 1 at most")
    if ran.leftovers:
        problems.append(f"left behind: {', '.join(ran.leftovers)}")
    return Soaked(
        seconds=ran.attempt.ended - began,
        steps=len(entries),
        faults=Counter(kinds),
        gaps_s=gaps_s,
        late=[Late(*gap) for gap in zip(gaps_s, kinds, forward_s, strict=False) if gap[0] > GAP_SECONDS[1]],
        forward_s=[seconds for seconds in forward_s if seconds is not None],
        lost_steps=lost,
        training_s=sum(entry["step_seconds"] for entry in entries),
        bitwise_equal=end == wanted,
        problems=problems,
    )


def _kind(fault: Fault) -> str:
    return fault.action.name.lower().replace("_", " ")


def _not_named(happened: Sequence[tuple[Fault, float]], events: Sequence[dict[str, Any]]) -> list[str]:
    """Each fault has to be the next failure that the run tells of, with its rank and how that ended."""
    failures = [(time_of(e), e) for e in events if e.get("event") == "failure"]
    problems = []
    for fault, when in happened:
        after = next((e for at, e in failures if at >= when - 0.001), None)  # they are written in milliseconds
        if after is None or after["rank"] != fault.rank or fault.action.shows_as not in after["cause"]:
            problems.append(f"{_kind(fault)} of rank {fault.rank} at {fault.point.value} was not named")
    if len(failures) != len(happened):
        problems.append(f"{len(failures)} failures were told of, and {len(happened)} happened")
    return problems


def _taken_again(events: Sequence[dict[str, Any]]) -> int:
    """The most steps between a failure and where the run went on from."""
    most, done = 0, None
    for event in events:
        if event.get("event") == "failure":
            done = event["step"]
        elif event.get("event") == "resume" and done is not None:
            most, done = max(most, done - event["step"]), None
    return most
