"""Every copy of a stage stays the same bits, and the checks that say so fail when a step's end is broken."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from parallel.bucket import Bucket
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.worker import Job, Worker
from tests.parallel.test_parity import JOB as PLAIN
from tests.parallel.test_parity import STEPS, batch, reference, starve
from tests.ranks import run_ranks

LAYOUT = Layout(4, 2, 2)
JOB = replace(PLAIN, model=replace(PLAIN.model, num_nextn_predict_layers=1), global_batch_size=16)
BF16 = replace(JOB, dtype=torch.bfloat16, optimizer=OptimizerConfig(learning_rate=1e-3, moments="bf16"))
APART = replace(BF16, schedule="1f1b")
"""First and last stage on ranks of their own, each with a copy of the embedding."""
EMBEDDING = "embed.weight"

Held = dict[tuple[int, str, int], str]
"""What a rank holds: (stage, name, expert index or -1) -> digest of the values."""
Trained = tuple[list[float], list[float], Held]
"""Losses, gradient norms, and what the rank holds at the end."""


def held_by(worker: Worker) -> Held:
    found = {}
    for stage, held in worker.held.items():
        tensors = dict(held.stage.model.named_parameters()) | dict(held.stage.model.named_buffers())
        for name, tensor in tensors.items():
            expert = worker.job.layout.expert_index(worker.rank) if ".experts." in name else -1
            values = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            found[stage, name, expert] = hashlib.sha256(values).hexdigest()
    return found


def train(rank: int, job: Job, steps: int) -> Trained:
    worker = Worker(replace(job, layout=LAYOUT), rank)
    for held in worker.held.values():
        starve(held.stage.model)
    results = []
    for step in range(steps):
        first, count = worker.rows(job.global_batch_size)
        results.append(worker.train_step(batch(job, step)[first : first + count], job.optimizer.learning_rate))
    worker.settle()
    return [r.loss for r in results], [r.grad_norm for r in results], held_by(worker)


@contextmanager
def no_sum() -> Iterator[None]:
    with patch.object(Bucket, "reduce", lambda bucket: None):
        yield


@contextmanager
def sum_without_the_twin() -> Iterator[None]:
    """Over the data replicas at one pipeline position alone: for a rank's experts, that is nobody else."""
    groups = {}
    for position in range(LAYOUT.pipeline):
        ranks = LAYOUT.dense_replicas([position])
        groups |= dict.fromkeys(ranks, dist.new_group(ranks))

    def reduce(bucket: Bucket) -> None:
        if bucket.replicas == 2 * LAYOUT.data:
            dist.all_reduce(bucket.gradients, group=groups[dist.get_rank()])

    with patch.object(Bucket, "reduce", reduce):
        yield


@contextmanager
def no_gather() -> Iterator[None]:
    with patch.object(Bucket, "gather", lambda bucket: None):
        yield


BREAKAGES: dict[str, Callable[[], object]] = {
    "no sum": no_sum,
    "a sum without the twin": sum_without_the_twin,
    "no gather": no_gather,
}


def everything(rank: int) -> dict[str, Trained]:
    results = {"untrained": train(rank, JOB, 0), "whole": train(rank, JOB, 20)}
    results |= {"bf16": train(rank, BF16, 3), "apart": train(rank, APART, 3)}
    for name, broken in BREAKAGES.items():
        with broken():
            results[name] = train(rank, JOB, 3)
    return results


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Trained]]:
    return run_ranks(everything, LAYOUT.world_size)


def copies(ranks: list[Held]) -> dict[tuple[int, str, int], list[str]]:
    """The digests of all copies of each tensor."""
    found: dict[tuple[int, str, int], list[str]] = {}
    for held in ranks:
        for key, digest in held.items():
            found.setdefault(key, []).append(digest)
    return found


def same_bits(ranks: list[Held]) -> bool:
    return all(len(set(digests)) == 1 for digests in copies(ranks).values())


def parity(results: list[Trained], expected: tuple[list[float], list[float]]) -> bool:
    """Whether losses and gradient norms are those of the plain model, as far as both went."""
    return all(
        got[:steps] == pytest.approx(want[:steps], rel=1e-5)
        for *figures, _ in results
        for got, want in zip(figures, expected, strict=True)
        for steps in [min(len(got), len(want))]
    )


@pytest.mark.parametrize("run", ["whole", "bf16"])
def test_twins_and_data_replicas_are_the_same_bits(run: str, trained: list[dict[str, Trained]]) -> None:
    held = [rank[run][2] for rank in trained]
    assert same_bits(held)
    # Two positions hold each stage: its dense parameters on all data ranks, its experts on half of them.
    for (_, name, expert), digests in copies(held).items():
        assert len(digests) == (2 if expert >= 0 else 4), name
    assert {stage for stage, _, _ in copies(held)} == set(range(LAYOUT.pipeline))


def test_the_embedding_of_first_and_last_stage_is_one_or_copies_of_the_same_bits(
    trained: list[dict[str, Trained]],
) -> None:
    last = LAYOUT.pipeline - 1
    for run, holders in (("bf16", [0, 1, 6, 7]), ("apart", [0, 1])):
        first_stage = {rank: held[run][2].get((0, EMBEDDING, -1)) for rank, held in enumerate(trained)}
        assert [rank for rank, digest in first_stage.items() if digest] == holders
        last_stage = [held[run][2][last, EMBEDDING, -1] for held in (trained[6], trained[7])]
        assert len({*last_stage, *(first_stage[rank] for rank in holders)}) == 1


def test_every_copy_was_trained(trained: list[dict[str, Trained]]) -> None:
    for rank in trained:
        for key, digest in rank["untrained"][2].items():
            assert rank["whole"][2][key] != digest, key


def test_parity_holds_for_the_whole_and_fails_without_the_twins_sum(trained: list[dict[str, Trained]]) -> None:
    expected = reference(JOB, STEPS)[:2]
    assert parity([rank["whole"] for rank in trained], expected)
    for broken in ("no sum", "a sum without the twin"):
        assert not parity([rank[broken] for rank in trained], expected), broken


def test_the_copies_differ_without_the_gather(trained: list[dict[str, Trained]]) -> None:
    assert not same_bits([rank["no gather"][2] for rank in trained])
