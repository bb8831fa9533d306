"""What the pipeline costs: CPU time of a step on eight ranks against the same global batch in one process.

    python -m benchmarks.pipeline_overhead [CONFIG] [key.sub=value ...] [--rounds 5] [--steps 2] [--json]

The ranks of CONFIG's layout (configs/tiny-cpu.yaml: pipeline 4 x data 2, expert 2) and one process with layout 1 x 1 x
1 train the same model from the same weights on the same batches, one thread each, with micro-batches of the same size.
All are started once and stay; they take turns, a few steps at a time, while the others sleep on a pipe. A rank's CPU
time is user and system time of all its threads (getrusage), gloo's included, from before its steps to after them; a
step's is the sum over the ranks. Waiting costs none: nothing here spins. The first steps of a run touch memory that
its processes never had before, which the kernel has to find and clear: measuring begins where that has ended.

The ranks keep every core busy, one process keeps one, and cores slow each other down (caches, memory, clock) without a
word being said between processes. So the baseline is measured twice: alone, and as one of as many strangers as there
are cores, each a world of its own with the whole batch, all at once; theirs is the CPU time a process.
"""

import argparse
import json
import multiprocessing as mp
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.config import Config, ConfigError, load

CONFIG = Path(__file__).parents[1] / "configs" / "tiny-cpu.yaml"
TIMEOUT_S = 600
SETTLED_FAULTS, MOST_WARM_UP = 500, 16
"""Pages that a rank may touch for the first time in a step of a run under way (some milliseconds of its CPU time), and
the steps after which it is measured whatever it touches."""


@dataclass(frozen=True)
class Usage:
    """What steps cost: CPU seconds outside and inside the kernel, context switches, pages touched for the first time,
    the last step's loss, and the wall seconds."""

    user_s: float
    system_s: float
    switches: int
    faults: int
    loss: float
    wall_s: float

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


class Group:
    """The ranks of one layout, as processes that do what they are told over a pipe; ``copies`` of a layout of one rank
    are strangers that work at the same time."""

    def __init__(self, config: Config, store: Path, copies: int = 1) -> None:
        assert copies == 1 or config.layout.world_size == 1
        self.world, self.copies = config.layout.world_size * copies, copies
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["parallel.worker", "launch.rank"])
        self._pipes, self._processes = [], []
        for number in range(self.world):
            rank = number // copies
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, config, store, rank))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def steps(self, count: int) -> Usage:
        """CPU time of ``count`` steps, a step, summed over the ranks of a copy, and the wall time of a step."""
        each: list[Usage] = self._ask(("steps", count))
        share = count * self.copies
        return Usage(
            sum(u.user_s for u in each) / share,
            sum(u.system_s for u in each) / share,
            sum(u.switches for u in each) // share,
            sum(u.faults for u in each) // share,
            each[0].loss,
            max(u.wall_s for u in each) / count,
        )

    def warm_up(self) -> None:
        """Run steps until every rank has the memory that they take."""
        for _ in range(MOST_WARM_UP):
            if self.steps(1).faults * self.copies <= SETTLED_FAULTS * self.world:
                return

    def top_operators(self) -> str:
        """One step of rank 0, by operator."""
        table: str = self._ask(("profile", 1))[0]
        return table

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _ask(self, command: tuple[str, int]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(command)
        return [self._answer(rank) for rank in range(self.world)]

    def _answer(self, rank: int) -> Any:
        pipe = self._pipes[rank]
        if not pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"rank {rank} of {self.world} gave no answer within {TIMEOUT_S} s")
        try:
            failure, value = pipe.recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} of {self.world} died") from None
        if failure is not None:
            raise RuntimeError(f"rank {rank} of {self.world} failed:\n{failure}")
        return value


@contextmanager
def started(wanted: Sequence[tuple[Config, int]]) -> Iterator[list[Group]]:
    """A group for each (configuration, copies); none of their processes is left afterwards."""
    groups: list[Group] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, (config, copies) in enumerate(wanted):
                groups.append(Group(config, Path(folder) / f"store{number}", copies))
            yield groups
        finally:
            for group in groups:
                group.close()


def _serve(pipe: Connection, config: Config, store: Path, rank: int) -> None:
    """A rank's life: build the worker, then do as told until killed."""
    import torch
    import torch.distributed as dist

    from benchmarks.measure import top_operators
    from launch.job import job_of
    from launch.rank import die_with_parent, keep_memory, run_in_long_slices
    from parallel.worker import Worker

    die_with_parent()
    try:
        torch.set_num_threads(1)
        keep_memory()
        run_in_long_slices()
        train, layout = config.train, config.layout
        if layout.world_size > 1:
            there, timeout = f"file://{store}", timedelta(seconds=TIMEOUT_S)
            dist.init_process_group("gloo", there, timeout, world_size=layout.world_size, rank=rank)
        job = job_of(config, torch.device("cpu"), ranks_per_node=layout.world_size, document_end=0)
        worker = Worker(job, rank)
        generator = torch.Generator().manual_seed(train.seed)
        shape = (train.global_batch_size, train.sequence_length + 1)
        first, count = worker.rows(train.global_batch_size)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)[first : first + count]

        def step() -> float:
            return worker.train_step(tokens if worker.needs_data else None, config.optimizer.learning_rate).loss

        while True:
            what, steps = pipe.recv()
            if what == "profile":
                pipe.send((None, top_operators(step)))
                continue
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            losses = [step() for _ in range(steps)]
            after = resource.getrusage(resource.RUSAGE_SELF)
            switches = after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
            faults = after.ru_minflt - before.ru_minflt
            user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
            wall = time.perf_counter() - start
            pipe.send((None, Usage(user, system, switches, faults, losses[-1], wall)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def compare(config: Config, rounds: int, steps: int, profile: bool, console: Console) -> dict[str, Any]:
    """All sides in turns, each warmed up before."""
    alone = replace(config, layout=replace(config.layout, pipeline=1, data=1, expert=1))
    cores = min(len(os.sched_getaffinity(0)), config.layout.world_size)
    wanted = {"ranks": (config, 1), "single": (alone, 1), "busy": (alone, cores)}
    with started(list(wanted.values())) as groups:
        contestants = dict(zip(wanted, groups, strict=True))
        usages: dict[str, list[Usage]] = {name: [] for name in contestants}
        for group in groups:
            group.warm_up()
        for turn in range(rounds):
            for name in contestants if turn % 2 else reversed(contestants):
                usages[name].append(contestants[name].steps(steps))
        if profile:
            for name, group in contestants.items():
                console.print(f"{name}: one step of rank 0 by operator\n{group.top_operators()}", soft_wrap=True)
    by_round = {
        against: [r.cpu_s / s.cpu_s for r, s in zip(usages["ranks"], usages[against], strict=True)]
        for against in ("single", "busy")
    }
    cpu = {name: statistics.median(u.cpu_s for u in of) for name, of in usages.items()}
    return {
        "precision": config.precision.compute,
        "world_size": config.layout.world_size,
        "tokens_a_step": config.train.global_batch_size * config.train.sequence_length,
        "microbatches": {"ranks": config.microbatches, "single": alone.microbatches},
        "cpu_s": cpu,
        "user_s": {name: statistics.median(u.user_s for u in of) for name, of in usages.items()},
        "system_s": {name: statistics.median(u.system_s for u in of) for name, of in usages.items()},
        "switches": {name: statistics.median(u.switches for u in of) for name, of in usages.items()},
        "last_loss": {name: of[-1].loss for name, of in usages.items()},
        "cores": cores,
        "ratio_by_round": by_round,
        "ratio": {against: cpu["ranks"] / cpu[against] for against in by_round},
    }


def print_result(console: Console, result: dict[str, Any]) -> None:
    title = f"CPU time of a step, {result['precision']}, {result['tokens_a_step']} tokens"
    table = Table(title=title)
    for column in ("", "CPU s", "user s", "system s", "context switches", "loss at the end"):
        table.add_column(column, justify="right" if column else "left")
    labels = {"ranks": f"{result['world_size']} ranks together", "single": "one process, alone"}
    labels["busy"] = f"one process of {result['cores']} strangers, one a core"
    for name in result["cpu_s"]:
        table.add_row(
            labels[name],
            *(f"{result[key][name]:.3f}" for key in ("cpu_s", "user_s", "system_s")),
            f"{result['switches'][name]:,.0f}",
            f"{result['last_loss'][name]:.5f}",
        )
    console.print(table)
    for against, by_round in result["ratio_by_round"].items():
        rounds = ", ".join(f"{r:.3f}" for r in by_round)
        console.print(f"ranks / {labels[against]}: {result['ratio'][against]:.3f}x (of medians; by round {rounds})")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline_overhead", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("config", nargs="?", default=str(CONFIG), help="a configuration with more than one rank")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--profile", action="store_true", help="print the top operators of rank 0 and of the process")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the table goes to stderr")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load(options.config, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(stderr=options.json)
    result = compare(config, options.rounds, options.steps, options.profile, console)
    print_result(console, result)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
