"""Layers to stages: contiguous, none empty, and no cut with a cheaper dearest stage exists."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.block import Block
from model.config import ModelConfig
from parallel.partition import layer_cost, partition
from tests.model.tiny import tiny


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model whose layers and head cost more or less alike, and a number of stages."""
    layers = draw(st.integers(1, 9))
    config = tiny(
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        intermediate_size=draw(st.integers(1, 200)),
        vocab_size=draw(st.integers(1, 1000)),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
    )
    return config, draw(st.integers(1, layers))


def stage_costs(config: ModelConfig, stages: list[range]) -> list[float]:
    costs = [sum(layer_cost(config, layer) for layer in stage) for stage in stages]
    costs[-1] += config.hidden_size * config.vocab_size
    if config.num_nextn_predict_layers:
        costs[-1] += 2 * config.hidden_size**2 + layer_cost(config, config.num_hidden_layers)
        costs[-1] += config.hidden_size * config.vocab_size
    return costs


@settings(deadline=None, max_examples=200)
@given(cuts())
def test_the_best_of_all_cuts(cut: tuple[ModelConfig, int]) -> None:
    config, number = cut
    layers = config.num_hidden_layers
    stages = partition(config, number)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert len(stages) == number and all(stages)

    def rank(stages: list[range]) -> tuple[float, float]:
        costs = stage_costs(config, stages)
        return max(costs), sum(c * c for c in costs)

    every = [
        [range(a, b) for a, b in pairwise([0, *inner, layers])] for inner in combinations(range(1, layers), number - 1)
    ]
    assert rank(stages) == min(map(rank, every))


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.num_hidden_layers=3 must be at least the number of stages \(4\)"):
        partition(tiny(num_hidden_layers=3), 4)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 0}, {"n_shared_experts": 2}])
def test_a_layer_costs_the_weights_that_a_token_meets(changes: dict[str, int | None]) -> None:
    config = tiny(**changes)
    for layer in range(config.num_hidden_layers):
        met = 0
        for name, parameter in Block(config, layer, range(config.n_routed_experts)).named_parameters():
            if parameter.ndim == 2:
                met += parameter.numel()
            elif name.startswith("experts."):
                met += parameter[0].numel() * config.num_experts_per_tok
        assert layer_cost(config, layer) == met
