"""Run a function on N ranks over gloo: ``run_ranks(function, 4, argument)`` -> what each rank returned.

The ranks are forked from a server that has torch imported already, so that a test of eight ranks does not pay eight
imports. The function and its arguments must be picklable: module-level functions, plain data.
"""

import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


def run_ranks(
    function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120, lost: Collection[int] = ()
) -> list[Any]:
    """``function(rank, *arguments)`` on every rank, torch.distributed initialised. The first rank that raises fails
    the test with its traceback; no rank is left behind. From a rank in ``lost`` nothing is expected, and it counts as
    None."""
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_rank, args=(write, Path(folder) / "store", rank, world, function, arguments))
            for rank, (_, write) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, write in pipes:
            write.close()
        try:
            return [None if rank in lost else _result(read, rank, timeout) for rank, (read, _) in enumerate(pipes)]
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


def fork_server() -> ForkServerContext:
    """Where all ranks are forked from, with everything imported that a rank and the file of its test need: two seconds
    for each of a thousand ranks otherwise."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["launch.trainer", "pytest", "hypothesis.strategies"])
    return context


def _result(read: Connection, rank: int, timeout: float) -> Any:
    if not read.poll(timeout):
        raise TimeoutError(f"rank {rank} gave no result within {timeout} s")
    try:
        failure, value = read.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if failure is not None:
        raise RuntimeError(f"rank {rank} failed:\n{failure}")
    return value


def _rank(
    write: Connection, store: Path, rank: int, world: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    from launch.rank import leave

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        write.send((None, function(rank, *arguments)))
        leave()
    except BaseException:
        write.send((traceback.format_exc(), None))
