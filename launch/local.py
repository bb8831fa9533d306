"""Start all ranks of a layout on this machine with torch's own launcher.

The ranks are forked from a server that has imported torch, so that eight of them do not import it eight times. The
server itself starts no thread and touches no GPU.

When a rank dies, or is killed because it hangs (``hang.py``), the others are ended and all are started again, which
takes a second because the server is still there: they go on from the newest whole checkpoint, or from what the
launcher's memory kept of them (``keeper.py``).
"""

import argparse
import contextlib
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.synchronize
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import output, train
from launch.config import Config, ConfigError
from launch.hang import Board, Hang
from launch.hang import Watch as HangWatch
from launch.keeper import Keeper, Regions
from launch.metrics import read_jsonl
from launch.run_folder import RunFolder
from launch.stop import ONE_REQUEST_SECONDS, heeded, say_not_begun

LOST_SERVER = 255
"""What multiprocessing reports for a rank whose fork server is gone."""
GRACE_SECONDS = 5.0
"""How long ranks may live after the first that ended; those that wait to name a lost peer take 2."""
POLL_SECONDS = 0.05
STOP_SECONDS = 120
"""How long stopped ranks may take to finish their step and write a checkpoint before they are killed."""


@dataclass(frozen=True)
class Failure:
    """How an attempt ended. ``status``: the rank's exit status, negative for a signal; ``noticed``: when it was seen
    to be gone, in the seconds of ``time.monotonic``, which all processes of a machine share."""

    rank: int
    status: int
    cause: str
    noticed: float

    @property
    def can_recover(self) -> bool:
        """Whether the ranks may do better when started again: not after bad input, a divergence or a wish to stop."""
        return self.status < 0 or self.status in (train.FAILED, LOST_SERVER)


def start(config: Config, arguments: argparse.Namespace) -> int:
    """Run every rank, again after a failure as often as ``recovery.max_restarts`` allows, and return the exit status
    for the whole: the ranks' own where they agree on bad input."""
    logging.disable(logging.ERROR)  # what torch's launcher logs about ended ranks, the ranks say better
    # The server's socket lives longer than the folder.
    with (
        _ForkServer() as server,
        _scratch_folder() as scratch,
        _memory(config) as arguments.memory,
        _board(config) as board,
    ):
        arguments.board = board and board.path
        arguments.asked = multiprocessing.get_context("forkserver").Event()
        _pass_signals_on(arguments.asked)
        try:
            return _start(config, arguments, server, scratch, board)
        except SignalException as stopped:
            return 128 + stopped.sigval


@contextlib.contextmanager
def _memory(config: Config) -> Iterator[list[Regions] | None]:
    """Each rank's part of the memory that outlives ranks; None when the run keeps nothing there. Raises ConfigError."""
    if not config.recovery.replicate_every:
        yield None
        return
    if not Keeper.available():
        raise ConfigError(f"recovery.replicate_every={config.recovery.replicate_every} must be 0: it needs Linux")
    with Keeper(config.layout.world_size) as keeper:
        yield keeper.regions


@contextlib.contextmanager
def _board(config: Config) -> Iterator[Board | None]:
    """Where the ranks write down what they do; None when nobody watches them. Raises ConfigError."""
    if not config.recovery.hang_factor:
        yield None
        return
    if not hasattr(os, "memfd_create"):
        raise ConfigError(f"recovery.hang_factor={config.recovery.hang_factor} must be 0: it needs Linux")
    with Board(config.layout.world_size) as board:
        yield board


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


class _ForkServer:
    """A fork server that is deaf to what a terminal or a service manager sends to the whole group: with its end the
    ranks would end, which finish their step first.

    Signals are blocked, not ignored: what reaches a rank between its fork and its first line waits for it.
    """

    def __init__(self) -> None:
        self._servers: set[psutil.Process] = set()

    def __enter__(self) -> "_ForkServer":
        multiprocessing.set_forkserver_preload(["launch.trainer"])
        self.ensure_running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:  # it may be about to fork a rank that nobody waits for
            with contextlib.suppress(psutil.NoSuchProcess):
                server.kill()

    def ensure_running(self) -> None:
        """Start the server, or another one when it was ended."""
        stopping = {*heeded(), signal.SIGQUIT}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
        try:
            multiprocessing.resource_tracker.ensure_running()  # the server's own helper, as deaf as it has to be
            others = set(psutil.Process().children())
            signal.pthread_sigmask(signal.SIG_BLOCK, stopping)  # starting the helper let some of them in again
            multiprocessing.forkserver.ensure_running()
            self._servers |= set(psutil.Process().children()) - others
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ranks(self) -> set[psutil.Process]:
        """The processes that it forked and that are not over."""
        found: set[psutil.Process] = set()
        for server in self._servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update(server.children())
        return found


class _Watch:
    """Sees the first rank end, from beside torch's launcher, and kills those that have not followed in
    ``GRACE_SECONDS``: torch would let a rank that hears no SIGTERM, stopped or stuck on a GPU, live for 30 more. With a
    ``board`` it ends the ranks that hang, too.

    A context manager for one attempt; once it is left, none of its ranks is alive.
    """

    def __init__(self, server: _ForkServer, board: Board | None = None, hang_factor: float = 0.0) -> None:
        self.finished = multiprocessing.get_context("forkserver").Event()
        """Set by a rank that left the group, which all ranks do together: they may take their time to end."""
        self.noticed: float | None = None
        self.hang: Hang | None = None
        self._server, self._board, self._hang_watch = server, board, HangWatch(hang_factor)
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
            if self._board is not None and self.hang is None:
                self._end_hanging(self._board)
            if self._seen - alive:
                self.noticed = self.noticed or time.monotonic()
                self._over.wait(GRACE_SECONDS)
                if not self.finished.is_set():
                    self._kill(self._seen)
                return

    def _end_hanging(self, board: Board) -> None:
        """Kill the ranks that are to blame for a hang, if there is one: then somebody has died, as ever."""
        now, readings = time.monotonic(), board.read()
        self.hang = None if readings is None else self._hang_watch.look(now, readings)
        if self.hang is not None:
            self.noticed = now
            guilty = set(self.hang.processes.values())
            self._kill(process for process in self._seen if process.pid in guilty)

    @staticmethod
    def _kill(processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _start(
    config: Config, arguments: argparse.Namespace, server: _ForkServer, scratch: str, board: Board | None
) -> int:
    folder, most, restarts = RunFolder(config), config.recovery.max_restarts, 0
    arguments.recovering = None
    known = len(folder.events.entries())
    while (failure := _attempt(config, arguments, server, scratch, board)) is not None:
        if not failure.can_recover:
            return train.USER_ERROR if failure.status == train.USER_ERROR else train.FAILED
        failure = _explained(failure, folder.events.entries()[known:])
        steps = read_jsonl(folder.metrics_file)
        _note(folder, failure, steps[-1]["step"] if steps else 0)
        if restarts == most:
            _say_the_end(failure, most)
            return train.FAILED
        restarts += 1
        source = "the newest checkpoint" if arguments.memory is None else "memory or the newest checkpoint"
        print(f"{failure.cause}; restart {restarts} of {most}, from {source}", file=sys.stderr)
        arguments.recovering = failure
        known = len(folder.events.entries())
    return 0


def _attempt(
    config: Config, arguments: argparse.Namespace, server: _ForkServer, scratch: str, board: Board | None
) -> Failure | None:
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
        shutdown_timeout=STOP_SECONDS,
        signals_to_handle="SIGQUIT",
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
    )
    server.ensure_running()
    if board is not None:
        board.clear()
    with _Watch(server, board, config.recovery.hang_factor) as watch:
        try:
            elastic_launch(launch, _rank)(config, arguments, watch.finished)
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


def _rank(config: Config, arguments: argparse.Namespace, finished: multiprocessing.synchronize.Event) -> None:
    """What each rank runs: the same as under torchrun. The server that forked it outlives a launcher that is killed;
    the rank must not."""
    output.prepare()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    status = train.as_rank(arguments, config)
    if status not in (train.FAILED, train.USER_ERROR):
        finished.set()
    if status:
        raise SystemExit(status)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(train.FAILED)
