"""Runs of several phases: what a ramp costs, and what runs where a batch is too small for the schedule."""

from dataclasses import replace
from itertools import pairwise

import pytest

from parallel.estimate.phases import LONGEST, RunPhase, price
from parallel.estimate.plan import make_plan
from tests.parallel.estimate.published import H800, RUN, smaller

LENGTH = 4096
ROOMY = replace(H800, memory_gb=500.0)


def test_a_phase_with_one_batch_costs_as_many_steps_as_its_tokens_fill() -> None:
    workload = smaller(microbatches=16)
    (priced,) = price([RunPhase("one", 1e12, LENGTH, (1024, 1024))], workload, ROOMY, RUN)
    plan = make_plan(workload, ROOMY, RUN)
    assert priced.gpu_hours == pytest.approx(plan.gpu_hours_per_trillion_tokens)
    (part,) = priced.parts
    assert (part.schedule, part.microbatches) == ("dualpipe", (16, 16))


def test_a_ramp_costs_what_its_many_small_steps_cost_together() -> None:
    """The closed form against a sum over batches, each with its own simulation."""
    (priced,) = price([RunPhase("ramp", 1e12, LENGTH, (512, 2048))], smaller(), ROOMY, RUN)
    numbers = range(8, 33, 2)
    plans = [make_plan(smaller(microbatches=m), ROOMY, RUN) for m in numbers]
    hours = [plan.gpu_hours_per_trillion_tokens for plan in plans]
    steps = [(a + b) / 2 for a, b in pairwise(hours)]
    assert priced.gpu_hours == pytest.approx(sum(steps) / len(steps), rel=0.02)


def test_a_batch_of_very_many_micro_batches_costs_what_its_own_simulation_says() -> None:
    many = 8 * LONGEST * smaller().layout.pipeline
    (priced,) = price([RunPhase("one", 1e12, LENGTH, (64 * many, 64 * many))], smaller(), ROOMY, RUN)
    plan = make_plan(smaller(microbatches=many), ROOMY, RUN)
    assert priced.gpu_hours == pytest.approx(plan.gpu_hours_per_trillion_tokens, rel=1e-4)


def test_below_two_micro_batches_a_rank_another_schedule_runs_until_dualpipe_can() -> None:
    (priced,) = price([RunPhase("ramp", 1e12, LENGTH, (256, 1024))], smaller(), ROOMY, RUN)
    low, high = priced.parts
    assert low.schedule != "dualpipe" and (low.microbatches, high.microbatches) == ((4, 8), (8, 16))
    assert high.schedule == "dualpipe" and low.tokens + high.tokens == pytest.approx(1e12)
    assert low.gpu_hours / low.tokens > high.gpu_hours / high.tokens


def test_a_longer_context_costs_its_larger_core_and_stated_hours_nothing_else() -> None:
    short, long, stated = price(
        [
            RunPhase("short", 1e12, LENGTH, (1024, 1024)),
            RunPhase("long", 1e12, 8 * LENGTH, (128, 128)),
            RunPhase("stated", gpu_hours=5000.0),
        ],
        smaller(microbatches=16),
        ROOMY,
        RUN,
    )
    assert stated.gpu_hours == 5000
    # Seven cores more at every layer, forward and 2.5 times back, of 61 layers on 4 ranks: they overlap with nothing.
    operations = 7 * 3.5 * LENGTH * 128 * (192 + 128)
    rate = H800.bf16_tflops * 1e12 * H800.computing_share
    at_most = operations * 61 / (rate * min(H800.attention_forward_efficiency, H800.attention_backward_efficiency))
    added = (long.gpu_hours - short.gpu_hours) * 3600 / 1e12
    assert 0.5 * at_most < added < 1.3 * at_most


def test_a_batch_that_leaves_replicas_idle_is_refused() -> None:
    with pytest.raises(ValueError, match="phase tiny: global_batch_size=8 must be at least"):
        price([RunPhase("tiny", 1e12, LENGTH, (8, 8))], smaller(), ROOMY, RUN)
