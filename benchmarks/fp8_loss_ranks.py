"""The ranks of ``benchmarks.fp8_loss``: processes that stay, and train one small model after another.

A run is DualPipe over two pipeline positions, each a pair of data replicas that share the routed experts. Its losses
depend on what it is and nothing else, so that a run made today can be compared with one made tomorrow.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.config import Config, load
from launch.data import Dataset, open_dataset
from launch.job import job_of
from launch.rank import die_with_parent, keep_memory, run_in_long_slices
from parallel.worker import Worker

CONFIG = Path(__file__).with_name("fp8_loss.yaml")
VARIANTS = ("bf16", "control", "fp8")
"""``control``: BF16 with one weight moved."""
MOVED, BY = "layers.0.attn.q_a.weight", 1e-4


@dataclass(frozen=True, order=True)
class Run:
    seed: int
    variant: str


def configuration(run: Run, steps: int) -> Config:
    compute = "fp8" if run.variant == "fp8" else "bf16"
    return load(CONFIG, (f"train.seed={run.seed}", f"train.steps={steps}", f"precision.compute={compute}"))


def work(
    rank: int, runs: list[Run], steps: int, results: Path, stamp: dict[str, str], stores: Path, told: "SimpleQueue[str]"
) -> None:
    """A rank's life: all of ``runs``; rank 0 appends a line to ``results`` after each, which ``stamp`` is part of.
    ``told``: an empty word after each step, and after each run what it came to."""
    die_with_parent()
    torch.set_num_threads(1)
    keep_memory()
    run_in_long_slices()
    for number, run in enumerate(runs, 1):
        config = configuration(run, steps)
        world = config.layout.world_size
        store = f"file://{stores / str(number)}"
        dist.init_process_group("gloo", store, timedelta(minutes=10), world_size=world, rank=rank)
        losses = train(config, rank, run.variant == "control", (lambda: told.put("")) if rank == 0 else lambda: None)
        if rank == 0:
            _append(results, {**stamp, "steps": steps, "seed": run.seed, "variant": run.variant, "loss": losses})
            last = f"{losses[-1]:.4f} nats a token in the last step"
            told.put(f"run {number} of {len(runs)}, seed {run.seed}, {run.variant}: {last}")
        dist.barrier()
        dist.destroy_process_group()


def _append(results: Path, entry: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def train(config: Config, rank: int, moved: bool, after_step: Callable[[], None]) -> list[float]:
    """Cross-entropy (nats a token) of every step. Collective."""
    data = open_dataset(config)
    worker = Worker(job_of(config, torch.device("cpu"), config.layout.world_size, data.document_end), rank)
    if moved:
        move_weight(worker)
    losses = []
    for step in range(config.train.steps):
        losses.append(round(_step(worker, config, data, step), 6))
        after_step()
    return losses


def move_weight(worker: Worker) -> None:
    """Add ``BY`` to the first number of ``MOVED``, master and copies. Collective."""
    for held in worker.held.values():
        for bucket in held.buckets:
            for segment in bucket.owned_segments():
                if segment.name == MOVED and segment.offset == 0:
                    bucket.master[segment.start] += BY
            bucket.publish()
            bucket.gather()
            bucket.gathered()


def _step(worker: Worker, config: Config, data: Dataset, step: int) -> float:
    size = config.train.global_batch_size
    first, count = worker.rows(size)
    tokens = torch.from_numpy(data.visits(step * size + first, count)) if worker.needs_data else None
    return worker.train_step(tokens, config.values().at(step).learning_rate).cross_entropy
