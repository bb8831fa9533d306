"""The model of the tests: every part of the architecture, in sizes that take milliseconds."""

from dataclasses import replace
from typing import Any

from model.config import ModelConfig

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    initializer_range=0.1,
    balance_loss_alpha=0.01,
    bias_update_speed=0.01,
)


def tiny(**changes: Any) -> ModelConfig:
    return replace(TINY, **changes)
