"""The run of a scenario: started as a user would, broken, watched to its end, and nothing of it left behind.

All processes of a run carry the path of its fault plan, which is in a fresh folder, in their environment. That is how
the drill tells its own from all others, orphans included.
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from launch.bad_steps import SkippedBatches
from launch.config import Config, dump
from launch.drills import damage as damages
from launch.drills.damage import Damage
from launch.drills.fault import PLAN, Plan
from launch.drills.scenarios import EVERY, STEPS, Again, Scenario
from launch.metrics import read_jsonl
from launch.rank import die_with_parent
from launch.recovery_config import RecoveryConfig
from launch.run_folder import RunFolder
from parallel.checkpoint import published

INTERRUPT_AFTER = 2 * EVERY + 1
"""The step after which a launcher is interrupted."""
END_SECONDS = 5.0
"""How long processes may take to be gone after the launcher is."""
PLAN_FILE = "plan.json"
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
    guard = RecoveryConfig()
    if scenario is not None:
        if scenario.guard is not None and not control:
            guard = scenario.guard
        asynchronous = scenario.asynchronous
        if scenario.replicated:  # its control is restarted too, and finds nothing in memory
            every, replicated = 0, not control
        if scenario.again is Again.LAUNCHER and (scenario.replicated or not control):
            restarts = len(scenario.faults)
        if scenario.restarts is not None:
            restarts = scenario.restarts
    return replace(
        config,
        train=replace(config.train, steps=STEPS, validate_every=0),
        data=replace(config.data, validation_sequences=0),
        checkpoint=replace(config.checkpoint, every=every, keep=STEPS // EVERY, asynchronous=asynchronous),
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
    plan = Plan(folder / PLAN_FILE, scenario.faults, verify_checkpoints=not control)
    with Drive(drilled(config, folder / "run", scenario, control), plan, limit_seconds, scenario.nodes) as drive:
        attempts = [drive.start(scenario.interrupt)]
        damaged: tuple[str, ...] = ()
        # A launcher that was killed cannot remove its temporary files; its processes have to be gone all the same.
        killed = scenario.interrupt is signal.SIGKILL or scenario.nodes > 1
        leftovers = drive.leftovers(files_too=not killed)
        if scenario.again is Again.USER and attempts[0].status == scenario.status:
            if scenario.damage is not None:
                damaged = drive.damage(scenario.damage)
            drive.make_writable()
            attempts.append(drive.start())
            leftovers += drive.leftovers()
        struck = drive.struck() + ([drive.interrupted] if scenario.interrupt else [])
        return Evidence(drive.run, attempts, struck, drive.forwards(), damaged, leftovers)


class Drive:
    """The starts of one run, whose folder and configuration are in the folder of its plan, which is made here; each may
    take ``limit_seconds``. On several ``nodes``, launchers on this machine, a start has one more as a spare.

    A context manager; once it is left, by whatever way, no process of the run is alive.
    """

    def __init__(self, config: Config, plan: Plan, limit_seconds: float = math.inf, nodes: int = 1) -> None:
        folder = plan.file.parent
        plan.check(config)
        self.plan, self.limit_seconds, self.nodes, self.run = plan, limit_seconds, nodes, RunFolder(config)
        self.config_file, self.output, self.temporary = folder / "config.yaml", folder / "output.txt", folder / "tmp"
        self.interrupted: float | None = None
        """When the launcher was sent a signal, in seconds of ``time.time``."""
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
        is_due: Callable[[int], bool] = lambda steps: steps >= INTERRUPT_AFTER,
        poll_seconds: float = _POLL_SECONDS,
    ) -> Attempt:
        """Train until the command ends, or until ``limit_seconds`` are over; ``interrupt`` it once that ``is_due``: it
        is asked with the steps done, every ``poll_seconds``."""
        resumed, before, began = len(self._resumes()), self._last_entry(), time.time()
        launchers = self._launch()
        stepped = None
        while _status(launchers) is None and time.time() - began < self.limit_seconds:
            entry = self._last_entry()
            # What is taken again has its old place in the metrics for a moment.
            if stepped is None and entry != before and len(self._resumes()) > resumed:
                stepped = time.time() if _step(entry) > self._resumes()[-1] else None
            if interrupt is not None and self.interrupted is None and is_due(_step(entry)):
                self.interrupted = time.time()
                launchers[0].send_signal(interrupt)
            time.sleep(poll_seconds)
        return Attempt(began, time.time(), stepped, _status(launchers), self.steps(), self.output.read_text())

    def _launch(self) -> list[subprocess.Popen[bytes]]:
        environment = {**os.environ, PLAN: str(self.plan.file), "TMPDIR": str(self.temporary)}
        words = [sys.executable, "-m", "launch.cli", "train", str(self.config_file), "--json"]
        spare = 1 if self.nodes > 1 else 0
        if spare:
            words += ["--nnodes", f"{self.nodes}:{self.nodes + spare}"]
        with self.output.open("w") as output:
            return [
                subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the drill
                    preexec_fn=die_with_parent,
                )
                for _ in range(self.nodes + spare)
            ]

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
        """What a start left: processes, which are killed, and temporary files, which are removed."""
        deadline = time.monotonic() + END_SECONDS
        while (processes := self._processes()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        _kill(processes)
        files = list(self.temporary.iterdir())
        for path in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [f"process {process.pid}" for process in processes] + [path.name for path in files if files_too]

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
