"""Start all ranks of a layout on this machine with torch's own launcher.

The ranks are forked from a server that has imported torch, so that eight of them do not import it eight times. The
server itself starts no thread and touches no GPU.
"""

import argparse
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import threading
import uuid

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import train
from launch.config import Config

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LOST_SERVER = 255
"""What multiprocessing reports for a rank whose fork server is gone."""
STOP_SECONDS = 120
"""How long stopped ranks may take to finish their step and write a checkpoint before they are killed."""


def start(config: Config, arguments: argparse.Namespace) -> int:
    """Run every rank and return the exit status for the whole: the ranks' own where they agree on bad input."""
    multiprocessing.set_forkserver_preload(["launch.trainer"])
    _start_server()
    logging.disable(logging.ERROR)  # what torch's launcher logs about ended ranks, the ranks say better
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as scratch:
        return _start(config, arguments, scratch)


def _start_server() -> None:
    """Start the fork server deaf to what a terminal or a service manager sends to the whole group: it ends with the
    launcher, and the ranks, which it would take along, finish their step first."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
    )
    try:
        elastic_launch(launch, _rank)(arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode == train.USER_ERROR:
            return train.USER_ERROR
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            print(
                f"error: rank {first.local_rank} was ended by {name}; to go on, give the same command", file=sys.stderr
            )
        elif first.exitcode == LOST_SERVER:
            line = "error: the process that started the ranks was ended; to go on, give the same command"
            print(line, file=sys.stderr)
        return train.FAILED
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _rank(arguments: argparse.Namespace) -> None:
    """What each rank runs: the same as under torchrun. The server that forked it outlives a launcher that is killed;
    the rank must not."""
    for number in STOP_SIGNALS:  # the fork server ignores them
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    status = train.as_rank(arguments)
    if sys.stdout is not None:
        sys.stdout.flush()
    if status:
        raise SystemExit(status)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(train.FAILED)
