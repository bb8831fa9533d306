"""Training on any layout is the training of the plain model: losses and gradient norms against the single process."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.router import Routing
from model.transformer import Transformer, initialise
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.worker import Job, Worker
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
STARVED = 5
"""An expert whose bias keeps every token away."""


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (JOB.global_batch_size, JOB.sequence_length + 1)
    return torch.randint(0, MODEL.vocab_size, shape, generator=generator)


def starve(model: Transformer) -> None:
    for _, block in model.blocks():
        if block.router is not None:
            block.router.bias_E[STARVED] = -10.0


def reference() -> tuple[list[float], list[float]]:
    """The model's own forward, torch's autograd, torch's clipping and AdamW: (losses, gradient norms)."""
    torch.manual_seed(0)
    model = Transformer(MODEL)
    initialise(model, JOB.seed)
    starve(model)
    c = JOB.optimizer
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
            loads[layer] = torch.bincount(routing.indices_TK.flatten(), minlength=MODEL.n_routed_experts)

        return hook

    for layer, block in model.blocks():
        if block.router is not None:
            block.router.register_forward_hook(count(layer))
    losses, norms = [], []
    for step in range(STEPS):
        tokens = batch(step)
        sums = model(tokens[:, :-1], tokens[:, 1:])
        loss = sums.cross_entropy / tokens[:, 1:].numel() + MODEL.balance_loss_alpha * sums.balance / len(tokens)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm).item())
        optimizer.step()
        for layer, block in model.blocks():
            if block.router is not None:
                assert loads[layer][STARVED] == 0
                block.router.update_bias(loads[layer])
        losses.append(loss.item())
    return losses, norms


def train(rank: int, layout: Layout) -> tuple[list[float], list[float], int]:
    worker = Worker(replace(JOB, layout=layout), rank)
    for held in worker.held.values():
        starve(held.stage.model)
    results = []
    for step in range(STEPS):
        first, count = worker.rows(JOB.global_batch_size)
        tokens = batch(step)[first : first + count] if worker.needs_data else None
        results.append(worker.train_step(tokens, JOB.optimizer.learning_rate))
    return [r.loss for r in results], [r.grad_norm for r in results], max(r.peak_activations for r in results)


@pytest.mark.parametrize("pipeline,data,expert", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (4, 2, 2), (2, 4, 4)])
def test_parity(pipeline: int, data: int, expert: int) -> None:
    layout = Layout(pipeline, data, expert)
    losses, norms = reference()
    assert min(norms) > JOB.optimizer.clip_norm, "clipping must be active"
    for got_losses, got_norms, _ in run_ranks(train, layout.world_size, layout):
        assert got_losses == pytest.approx(losses, rel=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-5)
