"""``dualpipe train CONFIG [key=value ...]``: train a model, or go on with a run.

Under torchrun this is one rank; otherwise it starts the ranks of the layout on this machine itself (``local.py``).

    dualpipe train configs/tiny-cpu.yaml train.steps=20
    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m launch.train configs/X.yaml
"""

import argparse
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from launch.config import Config, ConfigError, check_world_size, load
from launch.data import DataError, open_dataset
from launch.run_folder import RunFolder

USER_ERROR = 2
FAILED = 1
LOST_PEER_SECONDS = 2.0


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="dualpipe train",
        description="Train a model through a pipeline schedule, or go on with the run in run.dir.",
        epilog="example: dualpipe train configs/tiny-cpu.yaml train.steps=20 run.dir=runs/short",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file with the configuration")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file")
    command.add_argument("--json", action="store_true", help="print nothing but the summary, as one JSON object")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 trained, 2 bad input, 1 failed, 128 + N stopped by signal N."""
    arguments = parser().parse_intermixed_args(argv)
    return as_rank(arguments) if "RANK" in os.environ else as_launcher(arguments)


def as_launcher(arguments: argparse.Namespace) -> int:
    """Refuse what can be refused before any rank exists, then start all ranks on this machine."""
    try:
        config = load(arguments.config, arguments.overrides)
        RunFolder(config).changes(config, open_dataset(config).fingerprint)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    from launch.local import start

    return start(config, arguments)


def as_rank(arguments: argparse.Namespace) -> int:
    """One rank's whole life, as torchrun or ``local.py`` started it."""
    try:
        config = load(arguments.config, arguments.overrides)
        return _run(config, arguments)
    except Exception as error:
        if not is_users(error):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks of a node refuse alike: one says so
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR


def _run(config: Config, arguments: argparse.Namespace) -> int:
    from launch.rank import StopRequest, device_of, leave, place, prepare

    stop = StopRequest()
    here = place(os.environ)
    check_world_size(config, here.world_size)
    device = device_of(config, here)
    folder = RunFolder(config)
    try:
        prepare(config, here, device)
        from launch.trainer import Trainer

        status = Trainer(config, here.rank, device, folder, arguments, stop).run()
        leave()
        return status
    except Exception as error:
        if is_users(error):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"run.dir={folder.path} cannot be written: {error.strerror}") from error
        return _fail(folder, here.rank, error)


def is_users(error: Exception) -> bool:
    """Whether an error is about what the user gave, and its one line is all there is to say."""
    from parallel.checkpoint import CheckpointError
    from parallel.deepspeed_backend import BackendUnavailable

    return isinstance(error, (ConfigError, DataError, CheckpointError, BackendUnavailable))


def _fail(folder: RunFolder, rank: int, error: Exception) -> int:
    """One line for the person, the traceback in the run folder for the engineer.

    When one rank dies, all others lose a peer. They wait a moment, so that the launcher finds the one that died first
    and names it, and ends the rest, which then have nothing to add.
    """
    line = (str(error).strip().splitlines() or [""])[0]
    lost_peer = isinstance(error, RuntimeError) and any(word in line for word in ("onnection", "gloo", "NCCL"))
    place = ""
    try:
        folder.failures.mkdir(parents=True, exist_ok=True)
        file = folder.failures / f"rank-{rank}.txt"
        file.write_text("".join(traceback.format_exception(error)))
        folder.events.write(
            "lost a peer" if lost_peer else "failed", rank=rank, error=f"{type(error).__name__}: {line}"
        )
        place = f" (traceback in {file})"
    except OSError:
        traceback.print_exception(error)
    if lost_peer:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(FAILED))
        time.sleep(LOST_PEER_SECONDS)
        line = "lost a peer"
    else:
        line = f"{type(error).__name__}: {line}"
    print(f"error: rank {rank}: {line}{place}", file=sys.stderr, flush=True)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
