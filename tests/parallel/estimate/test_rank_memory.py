"""Memory of whole ranks: what a plan predicts against the bytes of the tensors that the runtime keeps alive."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch

from benchmarks.measure import Alive
from dualpipe.program import Slot
from model.config import ModelConfig, Recompute
from parallel.estimate.memory import activation_bytes, deferred_bytes, message_bytes, rank_memory, stage_parameters
from parallel.estimate.operations import Operations
from parallel.estimate.peak import Placement
from parallel.estimate.stages import stage_layers
from parallel.estimate.step import step_program
from parallel.estimate.workload import SELECTIVE, Workload
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.worker import Job, Worker
from tests.parallel.estimate.cpu import widens_the_core
from tests.parallel.estimate.published import H800
from tests.parallel.estimate.walk import held_bytes
from tests.ranks import run_ranks

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=128,
    num_hidden_layers=8,
    first_k_dense_replace=2,
    intermediate_size=384,
    moe_intermediate_size=128,
    n_routed_experts=4,
    num_experts_per_tok=4,  # all of them, so that ranks get equally many rows
    n_group=1,
    topk_group=1,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
LENGTH, SEQUENCES = 64, 2


@dataclass(frozen=True)
class Case:
    schedule: str
    layout: Layout
    precision: Literal["fp32", "bf16", "fp8"]
    recompute: Recompute
    moments: Literal["fp32", "bf16"] = "fp32"

    @property
    def microbatches(self) -> int:
        return 2 * self.layout.pipeline

    @property
    def workload(self) -> Workload:
        return Workload(
            replace(MODEL, recompute=self.recompute),
            self.layout,
            self.schedule,
            LENGTH,
            SEQUENCES,
            self.microbatches,
            self.precision,
            {"fp32": 4, "bf16": 2}[self.moments],
        )

    @property
    def job(self) -> Job:
        return Job(
            model=replace(MODEL, recompute=self.recompute),
            layout=self.layout,
            schedule=self.schedule,
            dtype=torch.float32 if self.precision == "fp32" else torch.bfloat16,
            device=torch.device("cpu"),
            seed=1,
            sequence_length=LENGTH,
            global_batch_size=self.microbatches * SEQUENCES * self.layout.data,
            micro_batch_size=SEQUENCES,
            optimizer=OptimizerConfig(moments=self.moments),
            fp8="emulated" if self.precision == "fp8" else None,
            fp8_payload=self.precision == "fp8",
        )


CASES = [
    Case("dualpipe", Layout(4), "fp32", ()),
    Case("zb1p", Layout(4), "bf16", SELECTIVE, "bf16"),
    Case("dualpipev", Layout(2, 2), "fp8", SELECTIVE),
]


def measured(rank: int, cases: list[Case]) -> list[float]:
    """For each case the most bytes that were alive at the entry of a slot."""
    return [_measured(rank, case) for case in cases]


def _measured(rank: int, case: Case) -> float:
    with Alive() as alive:
        worker = Worker(case.job, rank)
        seen, enter = [0], worker._enter

        def entered(slot: Slot) -> None:
            seen.append(alive.bytes())
            enter(slot)

        worker._enter = entered  # type: ignore[method-assign]
        count = case.microbatches * SEQUENCES
        worker.train_step(torch.randint(0, MODEL.vocab_size, (count, LENGTH + 1)), 1e-3)
    return max(seen)


def predicted(case: Case, position: int) -> float:
    """The same of a plan, behind every slot, with the pipeline's messages that may be under way."""
    w = case.workload
    program = step_program(case.schedule, case.layout.pipeline, case.microbatches)
    layers = stage_layers(w, program.stages)
    parameters = stage_parameters(Operations(w, H800), layers)
    memory = rank_memory(Placement(program), w, parameters, np.zeros(program.ranks))[position]
    state = memory.parameters + memory.gradients + memory.optimizer
    stages = activation_bytes(w, layers)
    if case.precision != "fp32" and widens_the_core(MODEL):
        core = w.tokens * MODEL.num_attention_heads * MODEL.v_head_dim * 2.0
        stages = [size + core * len(layers[stage]) for stage, size in enumerate(stages)]
    held = max(behind for _, behind in held_bytes(program, position, stages, deferred_bytes(w, layers)))
    being_sent = 4 * message_bytes(w)  # one in each channel; here that is memory shared with the peer, and no tensor
    return state + memory.buffers - being_sent + held


def test_ranks_hold_what_is_predicted() -> None:
    """Within 2 %, rank by rank: parameters, gradients and optimizer, and with them the most between two slots."""
    ranks = run_ranks(measured, 4, CASES)
    for rank, found in enumerate(ranks):
        for case, got in zip(CASES, found, strict=True):
            expected = predicted(case, case.layout.pipeline_index(rank))
            assert expected == pytest.approx(got, rel=0.02), (case, rank)
