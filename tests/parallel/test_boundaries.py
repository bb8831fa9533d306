"""Documents that are kept apart train, through a pipeline, as each of them alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer, initialise
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.worker import Job, Worker
from tests.model.tiny import tiny
from tests.ranks import run_ranks

END, LENGTH, BATCH, RATE = 39, 12, 16, 1e-3
MODEL = tiny(num_hidden_layers=4, balance_loss_alpha=0.0, bias_update_speed=0.0)
JOB = Job(
    model=MODEL,
    layout=Layout(2, 2, 2),
    schedule="dualpipe",
    dtype=torch.float32,
    device=torch.device("cpu"),
    seed=3,
    sequence_length=LENGTH,
    global_batch_size=BATCH,
    micro_batch_size=1,
    optimizer=OptimizerConfig(learning_rate=RATE, clip_norm=1e9, weight_decay=0.0),
    document_start=END,
)
JOBS = [
    JOB,
    replace(JOB, micro_batch_size=2),
    # The two ranks in the middle hold no end of the model, and find the documents all the same.
    replace(JOB, layout=Layout(4)),
]


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, END, (BATCH, LENGTH + 1), generator=generator)
    return torch.where(torch.rand(tokens.shape, generator=generator) < 0.25, END, tokens)


def train(rank: int, jobs: list[Job]) -> list[tuple[list[float], list[float], float]]:
    results = []
    for job in jobs:
        worker = Worker(job, rank)
        first, count = worker.rows(BATCH)
        rows = [batch(step)[first : first + count] if worker.needs_data else None for step in range(3)]
        steps = [worker.train_step(tokens, RATE) for tokens in rows[:2]]
        results.append(([s.loss for s in steps], [s.grad_norm for s in steps], worker.evaluate(rows[2], BATCH)))
    return results


def alone(model: Transformer, step: int) -> torch.Tensor:
    """The summed cross-entropy of a batch, every document in a call of its own."""
    total = torch.zeros(())
    for row in batch(step):
        edges = [0, *(place for place in range(1, LENGTH) if row[place] == END), LENGTH]
        for start, end in pairwise(edges):
            total = total + model(row[None, start:end], row[None, start + 1 : end + 1]).cross_entropy
    return total


def reference(config: ModelConfig) -> tuple[list[float], list[float], float]:
    model = Transformer(config)
    initialise(model, JOB.seed)
    c = JOB.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(c.beta1, c.beta2), eps=c.epsilon, weight_decay=0.0
    )
    losses, norms = [], []
    for step in range(2):
        loss = alone(model, step) / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, norms, alone(model, 2).item()


def test_a_pipeline_trains_packed_documents_as_each_alone() -> None:
    losses, norms, evaluation = reference(MODEL)
    for results in run_ranks(train, 4, JOBS):
        for got_losses, got_norms, got_evaluation in results:
            assert got_losses == pytest.approx(losses, rel=1e-5)
            assert got_norms == pytest.approx(norms, rel=1e-5)
            assert got_evaluation == pytest.approx(evaluation, rel=1e-5)
