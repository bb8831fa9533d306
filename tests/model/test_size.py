"""Counts of published models, made without memory."""

from model.config import ModelConfig
from model.size import size
from tests.model.tiny import tiny

V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    num_attention_heads=16,
    q_lora_rank=None,
)


def test_deepseek_v3_has_671_billion_of_which_a_token_uses_37() -> None:
    found = size(ModelConfig())
    assert found.total == 671_026_419_200  # as published, with a bias for each of 58 x 256 experts
    # The model card's 36.6 billion count the output head and not the embedding.
    assert round(found.active / 1e8) == 366
    assert str(found) == "671.0B parameters, 36.6B of them active for a token"


def test_deepseek_v3s_multi_token_prediction_counts_beside_the_671_billion() -> None:
    found, without = size(ModelConfig(num_nextn_predict_layers=1)), size(ModelConfig())
    assert (found.total, found.active) == (without.total, without.active)
    # Without the embedding and the head, which are the main model's, and of which the released files hold copies.
    assert round(found.mtp / 1e8) == 116
    block = size(ModelConfig(num_hidden_layers=62)).total - without.total
    assert found.mtp == block + 2 * 7168 * 7168 + 3 * 7168
    assert str(found).endswith("; 11.6B more for multi-token prediction")


def test_deepseek_v2_lite_has_15_7_billion() -> None:
    assert size(V2_LITE).total == 15_706_484_224 + 26 * 64  # as published, and our biases


def test_active_leaves_out_the_experts_that_a_token_does_not_use() -> None:
    few, all_ = size(tiny(num_experts_per_tok=1)), size(tiny(num_experts_per_tok=4))
    assert few.total == all_.total
    layers, expert = 2, 3 * 16 * 8
    assert all_.active - few.active == 3 * layers * expert
