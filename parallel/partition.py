"""Which layers make a stage: contiguous runs, balanced by what they cost.

A stage's cost is its layers' plus, at the two ends, the embedding's (nothing to compute) and the head's, with that of
multi-token prediction. The cut minimises the most expensive stage, because in a pipeline everyone waits for it; among
cuts with the same maximum the sum of squares decides, so that the rest is even too.
"""

from functools import cache
from itertools import pairwise
from math import inf

from model.config import ModelConfig


def layer_cost(config: ModelConfig, layer: int) -> float:
    """Multiplications a token makes in one layer: its active weight elements (attention scores are left out: they are
    the same in every layer)."""
    c = config
    heads = c.num_attention_heads
    if c.q_lora_rank is None:
        query = c.hidden_size * heads * c.qk_head_dim
    else:
        query = c.q_lora_rank * (c.hidden_size + heads * c.qk_head_dim)
    key_value = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim)
    key_value += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention = query + key_value + heads * c.v_head_dim * c.hidden_size
    if not c.is_moe(layer):
        return attention + 3 * c.hidden_size * c.intermediate_size
    experts = c.num_experts_per_tok + c.n_shared_experts
    return attention + 3 * c.hidden_size * c.moe_intermediate_size * experts + c.hidden_size * c.n_routed_experts


def end_cost(config: ModelConfig, modules: int) -> float:
    """The same behind the last layer: the head, and of each multi-token-prediction module its projection, its block and
    the head again."""
    head = config.hidden_size * config.vocab_size
    module = 2 * config.hidden_size**2 + layer_cost(config, config.num_hidden_layers) + head
    return head + modules * module


def partition(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage, in order; every stage has at least one.

    Raises ValueError, naming ``model.num_hidden_layers``, when there are fewer layers than stages.
    """
    layers = config.num_hidden_layers
    if layers < stages:
        raise ValueError(f"model.num_hidden_layers={layers} must be at least the number of stages ({stages})")
    costs = [layer_cost(config, layer) for layer in range(layers)]
    end_of_model = end_cost(config, config.num_nextn_predict_layers)

    def cost(first: int, end: int) -> float:
        return sum(costs[first:end]) + (end_of_model if end == layers else 0)

    @cache
    def largest(first: int, left: int) -> float:
        """The dearest of ``left`` stages for the layers from ``first`` on, at best."""
        if left == 1:
            return cost(first, layers)
        return min(max(cost(first, end), largest(end, left - 1)) for end in range(first + 1, layers - left + 2))

    # Only under the best maximum of the whole model can the rest be made even: a part's own best may be uneven.
    limit = largest(0, stages)

    @cache
    def evenest(first: int, left: int) -> tuple[float, int]:
        """(sum of squares, end of the first stage) of the same, with no stage above the limit."""
        ends = range(first + 1, layers - left + 2) if left > 1 else (layers,)
        options = [(inf, layers)]
        for end in ends:
            if (own := cost(first, end)) <= limit:
                options.append((own * own + (evenest(end, left - 1)[0] if left > 1 else 0), end))
        return min(options)

    cuts = [0]
    for left in range(stages, 0, -1):
        cuts.append(evenest(cuts[-1], left)[1])
    return [range(a, b) for a, b in pairwise(cuts)]
