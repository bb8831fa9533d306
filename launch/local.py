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
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import output, train
from launch.attempts import Alone, Attempts, Journal
from launch.config import Config, ConfigError
from launch.fork_server import ForkServer
from launch.hang import Board, Hang
from launch.keeper import Keeper
from launch.launcher import LOST_SERVER, Failure, Flag, Launcher
from launch.memory_file import MemoryFile
from launch.nodes.roster import NodeCount
from launch.nodes.together import Together
from launch.relay import Relay
from launch.run_folder import RunFolder
from launch.stop import heed_no_more, heeded, say_between_attempts, say_not_begun

GRACE_SECONDS = 5.0
"""How long ranks may live after the first that ended; those that wait to name a lost peer take 2."""
POLL_SECONDS = 0.05


def start(config: Config, arguments: argparse.Namespace) -> int:
    """Run the ranks of this node, again after a failure as often as ``recovery.max_restarts`` allows, and return the
    exit status for the whole: the ranks' own where they agree on bad input. Raises ConfigError."""
    logging.disable(logging.ERROR)  # what torch's launcher logs about ended ranks, the ranks say better
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # as many ranks on each node: nothing to ask the others
    nodes: NodeCount = arguments.nnodes
    ranks = nodes.ranks_on_each(config.layout.world_size)
    with (
        ForkServer() as server,
        _scratch_folder(server.folder) as scratch,
        _held(config, "replicate_every", Keeper, ranks) as keeper,
        _held(config, "hang_factor", Board, ranks) as board,
    ):
        relay = Relay(Path(scratch), config.recovery.grace_seconds)
        memory = None if keeper is None else keeper.regions
        launcher = Launcher(relay.asked, memory, None if board is None else board.path)
        node = _Node(server, scratch, board, relay)
        try:
            if nodes.most == 1:
                return _start(config, arguments, launcher, Alone(config), node)
            with Together(config, nodes, arguments.local_addr, keeper) as together:
                return _start(config, arguments, launcher, together, node)
        except SignalException as stopped:
            return 128 + stopped.sigval
        finally:
            heed_no_more()


_Held = TypeVar("_Held", Keeper, Board)


@contextlib.contextmanager
def _held(config: Config, key: str, kind: type[_Held], ranks: int) -> Iterator[_Held | None]:
    """What the launcher holds in memory for its ``ranks``; None when ``recovery.KEY`` does not ask for it. Raises
    ConfigError."""
    value = getattr(config.recovery, key)
    if not value:
        yield None
        return
    if not MemoryFile.available():
        raise ConfigError(f"recovery.{key}={value} must be 0: it needs Linux")
    with kind(ranks) as held:
        yield held


def launch_config(rendezvous: Mapping[str, Any], ranks: int, scratch: str, **more: Any) -> LaunchConfig:
    """What torch's launcher is told of the ranks of this node; it writes into the folder ``scratch``."""
    return LaunchConfig(
        **rendezvous,
        nproc_per_node=ranks,
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
        **more,
    )


@dataclass(frozen=True)
class _Node:
    """What all attempts have in common."""

    server: ForkServer
    scratch: str
    board: Board | None
    relay: Relay


@contextlib.contextmanager
def _scratch_folder(parent: str) -> Iterator[str]:
    """A folder for the logs of torch's launcher, and for the files of errors that it would leave behind."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        tempfile.tempdir = scratch
        try:
            yield scratch
        finally:
            tempfile.tempdir = before


class _Watch:
    """Sees the first rank end, from beside torch's launcher, and kills those that have not followed in
    ``GRACE_SECONDS``: torch would let a rank that hears no SIGTERM, stopped or stuck on a GPU, live for 30 more. It
    passes on what ``relay`` heard, and ends the ranks that hang, too, where ``look`` sees one, and all when those of
    another node ended.

    A context manager for one attempt; once it is left, none of its ranks is alive.
    """

    def __init__(
        self,
        server: ForkServer,
        attempts: Attempts,
        finished: Flag,
        regroup: Flag,
        relay: Relay,
        look: Callable[[float], Hang | None] | None = None,
    ) -> None:
        self.finished = finished
        """Set by a rank that left the group, which all ranks do together: they may take their time to end."""
        self.noticed: float | None = None
        self.elsewhere = False
        """Whether another node's ranks ended before any of these."""
        self.hang: Hang | None = None
        self._server, self._attempts, self._regroup = server, attempts, regroup
        self._relay, self._look = relay, look
        self._seen: set[psutil.Process] = set()
        self._asked: set[psutil.Process] = set()
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
            self._relay.pass_on(alive)
            self._server.end_if_it_hides_an_end()
            if self._look is not None and self.hang is None:
                self._end_hanging(self._look)
            if self._seen - alive:
                self.noticed = self.noticed or time.monotonic()
                if not self.finished.is_set():
                    self._attempts.break_off()
                self._over.wait(GRACE_SECONDS)
                if not self.finished.is_set():
                    self._kill(self._seen)
                return
            if self._attempts.ended_elsewhere():
                self._follow(alive)
            elif self._attempts.regroups():
                self._regroup.set()

    def _follow(self, alive: set[psutil.Process]) -> None:
        """Ask all ranks to end, those too that are only just being started; once the first has ended, the others have
        ``GRACE_SECONDS``. Where a node was lost they have none: they may wait for it for as long as a timeout."""
        if self.noticed is None:
            self.noticed, self.elsewhere = time.monotonic(), True
        for process in alive - self._asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        self._asked |= alive
        if self._attempts.node_lost() or time.monotonic() - self.noticed > GRACE_SECONDS:
            self._kill(alive)

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


def _start(config: Config, arguments: argparse.Namespace, launcher: Launcher, attempts: Attempts, node: _Node) -> int:
    _pass_signals_on(node.relay, attempts, RunFolder(config))
    while (status := attempts.wait()) is None:
        launcher = replace(launcher, recovering=attempts.recovering, start=attempts.start, wanted=config.layout)
        failure = _attempt(config, arguments, launcher, attempts, node)
        if (status := attempts.settle(failure)) is not None:
            break
    return status


def _attempt(
    config: Config, arguments: argparse.Namespace, launcher: Launcher, attempts: Attempts, node: _Node
) -> Failure | None:
    """Run the ranks of this node to their end. Raises SignalException when they ended because they were asked to."""
    share = attempts.share
    config = replace(config, layout=share.layout)
    launch = launch_config(attempts.rendezvous(), share.ranks, node.scratch, signals_to_handle="SIGQUIT")
    node.server.ensure_running()
    ranks = range(attempts.first_rank, attempts.first_rank + share.ranks)
    factor = config.recovery.hang_factor
    elsewhere = attempts if share.nodes > 1 else None
    look = None if node.board is None else node.board.watched(factor, ranks, elsewhere)
    finished, regroup = (Flag(Path(node.scratch, f"{name}-{uuid.uuid4().hex}")) for name in ("finished", "regroup"))
    launcher, relay = replace(launcher, regroup=regroup), node.relay
    with _Watch(node.server, attempts, finished, regroup, relay, look) as watch:
        try:
            elastic_launch(launch, _rank)(config, arguments, launcher, finished, relay.complete)
            return None
        except ChildFailedError as error:
            failure = _failure(*error.get_first_failure(), watch)
        except (RendezvousError, DistError) as error:  # another node ended before it had come to the store
            failure = Failure(None, train.FAILED, f"the nodes did not meet: {error}", time.monotonic(), follows=True)
    if relay.signal is None or failure.status == train.USER_ERROR:  # the last checkpoint could not be written
        return replace(failure, ended=time.monotonic())
    if relay.complete.is_set():
        return None
    if relay.out_of_time:
        Journal(config).note_out_of_time(relay.signal)
    elif failure.can_recover:
        Journal(config).note_while_stopping(failure)
    raise SignalException("asked to stop", sigval=relay.signal)


def _failure(rank: int, first: ProcessFailure, watch: _Watch) -> Failure:
    noticed = time.monotonic() if watch.noticed is None else watch.noticed
    hung = watch.hang is not None and rank in watch.hang.processes
    cause = f"ended as it hung: {watch.hang.words}" if watch.hang is not None and hung else _cause(rank, first.exitcode)
    return Failure(rank, first.exitcode, cause, noticed, follows=watch.elsewhere)


def _pass_signals_on(relay: Relay, attempts: Attempts, folder: RunFolder) -> None:
    """Have ``relay`` hear the signals that stop a run. Where there is no rank to pass them on to, they end the launcher
    at once, but for a run that is complete."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not relay.hear(number):
            return
        attempts.asked_to_stop(number)
        if multiprocessing.active_children() or relay.complete.is_set():
            return
        say_between_attempts() if folder.has_steps() else say_not_begun()
        raise SignalException("asked to stop", sigval=signal.Signals(number))

    for heard in heeded():
        signal.signal(heard, handle)


def _cause(rank: int, status: int) -> str:
    """What is known from outside about the rank that failed first."""
    if status == LOST_SERVER:
        return "the process that started the ranks was ended"
    if status < 0:
        return f"rank {rank} was ended by {signal.Signals(-status).name}"
    return f"rank {rank} failed"


def _rank(config: Config, arguments: argparse.Namespace, launcher: Launcher, finished: Flag, complete: Flag) -> None:
    """What each rank runs: the same as under torchrun. The server that forked it outlives a launcher that is killed;
    the rank must not."""
    output.prepare()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    status = train.as_rank(arguments, config, launcher)
    if status == 0:
        complete.set()
    if status not in (train.FAILED, train.USER_ERROR):
        finished.set()
    if status:
        raise SystemExit(status)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    end_now()


def end_now() -> None:
    os._exit(train.FAILED)
