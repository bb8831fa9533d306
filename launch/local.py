"""Start all ranks of a layout on this machine with torch's own launcher.

The ranks are forked from a server that has imported torch, so that eight of them do not import it eight times. The
server itself starts no thread and touches no GPU.
"""

import argparse
import contextlib
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import output, train
from launch.config import Config
from launch.stop import ONE_REQUEST_SECONDS, heeded, say_not_begun

LOST_SERVER = 255
"""What multiprocessing reports for a rank whose fork server is gone."""
STOP_SECONDS = 120
"""How long stopped ranks may take to finish their step and write a checkpoint before they are killed."""


def start(config: Config, arguments: argparse.Namespace) -> int:
    """Run every rank and return the exit status for the whole: the ranks' own where they agree on bad input."""
    logging.disable(logging.ERROR)  # what torch's launcher logs about ended ranks, the ranks say better
    with _fork_server(), _scratch_folder() as scratch:  # the server's socket lives longer than the folder
        return _start(config, arguments, scratch)


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


@contextlib.contextmanager
def _fork_server() -> Iterator[None]:
    """Have a fork server that is deaf to what a terminal or a service manager sends to the whole group: with its end
    the ranks would end, which finish their step first.

    Signals are blocked, not ignored: what reaches a rank between its fork and its first line waits for it.
    """
    multiprocessing.set_forkserver_preload(["launch.trainer"])
    stopping = {*heeded(), signal.SIGQUIT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    try:
        multiprocessing.resource_tracker.ensure_running()  # the server's own helper, as deaf as it has to be
        helpers = set(psutil.Process().children())
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping)  # starting the helper let some of them in again
        multiprocessing.forkserver.ensure_running()
        servers = set(psutil.Process().children()) - helpers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield
    finally:
        for server in servers:  # it may be about to fork a rank that nobody waits for
            with contextlib.suppress(psutil.NoSuchProcess):
                server.kill()


def _start(config: Config, arguments: argparse.Namespace, scratch: str) -> int:
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
    _pass_signals_on()
    try:
        elastic_launch(launch, _rank)(config, arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return _failed(first)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _pass_signals_on() -> None:
    """Make a signal what torch's launcher passes on to all ranks; repeats within a moment are the same request."""
    last = -ONE_REQUEST_SECONDS

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last < ONE_REQUEST_SECONDS:
            return
        last = time.monotonic()
        if not multiprocessing.active_children():  # no rank that could say it
            say_not_begun()
        raise SignalException("asked to stop", sigval=signal.Signals(number))

    for heard in heeded():
        signal.signal(heard, handle)


def _failed(first: ProcessFailure) -> int:
    """The exit status for the rank that failed first, and a line where the rank itself could not say why."""
    if first.exitcode == train.USER_ERROR:
        return train.USER_ERROR
    ended = ""
    if first.exitcode < 0:
        ended = f"rank {first.local_rank} was ended by {signal.Signals(-first.exitcode).name}"
    elif first.exitcode == LOST_SERVER:
        ended = "the process that started the ranks was ended"
    if ended:
        print(f"error: {ended}; to go on, give the same command", file=sys.stderr)
    return train.FAILED


def _rank(config: Config, arguments: argparse.Namespace) -> None:
    """What each rank runs: the same as under torchrun. The server that forked it outlives a launcher that is killed;
    the rank must not."""
    output.prepare()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    status = train.as_rank(arguments, config)
    if status:
        raise SystemExit(status)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(train.FAILED)
