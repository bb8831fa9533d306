"""The layer that the overlap benchmark times, and what it compares."""

import time

import pytest
import torch
from torch import nn

from benchmarks.overlap import main
from benchmarks.overlap_ranks import in_turn
from benchmarks.overlap_stage import TimedBlock
from dualpipe.cost import PHASES, Costs
from dualpipe.lower import lower
from dualpipe.overlap import F, I, Phase, W
from dualpipe.schedules import generate
from dualpipe.simulate import simulate
from model.exchange import LocalExchange
from model.linear import WeightGradients
from model.router import Routing
from parallel.layer import LayerBackward, LayerForward

PHASES_S = {part: 0.01 for part in PHASES.values()}


def seconds(call: object, *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start


def test_a_timed_layer_waits_in_its_own_phases_only() -> None:
    weight = nn.Parameter(torch.zeros(1))
    gradients = WeightGradients({weight: torch.zeros(1)})
    routing = Routing(torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2), torch.zeros(()))
    block = TimedBlock({**PHASES_S, (Phase.MLP, W): 0.05}, routing, gradients, weight)
    exchange, x = LocalExchange(4), torch.randn(1, 2, 8)
    forward = LayerForward(block, exchange, None, lambda *_: None, x)  # type: ignore[arg-type]
    for phase in (Phase.ATTENTION, Phase.MLP):
        if phase is Phase.MLP:
            forward.run(Phase.DISPATCH)
        assert seconds(forward.run, phase) >= 0.01
    forward.run(Phase.COMBINE)
    assert forward.finish().shape == x.shape
    backward = LayerBackward(forward.kept, exchange, gradients, torch.zeros(()), x)
    backward.run(Phase.COMBINE, I)
    assert seconds(backward.run, Phase.MLP, I) >= 0.01
    backward.run(Phase.DISPATCH, I)
    assert seconds(backward.run, Phase.ATTENTION, I) >= 0.01
    assert seconds(backward.run, Phase.MLP, W) >= 0.05, "and not in the input gradient before"
    assert seconds(backward.run, Phase.ATTENTION, W) >= 0.01


def test_an_overlapped_step_costs_about_its_computation_and_the_halves_in_turn_more() -> None:
    costs = Costs(layers=1, phases={part: 0.5 if part[1] is W or part == (Phase.MLP, F) else 1.0 for part in PHASES_S})
    program = lower(generate("dualpipe", 2, 8))
    overlapped, turns = (simulate(program, of).makespan for of in (costs, in_turn(costs)))
    assert turns > 1.3 * overlapped


@pytest.mark.parametrize("given", ["5", "2"])
def test_sizes_that_the_schedule_refuses_are_named(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--microbatches", given]) == 2
    assert capsys.readouterr().err == f"error: --microbatches={given} must be even and at least 4\n"
