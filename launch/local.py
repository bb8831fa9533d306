"""Start all ranks of a layout on this machine with torch's own launcher.

The ranks are forked from a server that has imported torch, so that eight of them do not import it eight times. The
server itself starts no thread and touches no GPU.
"""

import argparse
import logging
import multiprocessing
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

STOP_SECONDS = 120
"""How long stopped ranks may take to finish their step and write a checkpoint before they are killed."""


def start(config: Config, arguments: argparse.Namespace) -> int:
    """Run every rank and return the exit status for the whole: the ranks' own where they agree on bad input."""
    multiprocessing.set_forkserver_preload(["launch.trainer"])
    logging.disable(logging.ERROR)  # what torch's launcher logs about ended ranks, the ranks say better
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as scratch:
        return _start(config, arguments, scratch)


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
        return train.FAILED
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _rank(arguments: argparse.Namespace) -> None:
    """What each rank runs: the same as under torchrun. The server that forked it outlives a launcher that is killed;
    the rank must not."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    status = train.as_rank(arguments)
    sys.stdout.flush()
    if status:
        raise SystemExit(status)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(train.FAILED)
