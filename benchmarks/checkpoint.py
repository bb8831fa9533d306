"""How long a checkpoint stops the training loop, slows it down, and takes to write and to load; ours beside torch's.

    python -m benchmarks.checkpoint [--megabytes 500] [--rounds 5] [--folder FOLDER] [--json]

One process trains a real model whose masters and moments are so large. In turns it saves nothing, saves at once and
saves behind the loop, through ``parallel/saver.py`` and through ``torch.distributed.checkpoint``, and goes on with its
steps until the save is on disk. All of them flush their files; ours have checksums, which loading verifies.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import async_save as torch_async_save
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from launch.config import load as load_config
from launch.rank import keep_memory
from parallel import checkpoint
from parallel.checkpoint import Progress, pieces
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.saver import Saver
from parallel.worker import Job, Worker

CONFIG = Path(__file__).parents[1] / "configs" / "tiny-cpu.yaml"
BYTES_PER_PARAMETER = 8
"""An FP32 master and two BF16 moments."""


@dataclass(frozen=True)
class Sample:
    """Seconds. ``stall``: in which the loop did nothing but wait; ``slowdown``: what the steps until the end of the
    save took beyond as many undisturbed ones; ``total``: until the checkpoint was on disk."""

    stall: float
    slowdown: float
    total: float
    load: float


class Bench:
    """A training job of one process with a state of about so many bytes."""

    def __init__(self, megabytes: int, folder: Path) -> None:
        config = load_config(CONFIG)
        model = replace(config.model, hidden_size=512, n_group=1, topk_group=1, num_experts_per_tok=2)
        layers = model.num_hidden_layers - model.first_k_dense_replace
        experts = megabytes * 10**6 / BYTES_PER_PARAMETER / layers / (3 * model.hidden_size * 256)
        model = replace(model, moe_intermediate_size=256, n_routed_experts=max(2, round(experts)))
        train = config.train
        job = Job(
            model=model,
            layout=Layout(),
            schedule="dualpipe",
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            seed=train.seed,
            sequence_length=train.sequence_length,
            global_batch_size=4,
            micro_batch_size=2,
            optimizer=OptimizerConfig(moments="bf16"),
        )
        self.folder, self.worker = folder, Worker(job, 0)
        shape = (job.global_batch_size, job.sequence_length + 1)
        self._tokens = torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        self.state = {p.name: p.tensor for p in pieces(self.worker, torch.get_rng_state(), loading=False)}
        self.bytes = sum(tensor.nbytes for tensor in self.state.values())
        self._waiting = 0.0
        self._behind = Saver(folder / "behind", self.worker, keep=1, asynchronous=True)
        self.worker.end.readers.append(self._copied)
        self._at_once = Saver(folder / "at once", self.worker, keep=1, asynchronous=False)

    def step(self) -> float:
        began = time.perf_counter()
        self.worker.train_step(self._tokens, 1e-4)
        return time.perf_counter() - began

    def undisturbed(self, steps: int) -> float:
        return statistics.median(self.step() for _ in range(steps))

    def ours(self, step: int, asynchronous: bool, undisturbed: float) -> Sample:
        saver = self._behind if asynchronous else self._at_once
        self._waiting = 0.0
        sample = self._measure(
            lambda: saver.begin(Progress(step, step)), saver.is_over, lambda: self._waiting, undisturbed
        )
        path = saver.finish()
        return replace(sample, load=_timed(lambda: checkpoint.load(path, self.worker)))

    def theirs(self, asynchronous: bool, undisturbed: float) -> Sample:
        path = self.folder / "theirs"
        shutil.rmtree(path, ignore_errors=True)
        future: Any = None

        def save() -> None:
            nonlocal future
            if asynchronous:
                future = torch_async_save(self.state, checkpoint_id=path)
            else:
                torch_save(self.state, checkpoint_id=path)

        sample = self._measure(save, lambda: future is None or future.done(), lambda: 0.0, undisturbed)
        if future is not None:
            future.result()
        into: dict[str, Tensor] = {name: torch.empty_like(tensor) for name, tensor in self.state.items()}
        return replace(sample, load=_timed(lambda: torch_load(into, checkpoint_id=path)))

    def _measure(
        self, save: Callable[[], None], over: Callable[[], bool], waited: Callable[[], float], undisturbed: float
    ) -> Sample:
        began = time.perf_counter()
        save()
        stall = time.perf_counter() - began
        steps = 0
        while not over():
            self.step()
            steps += 1
        total = time.perf_counter() - began
        return Sample(stall + waited(), total - stall - waited() - steps * undisturbed if steps else 0.0, total, 0.0)

    def _copied(self) -> None:
        self._waiting += _timed(self._behind.copied)


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(bench: Bench, rounds: int) -> dict[str, Sample]:
    """Medians of every contestant; the first round only warms up."""
    samples: dict[str, list[Sample]] = {}
    for turn in range(rounds + 1):
        undisturbed = bench.undisturbed(3)
        contestants: dict[str, Callable[[], Sample]] = {
            "ours, at once": lambda turn=turn, u=undisturbed: bench.ours(turn, False, u),  # type: ignore[misc]
            "ours, behind": lambda turn=turn, u=undisturbed: bench.ours(turn, True, u),  # type: ignore[misc]
            "torch save": lambda u=undisturbed: bench.theirs(False, u),  # type: ignore[misc]
            "torch async_save": lambda u=undisturbed: bench.theirs(True, u),  # type: ignore[misc]
        }
        names = list(contestants)
        for name in names if turn % 2 == 0 else reversed(names):
            sample = contestants[name]()
            if turn:
                samples.setdefault(name, []).append(sample)
    return {name: _median(samples[name]) for name in names}


def _median(samples: Sequence[Sample]) -> Sample:
    def of(key: str) -> float:
        return statistics.median(getattr(sample, key) for sample in samples)

    return Sample(of("stall"), of("slowdown"), of("total"), of("load"))


def _print(found: dict[str, Sample], bench: Bench, step: float) -> None:
    table = Table(title=f"{bench.bytes / 1e6:.0f} MB, an undisturbed step takes {step:.2f} s; medians, milliseconds")
    for column in ("", "stall", "stall per 500 MB", "slowdown", "saved after", "loaded in"):
        table.add_column(column, justify="left" if not column else "right")
    for name, s in found.items():
        scaled = s.stall * 5e8 / bench.bytes
        table.add_row(name, *(f"{1e3 * value:,.1f}" for value in (s.stall, scaled, s.slowdown, s.total, s.load)))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the folder that is saved into")
    parser.add_argument("--json", action="store_true", help="print one object")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_memory()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            bench = Bench(arguments.megabytes, folder)
            found, step = measure(bench, arguments.rounds), bench.undisturbed(3)
        finally:
            with suppress(RuntimeError):
                dist.destroy_process_group()
    if arguments.json:
        rows = {name: {**vars(s), "stall_per_500_mb": s.stall * 5e8 / bench.bytes} for name, s in found.items()}
        print(json.dumps({"bytes": bench.bytes, "step": step, "seconds": rows}))
    else:
        _print(found, bench, step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
