"""The run of a scenario: started as a user would, broken, watched to its end, and nothing of it left behind.

All processes of a run carry the path of its fault plan, which is in a fresh folder, in their environment. That is how
the drill tells its own from all others, orphans included.
"""

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from launch.bad_steps import SkippedBatches
from launch.config import CheckpointConfig, Config, dump
from launch.drills import damage as damages
from launch.drills.damage import Damage
from launch.drills.fault import PLAN, Action, Fault, Plan, Point
from launch.drills.scenarios import EVERY, STEPS, Again, Scenario
from launch.drills.segments import segments_of
from launch.metrics import read_jsonl
from launch.nodes.roster import NodeCount
from launch.nodes.roster_file import RosterFile
from launch.rank import die_with_parent
from launch.recovery_config import RecoveryConfig
from launch.run_folder import RunFolder
from parallel.checkpoint import published

INTERRUPT_AFTER = 2 * EVERY + 1
"""The step after which a launcher is interrupted."""
CONTROL_GRACE_SECONDS = 3600
"""How long ranks of a control may take to end at a signal: longer than any start of it."""
CONTROL_WAIT_SECONDS = 60.0
"""How long the nodes of a control wait for one that does not come."""
SEGMENTS_EVERY_SECONDS = 0.5
"""Between looks at what the processes of a run share."""
END_SECONDS = 5.0
"""How long processes may take to be gone after the launcher is."""
PLAN_FILE = "plan.json"
ALONE = NodeCount()
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Attempt:
    """One start of the command. ``began``, ``ended`` and ``stepped``, when its first step was done, in seconds of
    ``time.time``; ``status``: None when it did not end in time; ``steps``: done at its end."""

    began: float
    ended: float
    stepped: float | None
    status: int | None
    steps: int
    output: str


@dataclass(frozen=True)
class Evidence:
    """What a scenario did, and what it left. ``struck``: when each fault, and the interrupt if there is one, happened,
    None if it did not; ``forwards``: when ranks that started began their first forward; ``damaged``: the files that
    were, if any, as CHECKPOINT/FILE."""

    folder: RunFolder
    attempts: list[Attempt]
    struck: list[float | None]
    forwards: list[float]
    damaged: tuple[str, ...]
    leftovers: list[str]


def drilled(config: Config, run: Path, scenario: Scenario | None = None, control: bool = False) -> Config:
    """The configuration that is drilled: the user's, with few steps, many checkpoints and no validation; with what a
    scenario needs, or, as a control, without what protects it."""
    restarts, every, asynchronous, replicated = 0, EVERY, False, False
    guard = RecoveryConfig(grace_seconds=CONTROL_GRACE_SECONDS) if control else RecoveryConfig()
    if scenario is not None:
        every = scenario.every
        if scenario.guard is not None and not control:
            guard = scenario.guard
        asynchronous = scenario.asynchronous
        if scenario.replicated:  # its control is restarted too, and finds nothing in memory
            replicated = not control
        if scenario.again is Again.LAUNCHER and (scenario.replicated or scenario.returns or not control):
            restarts = len(scenario.faults)
        if scenario.returns and control:
            guard = replace(guard, node_wait_seconds=CONTROL_WAIT_SECONDS)
        if scenario.restarts is not None:
            restarts = len(scenario.faults) if control else scenario.restarts
    return replace(
        config,
        train=replace(config.train, steps=STEPS, validate_every=0),
        data=replace(config.data, validation_sequences=0),
        checkpoint=CheckpointConfig(
            every=every,
            keep=STEPS // EVERY,
            asynchronous=asynchronous,
            on_error="continue" if control else "stop",
        ),
        recovery=replace(guard, max_restarts=restarts, replicate_every=int(replicated)),
        run=replace(config.run, dir=str(run), trace=False),
    )


def batch_of(config: Config, step: int) -> int:
    """Where the batch of a step, counted from 1, begins in the data; in sequences."""
    values, skipped, start, end = config.values(), SkippedBatches(config.data.skip_batches), 0, 0
    for before in range(step):
        size = values.at(before).global_batch_size
        start = skipped.next_batch(end, size)
        end = start + size
    return start


def undisturbed(config: Config, folder: Path, without: Sequence[int] = ()) -> Evidence:
    """The run that others are compared with; ``without`` these batches, by where they begin."""
    config = replace(config, data=replace(config.data, skip_batches=(*config.data.skip_batches, *without)))
    with Drive(drilled(config, folder / "run"), Plan(folder / PLAN_FILE)) as drive:
        attempt = drive.start()
        return Evidence(drive.run, [attempt], [], drive.forwards(), (), drive.leftovers())


def disturbed(scenario: Scenario, config: Config, folder: Path, control: bool, limit_seconds: float) -> Evidence:
    """Run a scenario in a fresh folder; ``control``: without what protects the run. Each start may take
    ``limit_seconds``. Raises ConfigError for faults that would never happen to this configuration."""
    plan = Plan(folder / PLAN_FILE, scenario.faults, protected=not control)
    nodes = NodeCount(scenario.nodes, scenario.nodes + scenario.spares)
    with Drive(drilled(config, folder / "run", scenario, control), plan, limit_seconds, nodes, scenario.hosts) as drive:
        attempts = [drive.start(scenario.interrupt, returns=scenario.returns)]
        damaged: tuple[str, ...] = ()
        # Who is killed with all that it started cannot remove its temporary files.
        leftovers = drive.leftovers(files_too=scenario.nodes == 1)
        if scenario.again is Again.USER and attempts[0].status == scenario.status:
            if scenario.damage is not None:
                damaged = drive.damage(scenario.damage)
            drive.make_writable()
            attempts.append(drive.start())
            leftovers += drive.leftovers()
        struck = drive.struck() + ([drive.interrupted] if scenario.interrupt else [])
        return Evidence(drive.run, attempts, struck, drive.forwards(), damaged, leftovers)


def planned(config: Config, folder: Path, like: RunFolder) -> Evidence:
    """A run that nobody disturbs, and whose user stops it, and goes on with it, to take every step on the layout on
    which the run in the folder ``like`` took it."""
    parts = [list(steps) for _, steps in groupby(layouts(like).items(), key=lambda item: item[1])]
    stops = tuple(Fault(Action.ASK, 0, part[-1][0], Point.FORWARD) for part in parts[:-1])
    with Drive(drilled(config, folder / "run"), Plan(folder / PLAN_FILE, stops)) as drive:
        attempts = []
        for part in parts:
            layout = part[0][1]
            attempts.append(drive.start(words=[f"layout.{key}={value}" for key, value in layout.items()]))
        return Evidence(drive.run, attempts, [], drive.forwards(), (), drive.leftovers())


def layouts(run: RunFolder) -> dict[int, dict[str, int]]:
    """On which layout each step was taken that counts, from 1 on."""
    taken: dict[int, dict[str, int]] = {}
    layout: dict[str, int] = {}
    for event in run.events.entries():
        if event.get("event") == "start":
            layout = event["layout"]
        if event.get("event") == "resume" or not taken:  # one that ended before it resumed took none
            taken.update(dict.fromkeys(range(event.get("step", 0) + 1, STEPS + 1), layout))
    return taken


class Drive:
    """The starts of one run, whose folder and configuration are in the folder of its plan, which is made here; each may
    take ``limit_seconds``. Several ``nodes`` are as many launchers on this machine, spares included; ``hosts`` gives
    each a network of its own, which is mended once a step was taken again, if it was cut.

    A context manager; once it is left, by whatever way, no process of the run is alive.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        limit_seconds: float = math.inf,
        nodes: NodeCount = ALONE,
        hosts: bool = False,
    ) -> None:
        folder = plan.file.parent
        plan.check(config)
        self.plan, self.limit_seconds, self.run = plan, limit_seconds, RunFolder(config)
        self.nodes, self.hosts, self._ranks = nodes, hosts, config.layout.world_size // nodes.needed
        self._holds, self._mended = any(fault.action is Action.HOLD for fault in plan.faults), False
        self.config_file, self.output, self.temporary = folder / "config.yaml", folder / "output.txt", folder / "tmp"
        self.interrupted: float | None = None
        """When the launcher was sent a signal, in seconds of ``time.time``."""
        self._segments: set[Path] = set()
        self._looked = 0.0
        self.temporary.mkdir(parents=True)
        plan.write()
        self.config_file.write_text(dump(config))

    def __enter__(self) -> "Drive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while processes := self._processes():  # one of them may have been about to fork another
            _kill(processes)
        self.make_writable()

    def start(
        self,
        interrupt: signal.Signals | None = None,
        is_due: Callable[[int], bool] | None = None,
        poll_seconds: float = _POLL_SECONDS,
        words: Sequence[str] = (),
        returns: bool = False,
    ) -> Attempt:
        """Train until the command ends, or until ``limit_seconds`` are over; ``interrupt`` it once that ``is_due``: it
        is asked with the steps done, every ``poll_seconds``; by default that is so after the step ``INTERRUPT_AFTER``,
        once all faults have happened. ``words``: overrides; ``returns``: whether another
        launcher is started once a step was taken again."""
        is_due = is_due or (lambda steps: steps >= INTERRUPT_AFTER and None not in self.struck())
        resumed, before, began = len(self._resumes()), self._last_entry(), time.time()
        self.output.unlink(missing_ok=True)
        launchers = self._launch(1 if self.hosts else self.nodes.most, words)
        stepped = None
        while _status(launchers) is None and time.time() - began < self.limit_seconds:
            entry = self._last_entry()
            # What is taken again has its old place in the metrics for a moment.
            if stepped is None and entry != before and len(self._resumes()) > resumed:
                stepped = time.time() if _step(entry) > self._resumes()[-1] else None
            if returns and stepped is not None:
                launchers += self._launch(1, words)
                returns = False
            if self._holds and stepped is not None and not self.plan.released.exists():
                self._let_go_on()
            if interrupt is not None and self.interrupted is None and is_due(_step(entry)):
                self.interrupted = time.time()
                launchers[0].send_signal(interrupt)
            self._note_segments()
            time.sleep(poll_seconds)
        return Attempt(began, time.time(), stepped, _status(launchers), self.steps(), self.output.read_text())

    def _launch(self, launchers: int, words: Sequence[str]) -> list[subprocess.Popen[bytes]]:
        environment = {**os.environ, PLAN: str(self.plan.file), "TMPDIR": str(self.temporary)}
        command = [sys.executable, "-m", "launch.cli", "train", str(self.config_file), *words, "--json"]
        if self.nodes != ALONE:
            command += ["--nnodes", str(self.nodes)]
        if self.hosts:
            cluster = ["hosts", "--nodes", str(self.nodes.most), "--ranks-per-node", str(self._ranks)]
            command = [sys.executable, "-m", "launch.cli", *cluster, "--", *command]
        with self.output.open("a") as output:
            return [
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the drill
                    preexec_fn=die_with_parent,
                )
                for _ in range(launchers)
            ]

    def _let_go_on(self) -> None:
        """Have ranks that are held go on, once what they are held for is there: every node reaches all others again,
        after it was given its link; or the run has regrouped, maybe before there was a rank to hold."""
        if not self.hosts:
            if any(event.get("event") == "regroup" for event in self.run.events.entries()):
                self.plan.released.touch()
            return
        nodes = re.findall(r"namespaces of process ([0-9]+)$", self.output.read_text(), re.MULTILINE)
        for process in [] if self._mended else nodes:
            subprocess.run(["nsenter", "--target", process, "--net", "ip", "link", "set", "eth0", "up"], check=True)
        self._mended = True
        with RosterFile(self.run.nodes_file).open() as roster:
            if len(roster.reachable) == self.nodes.most:
                self.plan.released.touch()

    def damage(self, damage: Damage) -> tuple[str, ...]:
        """Damage the newest checkpoint -> CHECKPOINT/FILE of what is damaged."""
        *_, older, newest = published(self.run.checkpoints)
        return tuple(f"{newest.name}/{name}" for name in damages.apply(damage, newest, older))

    def make_writable(self) -> None:
        """Undo what a fault did to the permissions of the run's folder, as its user would."""
        if self.run.checkpoints.is_dir():
            self.run.checkpoints.chmod(0o755)

    def steps(self) -> int:
        """The last step in the run's metrics, 0 for none."""
        return _step(self._last_entry())

    def struck(self) -> list[float | None]:
        """When each fault happened, in seconds of ``time.time``; None if it did not."""
        marks = [self.plan.mark(fault) for fault in self.plan.faults]
        return [float(file.read_text()) if file.exists() else None for file in marks]

    def forwards(self) -> list[float]:
        """When each rank that was started began its first forward, in seconds of ``time.time``."""
        return [float(line) for line in self.plan.forwards.read_text().split()] if self.plan.forwards.exists() else []

    def leftovers(self, files_too: bool = True) -> list[str]:
        """What a start left: processes, which are killed, and temporary files and shared memory, which are removed."""
        deadline = time.monotonic() + END_SECONDS
        while (processes := self._processes()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        _kill(processes)
        files = list(self.temporary.iterdir())
        for path in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        segments = sorted(path for path in self._segments if path.exists())
        for path in segments:
            path.unlink()
        self._segments.clear()
        named = [f"process {process.pid}" for process in processes] + [f"segment {path.name}" for path in segments]
        return named + [path.name for path in files if files_too]

    def _note_segments(self) -> None:
        """What the processes of the run share by name, once in a while: who dies cannot be asked any more."""
        if time.monotonic() - self._looked > SEGMENTS_EVERY_SECONDS:
            self._looked = time.monotonic()
            self._segments.update(*(segments_of(process.pid) for process in self._processes()))

    def _last_entry(self) -> dict[str, Any] | None:
        entries = read_jsonl(self.run.metrics_file)
        return entries[-1] if entries else None

    def _processes(self) -> list[psutil.Process]:
        """All living processes of the run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(PLAN) == str(self.plan.file) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _resumes(self) -> list[int]:
        """The steps of the checkpoints that were resumed from, in order."""
        return [entry["step"] for entry in self.run.events.entries() if entry.get("event") == "resume"]


def _status(launchers: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Of a start; None before all have ended. One of several may have been killed with its node."""
    statuses = [launcher.poll() for launcher in launchers]
    if len(statuses) > 1 and -signal.SIGKILL in statuses:
        statuses.remove(-signal.SIGKILL)
    return None if None in statuses else next((status for status in statuses if status), 0)


def _step(entry: dict[str, Any] | None) -> int:
    return 0 if entry is None else int(entry["step"])


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_SECONDS)
