"""Start all ranks of a layout on this machine with torch's own launcher.

The ranks are forked from a server that has imported torch (``fork_server.py``).

When a rank dies, or is killed because it hangs (``hang.py``), the others are ended and all are started again, which
takes a second because the server is still there: they go on from the newest whole checkpoint, or from what the
launcher's memory kept of them (``keeper.py``).
"""

import argparse
import contextlib
import logging
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, TypeVar

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import output, train
from launch.config import Config, ConfigError
from launch.fork_server import ForkServer
from launch.hang import Board, Hang
from launch.keeper import Keeper
from launch.launcher import LOST_SERVER, Failure, Launcher
from launch.memory_file import MemoryFile
from launch.metrics import read_jsonl
from launch.run_folder import RunFolder
from launch.stop import ONE_REQUEST_SECONDS, heeded, say_not_begun

GRACE_SECONDS = 5.0
"""How long ranks may live after the first that ended; those that wait to name a lost peer take 2."""
POLL_SECONDS = 0.05


def start(config: Config, arguments: argparse.Namespace) -> int:
    """Run every rank, again after a failure as often as ``recovery.max_restarts`` allows, and return the exit status
    for the whole: the ranks' own where they agree on bad input. Raises ConfigError."""
    logging.disable(logging.ERROR)  # what torch's launcher logs about ended ranks, the ranks say better
    # The server's socket lives longer than the folder.
    with (
        ForkServer() as server,
        _scratch_folder() as scratch,
        _held(config, "replicate_every", Keeper) as keeper,
        _held(config, "hang_factor", Board) as board,
    ):
        asked = multiprocessing.get_context("forkserver").Event()
        launcher = Launcher(asked, None if keeper is None else keeper.regions, None if board is None else board.path)
        _pass_signals_on(asked)
        try:
            return _start(config, arguments, launcher, _Node(server, scratch, board))
        except SignalException as stopped:
            return 128 + stopped.sigval


_Held = TypeVar("_Held", Keeper, Board)


@contextlib.contextmanager
def _held(config: Config, key: str, kind: type[_Held]) -> Iterator[_Held | None]:
    """What the launcher holds in memory for its ranks; None when ``recovery.KEY`` does not ask for it. Raises
    ConfigError."""
    value = getattr(config.recovery, key)
    if not value:
        yield None
        return
    if not MemoryFile.available():
        raise ConfigError(f"recovery.{key}={value} must be 0: it needs Linux")
    with kind(config.layout.world_size) as held:
        yield held


@dataclass(frozen=True)
class _Node:
    """What all attempts have in common."""

    server: ForkServer
    scratch: str
    board: Board | None


@contextlib.contextmanager
def _scratch_folder() -> Iterator[str]:
    """A folder for the logs of torch's launcher, and for the files of errors that it would leave behind."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as scratch:
        tempfile.tempdir = scratch
        try:
            yield scratch
        finally:
            tempfile.tempdir = before


class _Watch:
    """Sees the first rank end, from beside torch's launcher, and kills those that have not followed in
    ``GRACE_SECONDS``: torch would let a rank that hears no SIGTERM, stopped or stuck on a GPU, live for 30 more. It
    ends the ranks that hang, too, where ``look`` sees one.

    A context manager for one attempt; once it is left, none of its ranks is alive.
    """

    def __init__(self, server: ForkServer, look: Callable[[float], Hang | None] | None = None) -> None:
        self.finished = multiprocessing.get_context("forkserver").Event()
        """Set by a rank that left the group, which all ranks do together: they may take their time to end."""
        self.noticed: float | None = None
        self.hang: Hang | None = None
        self._server, self._look = server, look
        self._seen: set[psutil.Process] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(GRACE_SECONDS)
        _, alive = psutil.wait_procs(self._seen, timeout=GRACE_SECONDS)
        self._kill(alive)
        psutil.wait_procs(alive, timeout=GRACE_SECONDS)

    def _run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            alive = self._server.ranks()
            self._seen |= alive
            if self._look is not None and self.hang is None:
                self._end_hanging(self._look)
            if self._seen - alive:
                self.noticed = self.noticed or time.monotonic()
                self._over.wait(GRACE_SECONDS)
                if not self.finished.is_set():
                    self._kill(self._seen)
                return

    def _end_hanging(self, look: Callable[[float], Hang | None]) -> None:
        """Kill the ranks that are to blame for a hang, if there is one: then somebody has died, as ever."""
        now = time.monotonic()
        self.hang = look(now)
        if self.hang is not None:
            self.noticed = now
            guilty = set(self.hang.processes.values())
            self._kill(process for process in self._seen if process.pid in guilty)

    @staticmethod
    def _kill(processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _start(config: Config, arguments: argparse.Namespace, launcher: Launcher, node: _Node) -> int:
    folder, most, restarts = RunFolder(config), config.recovery.max_restarts, 0
    known = len(folder.events.entries())
    while (failure := _attempt(config, arguments, launcher, node)) is not None:
        if not failure.can_recover:
            return train.USER_ERROR if failure.status == train.USER_ERROR else train.FAILED
        failure = _explained(failure, folder.events.entries()[known:])
        steps = read_jsonl(folder.metrics_file)
        _note(folder, failure, steps[-1]["step"] if steps else 0)
        if restarts == most:
            _say_the_end(failure, most)
            return train.FAILED
        restarts += 1
        source = "the newest checkpoint" if launcher.memory is None else "memory or the newest checkpoint"
        print(f"{failure.cause}; restart {restarts} of {most}, from {source}", file=sys.stderr)
        launcher = replace(launcher, recovering=failure)
        known = len(folder.events.entries())
    return 0


def _attempt(config: Config, arguments: argparse.Namespace, launcher: Launcher, node: _Node) -> Failure | None:
    """Run all ranks to their end. Each attempt has a rendezvous and a store of its own: ranks that meet the addresses
    which the ranks before them left in a store connect to nobody."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.layout.world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
        shutdown_timeout=config.recovery.grace_seconds,
        signals_to_handle="SIGQUIT",
        logs_specs=DefaultLogsSpecs(log_dir=node.scratch),
    )
    node.server.ensure_running()
    look = None if node.board is None else node.board.watched(config.recovery.hang_factor)
    with _Watch(node.server, look) as watch:
        try:
            elastic_launch(launch, _rank)(config, arguments, launcher, watch.finished)
        except ChildFailedError as error:
            _, first = error.get_first_failure()
            noticed = time.monotonic() if watch.noticed is None else watch.noticed
            hung = watch.hang is not None and first.local_rank in watch.hang.processes
            cause = f"ended as it hung: {watch.hang.words}" if watch.hang is not None and hung else _cause(first)
            return Failure(first.local_rank, first.exitcode, cause, noticed)
    return None


def _pass_signals_on(asked: multiprocessing.synchronize.Event) -> None:
    """Make a signal what torch's launcher passes on to all ranks, and set ``asked``, because torch sends the same
    signal when a rank has died; repeats within a moment are the same request."""
    last = -ONE_REQUEST_SECONDS

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last < ONE_REQUEST_SECONDS:
            return
        last = time.monotonic()
        asked.set()
        if not multiprocessing.active_children():  # no rank that could say it
            say_not_begun()
        raise SignalException("asked to stop", sigval=signal.Signals(number))

    for heard in heeded():
        signal.signal(heard, handle)


def _cause(first: ProcessFailure) -> str:
    """What is known from outside about the rank that failed first."""
    if first.exitcode == LOST_SERVER:
        return "the process that started the ranks was ended"
    if first.exitcode < 0:
        return f"rank {first.local_rank} was ended by {signal.Signals(-first.exitcode).name}"
    return f"rank {first.local_rank} failed"


def _explained(failure: Failure, events: Sequence[Mapping[str, Any]]) -> Failure:
    """With the rank's own words, where ``events``, those of the attempt, have some."""
    if failure.status != train.FAILED:
        return failure
    names = ("failed", "lost a peer")
    own = (e["error"] for e in events if e.get("event") in names and e.get("rank") == failure.rank)
    words = next(own, None)
    return failure if words is None else replace(failure, cause=f"{failure.cause}: {words}")


def _note(folder: RunFolder, failure: Failure, step: int) -> None:
    """Record a failure after ``step``, if there is a folder to record it in; on the screen it is said anyway."""
    with contextlib.suppress(OSError):
        folder.events.write("failure", rank=failure.rank, cause=failure.cause, step=step)


def _say_the_end(failure: Failure, most: int) -> None:
    """One line about a failure that is not recovered from, where the rank itself could not say it all."""
    spent = f"; recovery.max_restarts={most} is used up" if most else ""
    if spent or failure.status != train.FAILED:
        print(f"error: {failure.cause}{spent}; to go on, give the same command", file=sys.stderr)


def _rank(
    config: Config, arguments: argparse.Namespace, launcher: Launcher, finished: multiprocessing.synchronize.Event
) -> None:
    """What each rank runs: the same as under torchrun. The server that forked it outlives a launcher that is killed;
    the rank must not."""
    output.prepare()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    status = train.as_rank(arguments, config, launcher)
    if status not in (train.FAILED, train.USER_ERROR):
        finished.set()
    if status:
        raise SystemExit(status)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(train.FAILED)
