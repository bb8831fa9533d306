"""Training on any layout is the training of the plain model: losses and gradient norms against the single process."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel.worker
from dualpipe.cost import Costs
from dualpipe.load import load
from dualpipe.program import Overlap, ProgramError, Work
from dualpipe.schedules import SCHEDULES
from dualpipe.search import Budget, search
from dualpipe.simulate import simulate
from model.config import ModelConfig
from model.router import Routing
from model.transformer import Transformer, initialise
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.stage import ModelStage
from parallel.worker import Job, Worker
from tests.parallel.deep_ep_buffer import DocumentedBuffer
from tests.ranks import run_ranks

STEPS = 5
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=5,
    first_k_dense_replace=1,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    initializer_range=0.05,
    balance_loss_alpha=0.01,
    bias_update_speed=0.01,
)
JOB = Job(
    model=MODEL,
    layout=Layout(),
    schedule="dualpipe",
    dtype=torch.float32,
    device=torch.device("cpu"),
    seed=3,
    sequence_length=12,
    global_batch_size=32,
    micro_batch_size=1,
    optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=0.05),
)
SHORT = replace(
    JOB, model=replace(MODEL, num_hidden_layers=8, num_nextn_predict_layers=1, mtp_loss_weight=0.7), global_batch_size=8
)
"""As few layers and micro-batches as let every schedule run on four ranks, and multi-token prediction."""
FP8 = replace(JOB, dtype=torch.bfloat16, fp8="emulated", global_batch_size=8)
STARVED = 5
"""An expert whose bias keeps every token away."""


def batch(job: Job, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (job.global_batch_size, job.sequence_length + 1)
    return torch.randint(0, MODEL.vocab_size, shape, generator=generator)


def sequences(job: Job, step: int) -> int:
    """Of a batch that grows: the first step of the longest job takes half of it."""
    grows = job.global_batch_size == JOB.global_batch_size
    return job.global_batch_size // 2 if grows and step == 0 else job.global_batch_size


def starve(model: Transformer) -> None:
    for _, block in model.blocks():
        if block.router is not None:
            block.router.bias_E[STARVED] = -10.0


@cache
def reference(job: Job, steps: int) -> tuple[list[float], list[float], float, list[float]]:
    """The model's own forward, torch's autograd, torch's clipping and AdamW: (losses, gradient norms, summed
    cross-entropy of the batch after the last step, losses of multi-token prediction)."""
    torch.manual_seed(0)
    model = Transformer(job.model)
    initialise(model, job.seed)
    starve(model)
    c = job.optimizer
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": c.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=c.learning_rate,
        betas=(c.beta1, c.beta2),
        eps=c.epsilon,
    )
    loads: dict[int, torch.Tensor] = {}

    def count(layer: int) -> Callable[..., None]:
        def hook(_: object, __: object, routing: Routing) -> None:
            loads[layer] = torch.bincount(routing.indices_TK.flatten(), minlength=job.model.n_routed_experts)

        return hook

    for layer, block in model.blocks():
        if block.router is not None:
            block.router.register_forward_hook(count(layer))
    losses, norms, further = [], [], []
    for step in range(steps):
        tokens = batch(job, step)[: sequences(job, step)]
        sums = model(tokens[:, :-1], tokens[:, 1:])
        loss = sums.cross_entropy / tokens[:, 1:].numel() + job.model.balance_loss_alpha * sums.balance / len(tokens)
        mtp_loss = sums.mtp / tokens[:, 1:].numel()
        optimizer.zero_grad()
        (loss + job.model.mtp_loss_weight * mtp_loss).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm).item())
        optimizer.step()
        for layer, block in model.blocks():
            if block.router is not None:
                assert loads[layer][STARVED] == 0
                block.router.update_bias(loads[layer], job.model.bias_update_speed)
        losses.append(loss.item())
        further.append(mtp_loss.item())
    with torch.no_grad():
        tokens = batch(job, steps)
        return losses, norms, model(tokens[:, :-1], tokens[:, 1:]).cross_entropy.item(), further


def train(rank: int, job: Job, layout: Layout) -> tuple[list[float], list[float], int]:
    worker = Worker(replace(job, layout=layout), rank)
    for held in worker.held.values():
        starve(held.stage.model)
    results = []
    for step in range(STEPS):
        size = sequences(job, step)
        first, count = worker.rows(size)
        tokens = batch(job, step)[first : first + count] if worker.needs_data else None
        results.append(worker.train_step(tokens, job.optimizer.learning_rate, sequences=size))
    return [r.loss for r in results], [r.grad_norm for r in results], max(r.peak_activations for r in results)


@pytest.mark.parametrize("pipeline,data,expert", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (4, 2, 2), (2, 4, 4)])
def test_parity(pipeline: int, data: int, expert: int) -> None:
    parity(JOB, Layout(pipeline, data, expert))


def test_parity_of_several_nodes() -> None:
    """Experts over memory that two ranks of a node share, messages and reductions between the nodes."""
    parity(JOB, Layout(4, 2, 2, ranks_per_node=2))


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_parity_of_hierarchical_dispatch(ranks_per_node: int) -> None:
    parity(replace(JOB, dispatch="hierarchical", global_batch_size=8), Layout(1, 4, 4, ranks_per_node))


def one_after_the_other(self: ModelStage, work: Work, x: Tensor, other: ModelStage, *backward: Any) -> tuple[Any, Any]:
    """A pair without overlap: its forward, then its backward."""
    return self.forward(work, x), other.backward(*backward)


def train_ways(rank: int, layout: Layout) -> list[list[float]]:
    """Losses and gradient norms of two steps: flat, hierarchical, and hierarchical with no pair overlapped."""
    found = []
    overlapped = ModelStage.overlapped
    parallel.worker.make_buffer = lambda group, *_: DocumentedBuffer(group)
    ways = [("flat", overlapped), ("hierarchical", overlapped), ("hierarchical", one_after_the_other)]
    for dispatch, pair in (*ways, ("deepep", overlapped), ("deepep", one_after_the_other)):
        ModelStage.overlapped = pair  # type: ignore[method-assign]
        job = replace(SHORT, layout=layout, dispatch=dispatch, global_batch_size=16)
        worker = Worker(job, rank)
        assert any(isinstance(slot, Overlap) for slot in worker.program.slots[worker.position])
        first, count = worker.rows(job.global_batch_size)
        batches = [batch(job, step)[first : first + count] if worker.needs_data else None for step in range(2)]
        steps = [worker.train_step(tokens, 1e-3) for tokens in batches]
        found.append([number for step in steps for number in (step.loss, step.grad_norm)])
    return found


def test_every_way_to_dispatch_trains_alike_and_overlap_changes_no_bit() -> None:
    layout = Layout(2, 4, 4, ranks_per_node=2)
    for flat, hierarchical, in_turn, deepep, deepep_in_turn in run_ranks(train_ways, layout.world_size, layout):
        assert hierarchical == in_turn
        assert deepep == deepep_in_turn
        assert deepep == pytest.approx(flat, rel=1e-5)
        assert hierarchical == pytest.approx(flat, rel=1e-5)


def train_fp8(rank: int, layout: Layout, payload: bool) -> list[float]:
    worker = Worker(replace(FP8, layout=layout, fp8_payload=payload), rank)
    first, count = worker.rows(FP8.global_batch_size)
    tokens = [batch(FP8, step)[first : first + count] for step in range(3)]
    return [worker.train_step(t if worker.needs_data else None, 1e-3).loss for t in tokens]


def test_fp8_follows_the_single_process_and_forward_does_not_mind_how_rows_travel() -> None:
    """Rounding differs with the order of sums, and FP8 makes of a rounding a step: no equality across layouts."""
    layout = Layout(2, 2, 2)
    ((alone,), plain, sent) = (
        run_ranks(train_fp8, layout.world_size, layout, payload)
        for layout, payload in ((Layout(), False), (layout, False), (layout, True))
    )
    # Bitwise in the first forward: experts quantise what came in BF16 to what would have come in FP8. Their weight
    # gradients may differ where the gradient was rounded on its way, so later steps are alike only.
    assert [rank[0] for rank in plain] == [rank[0] for rank in sent]
    for rank in (*plain, *sent):
        assert rank == pytest.approx(alone, rel=2e-3)


def parity(job: Job, layout: Layout) -> None:
    losses, norms, _, _ = reference(job, STEPS)
    assert min(norms) > job.optimizer.clip_norm, "clipping must be active"
    for got_losses, got_norms, _ in run_ranks(train, layout.world_size, job, layout):
        assert got_losses == pytest.approx(losses, rel=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-5)


def train_each(rank: int, jobs: Sequence[Job]) -> list[tuple[list[float], list[float], float, list[float | None]]]:
    """Two steps and an evaluation of each job; on the way, what was executed is compared with the program, and what
    was held with the simulation."""
    results = []
    for job in jobs:
        worker = Worker(job, rank)
        for held in worker.held.values():
            starve(held.stage.model)
        first, count = worker.rows(job.global_batch_size)
        batches = [batch(job, step)[first : first + count] if worker.needs_data else None for step in range(3)]
        plain = worker.train_step(batches[0], SHORT.optimizer.learning_rate)
        began = time.perf_counter()
        recorded = worker.train_step(batches[1], SHORT.optimizer.learning_rate, record=True)
        ended = time.perf_counter()

        assert not plain.spans
        simulated = simulate(worker.program, Costs())
        assert plain.peak_activations == simulated.peak_activations[worker.position]
        assert tuple(span.slot for span in recorded.spans) == worker.program.slots[worker.position]
        times = [began, *(time for span in recorded.spans for time in (span.start, span.end)), ended]
        assert times == sorted(times)
        evaluation = worker.evaluate(batches[2], SHORT.global_batch_size)
        losses, norms = [plain.loss, recorded.loss], [plain.grad_norm, recorded.grad_norm]
        results.append((losses, norms, evaluation, [plain.mtp_loss, recorded.mtp_loss]))
    return results


def last_first(ranks: int, microbatches: int) -> str:
    """An order that no schedule has: all forwards, then the backwards from the last micro-batch on."""
    route = ",".join(map(str, range(ranks)))
    lines = [f"program last-first stages={ranks} microbatches={microbatches} routes={route}"]
    for rank in range(ranks):
        forwards = [f"F{rank}.{m}" for m in range(microbatches)]
        lines.append(f"{rank}: " + " ".join([*forwards, *(f"B{rank}.{m}" for m in reversed(range(microbatches)))]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("layout", [Layout(4, 1, 1), Layout(2, 2, 2)])
def test_every_schedule_a_program_from_a_file_and_a_searched_one_train_alike(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "program.txt").write_text(last_first(layout.pipeline, SHORT.global_batch_size // layout.data))
    jobs = [replace(SHORT, layout=layout, schedule=schedule) for schedule in SCHEDULES]
    microbatches = SHORT.global_batch_size // layout.data
    found = search(layout.pipeline, microbatches, Costs(1.0, 1.0, 1.0, overlapped=2.5), budget=Budget(orders=50))
    for program in (load(tmp_path / "program.txt"), found.program):
        jobs.append(replace(SHORT, layout=layout, schedule="", program=program))
    losses, norms, evaluation, further = reference(SHORT, 2)
    for results in run_ranks(train_each, layout.world_size, jobs):
        for got_losses, got_norms, got_evaluation, got_further in results:
            assert got_losses == pytest.approx(losses, rel=1e-5)
            assert got_norms == pytest.approx(norms, rel=1e-5)
            assert got_evaluation == pytest.approx(evaluation, rel=1e-5)
            assert got_further == pytest.approx(further, rel=1e-5)


def test_more_chunks_and_a_program_for_other_sizes(tmp_path: Path) -> None:
    worker = Worker(replace(SHORT, schedule="interleaved", chunks=4), 0)
    assert sorted(worker.held) == [0, 1, 2, 3]
    (tmp_path / "program.txt").write_text(last_first(1, 4))
    with pytest.raises(ProgramError, match="= 8 must be 4, as in the program last-first"):
        Worker(replace(SHORT, program=load(tmp_path / "program.txt")), 0)
