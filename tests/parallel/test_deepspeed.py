"""Training with DeepSpeed's optimizer is training with the native one, bit for bit, and either resumes the other."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import checkpoint, saver
from parallel.checkpoint import Progress
from parallel.deepspeed_backend import BackendUnavailable
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.worker import Job, StepResult, Worker
from tests.parallel.test_checkpoint import assert_same_state
from tests.parallel.test_parity import JOB as PARITY_JOB
from tests.parallel.test_parity import batch, starve
from tests.ranks import run_ranks

JOB = replace(PARITY_JOB, global_batch_size=16)  # the least that DualPipe runs on 4 pipeline and 2 data ranks
STEPS = 5
OTHER = Layout(1, 2, 2)
"""Writes a checkpoint that the layout under test goes on from."""
Figures = list[tuple[float, float]]


def worker_of(backend: str, layout: Layout, rank: int, dtype: torch.dtype = torch.float32) -> Worker:
    optimizer = replace(JOB.optimizer, backend=backend)
    worker = Worker(replace(JOB, layout=layout, dtype=dtype, optimizer=optimizer), rank)
    for held in worker.held.values():
        starve(held.stage.model)
    return worker


def steps(worker: Worker, numbers: range) -> list[StepResult]:
    first, count = worker.rows(JOB.global_batch_size)
    # A new rate every step: one that reached only the first would not show otherwise.
    return [
        worker.train_step(batch(JOB, n)[first : first + count] if worker.needs_data else None, 1e-3 / (n + 1))
        for n in numbers
    ]


def figures(results: list[StepResult]) -> Figures:
    return [(r.loss, r.grad_norm) for r in results]


def parameters(worker: Worker) -> dict[str, torch.Tensor]:
    """What the rank computes with, by stage and name. Collective."""
    worker.settle()
    experts = worker.job.layout.expert_index(worker.rank)
    return {
        f"{stage}.{experts if 'experts' in name else 0}.{name}": parameter.detach().clone()
        for stage, held in worker.held.items()
        for name, parameter in held.stage.model.named_parameters()
    }


def train_both(rank: int, layout: Layout, dtype: torch.dtype) -> tuple[Figures, Figures, int, int]:
    """Losses and norms of both backends, parameters that differ between them, and between the copies of a stage."""
    native = worker_of("native", layout, rank, dtype)
    expected = figures(steps(native, range(STEPS)))
    assert "deepspeed" not in sys.modules, "only who asks for DeepSpeed imports it"
    driven = worker_of("deepspeed", layout, rank, dtype)
    got = figures(steps(driven, range(STEPS)))

    mine, theirs = parameters(driven), parameters(native)
    differ = sum(not torch.equal(mine[name], theirs[name]) for name in theirs)
    copies: list[dict[str, torch.Tensor]] = [{}] * layout.world_size
    dist.all_gather_object(copies, mine)
    apart = sum(not torch.equal(mine[name], other[name]) for other in copies for name in mine.keys() & other.keys())
    return expected, got, differ, apart


@pytest.mark.parametrize(
    ("pipeline", "data", "expert", "dtype"),
    [(1, 1, 1, "float32"), (2, 1, 1, "float32"), (2, 1, 1, "bfloat16"), (2, 2, 2, "float32")],
)
def test_training_equals_the_native_backend(pipeline: int, data: int, expert: int, dtype: str) -> None:
    """Exactly: both do the same FP32 operations in the same order on every element."""
    pytest.importorskip("deepspeed")
    layout = Layout(pipeline, data, expert)
    for expected, got, differ, apart in run_ranks(train_both, layout.world_size, layout, getattr(torch, dtype)):
        assert min(norm for _, norm in expected) > JOB.optimizer.clip_norm, "clipping must be active"
        assert got == expected
        assert differ == 0, "parameters differ between the backends"
        assert apart == 0, "parameters differ between the copies of a stage"


def resume(rank: int, layout: Layout, folder: Path) -> tuple[Figures, list[Figures]]:
    """Steps 2 and 3 of a native run that nothing interrupted, and of runs that one backend began and the other
    finished."""
    expected = figures(steps(worker_of("native", layout, rank), range(4)))[2:]
    resumed = []
    for before, after in (("native", "deepspeed"), ("deepspeed", "native")):
        worker = worker_of(before, layout, rank)
        steps(worker, range(2))
        path = saver.save(folder / before, worker, Progress(2, 2 * JOB.global_batch_size), keep=1)
        worker = worker_of(after, layout, rank)
        assert checkpoint.load(path, worker).step == 2
        resumed.append(figures(steps(worker, range(2, 4))))
    worker = worker_of("native", OTHER, rank)
    steps(worker, range(2))
    progress = Progress(2, 2 * JOB.global_batch_size)
    path = saver.save(folder / "other", worker, progress, keep=1)
    worker = worker_of("deepspeed", layout, rank)
    checkpoint.load(path, worker)
    assert_same_state(rank, path, worker, progress)
    return expected, resumed


def test_either_backend_resumes_the_other_and_any_layout(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    layout = Layout(2, 1, 1)
    for expected, resumed in run_ranks(resume, layout.world_size, layout, tmp_path):
        assert resumed == [expected, expected]


def test_moments_in_bf16_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.moments=bf16 must be fp32 with optimizer\.backend=deepspeed"):
        OptimizerConfig(backend="deepspeed", moments="bf16")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    job: Job = replace(JOB, optimizer=OptimizerConfig(backend="deepspeed"))
    with pytest.raises(BackendUnavailable, match=r"optimizer\.backend=deepspeed .* pip install deepspeed=="):
        Worker(job, 0)
