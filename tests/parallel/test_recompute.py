"""What is made again in backward changes no bit of a step, runs nothing twice that communicates, and leaves nothing."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Alive
from dualpipe.program import Work
from model.config import Recompute
from model.fp8.assign import set_precision
from model.fp8.gemm import Emulated
from model.transformer import Transformer, initialise
from parallel.stage import ModelStage
from tests.model.tiny import tiny
from tests.parallel.test_stage import SCALE, Recording, backward_input, batch, forward, staged

POLICIES: list[Recompute] = [("norm",), ("mla_up",), ("swiglu",), ("norm", "mla_up", "swiglu"), "full"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SHAPES = {
    "tiny": {"num_nextn_predict_layers": 1},
    "no query latent": {"q_lora_rank": None, "n_shared_experts": 0, "v_head_dim": 12},
}
"""The second one's values are as wide as its keys, so that the core reads a view of the up-projection's output."""


def stages_of(policy: Recompute, precision: str, **changes: Any) -> tuple[list[ModelStage], dict[str, Tensor]]:
    config = tiny(recompute=policy, **changes)
    stages, buffers = staged(config, (2,), PRECISIONS[precision])
    for stage in stages:
        set_precision(stage.model, Emulated() if precision == "fp8" else None)
        stage.begin(batch(config), SCALE, training=True)
    return stages, buffers


def step(policy: Recompute, precision: str, log: list[str], **changes: Any) -> list[Tensor]:
    """Losses, what stages send, and all gradients: micro-batches 0 and 1 in pairs of a forward and a backward, 2 with
    a lone forward and backward, and the weight gradients of 1 long after its input gradients."""
    stages, buffers = stages_of(policy, precision, **changes)
    for stage in stages:
        stage.exchange = Recording(tiny(**changes).n_routed_experts, log)
    first, last = stages
    forward(stages, 0)
    x, gradient = first.overlapped(Work(0, 1), None, last, Work(1, 0), None)
    _, end = last.overlapped(Work(1, 1), x, first, Work(0, 0), gradient)
    assert x is not None and gradient is not None and end is None
    found = [x.clone(), gradient.clone()]
    gradient = last.backward_input(Work(1, 1), None)
    first.backward_input(Work(0, 1), gradient)
    forward(stages, 2)
    first.backward(Work(0, 2), last.backward(Work(1, 2), None))
    for number, stage in enumerate(stages):
        stage.backward_weight(Work(number, 1))
        for m in range(3):
            stage.free(Work(number, m))
    sums = [s for stage in stages for s in (stage.cross_entropy, stage.balance, stage.mtp)]
    return [*found, *sums, *buffers.values()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_policy_changes_a_bit_or_a_collective(precision: str, shape: str) -> None:
    want_log: list[str] = []
    want = step((), precision, want_log, **SHAPES[shape])
    assert all(torch.isfinite(t).all() for t in want) and want_log
    for policy in POLICIES:
        log: list[str] = []
        got = step(policy, precision, log, **SHAPES[shape])
        assert len(got) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), policy
        assert log == want_log, policy


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nor_does_it_in_the_model_alone(precision: str) -> None:
    def gradients(policy: Recompute) -> list[Tensor]:
        model = Transformer(tiny(recompute=policy, num_nextn_predict_layers=1))
        initialise(model, 1)
        model.to(PRECISIONS[precision])
        set_precision(model, Emulated() if precision == "fp8" else None)
        tokens = batch(model.config)[0]
        loss = model(tokens[:, :-1], tokens[:, 1:])
        total = loss.cross_entropy + 0.01 * loss.balance + loss.mtp
        return [total.detach(), *torch.autograd.grad(total, list(model.parameters()))]

    want = gradients(())
    for policy in POLICIES:
        assert all(torch.equal(a, b) for a, b in zip(gradients(policy), want, strict=True)), policy


@pytest.mark.parametrize("policy", POLICIES[3:])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_was_made_again_goes_with_its_last_use(policy: Recompute, precision: str) -> None:
    """Without the cycle collector: after I, only what W needs, and that in its own format; after W, nothing."""
    stages, buffers = stages_of(policy, precision)

    def lasting() -> list[Tensor]:
        found = [*buffers.values()]
        for stage in stages:
            found += [*stage.model.parameters(), *stage.model.buffers(), *stage.model._rotations.values()]
            found += [*stage._tokens.values(), *stage.loads.values(), stage.cross_entropy, stage.balance, stage.mtp]
            found += [stage._head_gradient, stage._balance_gradient]
        return found

    def held(m: int) -> tuple[int, int]:
        """Bytes after I, and after W."""
        with Alive(lasting()) as alive:
            forward(stages, m)
            backward_input(stages, m)
            waiting = alive.bytes()
            for number, stage in enumerate(stages):
                stage.backward_weight(Work(number, m))
                stage.free(Work(number, m))
            return waiting, alive.bytes()

    held(0)  # rotations, and torch's own first times
    gc.collect()
    gc.disable()
    try:
        waiting, after = held(1)
    finally:
        gc.enable()
    assert waiting > 0 and after == 0
