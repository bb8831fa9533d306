"""``dualpipe train CONFIG [key=value ...]``: train a model, or go on with a run.

Under torchrun this is one rank; otherwise it starts the ranks of the layout on this machine itself (``local.py``), or
its part of them, where the same command runs on several.

    dualpipe train configs/tiny-cpu.yaml train.steps=20
    dualpipe train configs/X.yaml --nnodes 16           # on each of 16 nodes
    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m launch.train configs/X.yaml
"""

import argparse
import errno
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch import output, stop
from launch.config import Config, ConfigError, check_world_size, load
from launch.data import DataError, open_dataset
from launch.invocation import Invocation, of_training, parent_words
from launch.nodes.roster import NodeCount
from launch.run_folder import RunFolder, tokenizer_of

if TYPE_CHECKING:
    from launch.launcher import Launcher

USER_ERROR = 2
FAILED = 1
DIVERGED = 3
"""A rank's status when steps are bad and the run cannot go on by itself (bad_steps.py): the launcher does not start it
again, to the same end. The command's is FAILED."""
REGROUPED = 4
"""A rank's status when all stopped after a step, to go on on more nodes."""
LOST_PEER_SECONDS = 2.0
LOCAL_RANKS_LIMIT = 64
"""Ranks that are started on a machine of few cores at most: each of them is a process with torch in it."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_EPILOG = """\
examples:
  dualpipe train configs/tiny-cpu.yaml train.steps=20 run.dir=runs/short
  dualpipe train configs/tiny-cpu.yaml run.dir=/shared/runs/two --nnodes 2        # on each of two machines"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    command = _Parser(
        prog="dualpipe train",
        description="Train a model through a pipeline schedule, or go on with the run in run.dir.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file with the configuration, or the folder of a run")
    command.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="values that replace those of the file"
    )
    command.add_argument(
        "--nnodes",
        metavar="N[:M]",
        default="1",
        help="give the same command on N machines that share run.dir; up to M - N more wait as spares for a lost one",
    )
    command.add_argument(
        "--local-addr",
        metavar="HOST",
        default=socket.gethostname(),
        help="this machine's name or address, as the other nodes reach it (default: its host name)",
    )
    command.add_argument("--json", action="store_true", help="print nothing but the summary, as one JSON object")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 trained, 2 bad input, 1 failed, 128 + N stopped by signal N."""
    output.prepare()
    try:
        arguments = parser().parse_intermixed_args(argv)
        arguments.nnodes = NodeCount.parse(arguments.nnodes)
        arguments.invocation = _invocation(arguments)
    except ConfigError as error:
        return _refuse(error)
    if "RANK" not in os.environ:
        return as_launcher(arguments)
    if arguments.nnodes != NodeCount():
        return _refuse(ConfigError(f"--nnodes={arguments.nnodes} must be left out under torchrun, which has its own"))
    return as_rank(arguments)


def _invocation(arguments: argparse.Namespace) -> Invocation | None:
    nodes = [] if arguments.nnodes == NodeCount() else ["--nnodes", str(arguments.nnodes)]
    if nodes and arguments.local_addr != socket.gethostname():
        nodes += ["--local-addr", arguments.local_addr]
    agent = parent_words() if "RANK" in os.environ else []
    return of_training(sys.argv[0], os.environ, _working_folder(), nodes, agent)


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(f"the working directory must be there: {error.strerror}") from None


def configuration(given: str | Path, overrides: Sequence[str] = ()) -> Config:
    """From CONFIG and the overrides; a run's folder stands for the configuration that the run was started with."""
    path = Path(given)
    if os.path.isdir(path):  # what cannot be looked at, load refuses by name
        tokenizer = tokenizer_of(path, load(path / "config.yaml"))
        return load(path / "config.yaml", [f"run.dir={path}", f"data.tokenizer={tokenizer}", *overrides])
    return load(path, overrides)


def as_launcher(arguments: argparse.Namespace) -> int:
    """Refuse what can be refused before any rank exists, then start all ranks on this machine."""
    # A store that is lost with its node is noticed and said; torch would print the stack of each thread that misses it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        stop.end_at_once()
        config = configuration(arguments.config, arguments.overrides)
        _check_room(config, arguments.nnodes)
        RunFolder(config).changes(config, open_dataset(config).fingerprint)
        from launch.local import start

        return start(config, arguments)
    except (ConfigError, DataError) as error:
        return _refuse(error)
    except stop.Stopped as stopped:
        stop.say_not_begun()
        return 128 + stopped.number
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return _refuse(ConfigError(f"this process may have {most} open files, which is too few: raise `ulimit -n`"))
    finally:
        stop.heed_no_more()


def most_local_ranks() -> int:
    """That are started on this machine."""
    return max(LOCAL_RANKS_LIMIT, 4 * (os.cpu_count() or 1))


def _check_room(config: Config, nodes: NodeCount) -> None:
    """Refuse to start the ranks of a cluster on one machine."""
    ranks = nodes.ranks_on_each(config.layout.world_size)
    most = most_local_ranks()
    if ranks > most:
        raise ConfigError(
            f"layout.pipeline={config.layout.pipeline} x layout.data={config.layout.data} = {config.layout.world_size} "
            f"ranks must be at most {most} to be started on this machine; --nnodes starts them on several"
        )


def as_rank(arguments: argparse.Namespace, config: Config | None = None, launcher: "Launcher | None" = None) -> int:
    """One rank's whole life, as torchrun started it, or ``local.py``, which has read the configuration already and is
    its ``launcher``."""
    try:
        return _run(config or configuration(arguments.config, arguments.overrides), arguments, launcher)
    except Exception as error:
        if not is_users(error):
            raise
        # All ranks of a node refuse alike: one says so. The others must not be gone before, because the launcher ends
        # all when it sees one end.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _refuse(error)
        else:
            time.sleep(LOST_PEER_SECONDS)
        return USER_ERROR


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return USER_ERROR


def _run(config: Config, arguments: argparse.Namespace, launcher: "Launcher | None") -> int:
    from launch.rank import device_of, leave, place, prepare

    folder, asked = RunFolder(config), None if launcher is None else launcher.asked
    request = stop.StopRequest(os.environ.get("RANK") == "0", folder.outlook, asked)
    here = place(os.environ)
    try:
        check_world_size(config, here.world_size)
        check_supervision(config, launcher)
        device = device_of(config, here)
        prepare(config, here, device)
        from launch.trainer import Trainer

        status = Trainer(config, here, device, folder, arguments, launcher, request).run()
        request.hush()
        leave()
        return status
    except Exception as error:
        if is_users(error):
            raise
        if isinstance(error, OSError) and (error.errno in NO_ROOM or _is_inside(error, folder)):
            raise ConfigError(f"run.dir={folder.path} cannot be written: {error.strerror}") from error
        return _fail(folder, here.rank, error, request)


def check_supervision(config: Config, launcher: "Launcher | None") -> None:
    """Refuse what only a launcher of our own can do. Raises ConfigError."""
    for key in ("replicate_every", "hang_factor"):
        value = getattr(config.recovery, key)
        if value and launcher is None:
            raise ConfigError(
                f"recovery.{key}={value} must be 0 under torchrun, whose agents keep no memory for ranks and do not "
                "watch what they do; dualpipe train --nnodes does"
            )


def _is_inside(error: OSError, folder: RunFolder) -> bool:
    """Whether it is about a file of the run."""
    return isinstance(error.filename, (str, Path)) and Path(error.filename).is_relative_to(folder.path)


def is_users(error: Exception) -> bool:
    """Whether an error is about what the user gave, and its one line is all there is to say."""
    from model.fp8.gemm import PrecisionError
    from parallel.checkpoint import CheckpointError
    from parallel.deepspeed_backend import BackendUnavailable

    users = (ConfigError, DataError, output.OutputError, CheckpointError, BackendUnavailable, PrecisionError)
    return isinstance(error, users)


def _fail(folder: RunFolder, rank: int, error: Exception, request: stop.StopRequest) -> int:
    """One line for the person, the traceback in the run folder for the engineer.

    When one rank dies, all others lose a peer, and say in which operation, and whose fault it is where that is known.
    Then they wait a moment, so that the launcher finds the one that died first and names it. A timeout does not wait.
    """
    from parallel.activity import COMMUNICATION, LostPeer

    request.hush()
    line = (str(error).strip().splitlines() or [""])[0]
    broken = isinstance(error, RuntimeError) and any(word in line for word in COMMUNICATION)
    lost_peer = broken or isinstance(error, LostPeer)
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
    if not isinstance(error, LostPeer):
        if lost_peer and request.wait_to_be_ended(LOST_PEER_SECONDS):
            return FAILED
        line = "lost a peer" if lost_peer else f"{type(error).__name__}: {line}"
    print(f"error: rank {rank}: {line}{place}", file=sys.stderr, flush=True)
    if isinstance(error, LostPeer) and not error.timed_out:
        request.wait_to_be_ended(LOST_PEER_SECONDS)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
