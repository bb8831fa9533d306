"""A rank of a plain torchrun job: our model, torch's distributed checkpoint, and one fault. See recovery.py.

    torchrun --standalone --nproc-per-node 4 --max-restarts 1 -m benchmarks.recovery_ranks CONFIG FOLDER SIGKILL

What a user would write around torchrun: every second step is saved by ``torch.distributed.checkpoint`` into a fresh
folder, rank 0 then names it in a file, and whoever is started again goes on from there. In its sixth step the last rank
sends itself the signal, once. Into FOLDER go lines of ``time.time``: ``struck``, ``noticed`` (a rank lost its peer),
``forwards`` (a rank that was started begins its first forward), ``steps`` (done, with their numbers, by rank 0).
"""

import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from launch.config import load
from launch.job import job_of
from launch.rank import place, prepare
from parallel.checkpoint import Progress, adopt, pieces
from parallel.stage import ModelStage
from parallel.worker import Worker

STEPS, EVERY, FAULT_STEP = 8, 2, 6


def _say(folder: Path, name: str, number: int = 0) -> None:
    with (folder / name).open("a") as file:
        file.write(f"{time.time()!r} {number}\n")


def _state(worker: Worker) -> tuple[dict[str, Tensor], Tensor]:
    """What the rank saves, under names of its own, and the state of its generator, which is among it."""
    rng = torch.get_rng_state()
    own = pieces(worker, rng, loading=False)
    return {f"{worker.rank}.{piece.name}.{piece.offset}": piece.tensor for piece in own}, rng


def _save(folder: Path, worker: Worker, step: int) -> None:
    path = folder / f"step-{step}"
    save_distributed(_state(worker)[0], checkpoint_id=path)
    if worker.rank == 0:
        (folder / "newest.tmp").write_text(str(step))
        (folder / "newest.tmp").rename(folder / "newest")


def _go_on(folder: Path, worker: Worker) -> int:
    """The steps that are done."""
    if not (folder / "newest").exists():
        return 0
    step = int((folder / "newest").read_text())
    state, rng = _state(worker)
    load_distributed(state, checkpoint_id=folder / f"step-{step}")
    adopt(worker, Progress(step, 0), rng)
    return step


def _break(folder: Path, number: signal.Signals, step: int) -> None:
    if step == FAULT_STEP and not (folder / "struck").exists():
        _say(folder, "struck", step)
        os.kill(os.getpid(), number)


def _train(worker: Worker, folder: Path, number: signal.Signals) -> None:
    job, done = worker.job, _go_on(folder, worker)
    for held in worker.held.values():
        for name in ("forward", "overlapped"):
            _announce(held.stage, name, folder / "forwards", worker)
    for step in range(done + 1, STEPS + 1):
        if worker.rank == dist.get_world_size() - 1:
            _break(folder, number, step)
        shape = (job.global_batch_size, job.sequence_length + 1)
        tokens = torch.randint(job.model.vocab_size, shape, generator=torch.Generator().manual_seed(step))
        first, count = worker.rows(job.global_batch_size)
        worker.train_step(tokens[first : first + count], 1e-3)
        if worker.rank == 0:
            _say(folder, "steps", step)
        if step % EVERY == 0:
            _save(folder, worker, step)


def _announce(stage: ModelStage, name: str, file: Path, worker: Worker) -> None:
    """Have the rank write down when it first calls this method of a stage."""
    method = getattr(stage, name)

    def announced(*arguments: Any) -> Any:
        setattr(stage, name, method)
        _say(file.parent, file.name, worker.rank)
        return method(*arguments)

    setattr(stage, name, announced)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("signal")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    config, here, device = load(arguments.config), place(os.environ), torch.device("cpu")
    prepare(config, here, device)
    worker = Worker(job_of(config, device, here.local_world_size, 0), here.rank)
    try:
        _train(worker, arguments.folder, signal.Signals[arguments.signal])
    except RuntimeError:
        _say(arguments.folder, "noticed", here.rank)
        raise
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
