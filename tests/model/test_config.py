"""Sizes that do not fit together are refused, by the key that has to change."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from model.config import LARGEST, ModelConfig
from tests.model.tiny import tiny

SIZES = (
    "vocab_size hidden_size num_hidden_layers intermediate_size moe_intermediate_size n_routed_experts "
    "num_experts_per_tok n_group topk_group num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim q_lora_rank"
).split()


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_at_least_one(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{key}={value} must be at least 1"):
        tiny(**{key: value})


@pytest.mark.parametrize("key", [*SIZES, "original_max_position_embeddings"])
def test_a_size_beyond_all_models_is_refused_before_anything_is_computed_with_it(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{key}={2**40} must be at most \d+$"):
        tiny(**{key: 2**40})


def test_every_number_is_one_that_fp32_has_with_its_square() -> None:
    numbers = [leaf.name for leaf in fields(ModelConfig) if leaf.type is float]
    assert len(numbers) == 12
    for key in numbers:
        with pytest.raises(ValueError, match=rf"^model\.{key}=1e\+39 must be at most 1\.153e\+18$"):
            tiny(**{key: 1e39})
    most = dict(yarn_factor=LARGEST, yarn_mscale=0.0, yarn_mscale_all_dim=LARGEST)
    assert tiny(**most).softmax_scale < torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"qk_rope_head_dim": 5}, r"^model\.qk_rope_head_dim=5 must be even"),
        ({"first_k_dense_replace": -1}, r"^model\.first_k_dense_replace=-1 .* 0 to num_hidden_layers \(3\)"),
        ({"first_k_dense_replace": 4}, r"^model\.first_k_dense_replace=4 .* 0 to num_hidden_layers \(3\)"),
        ({"n_shared_experts": -1}, r"^model\.n_shared_experts=-1 must not be negative"),
        ({"n_group": 3}, r"^model\.n_group=3 must divide n_routed_experts \(8\)"),
        ({"topk_group": 5}, r"^model\.topk_group=5 must be at most n_group \(4\)"),
        ({"num_experts_per_tok": 5}, r"^model\.num_experts_per_tok=5 must be at most .* \(4\)"),
        ({"routed_scaling_factor": 0.0}, r"^model\.routed_scaling_factor=0\.0 must be above 0"),
        ({"routed_scaling_factor": 1e-46}, r"^model\.routed_scaling_factor=1e-46 must be above 0: at least 1\.175e-38"),
        ({"n_shared_experts": 2**17}, r"^model\.n_shared_experts=131072 must be at most 65536"),
        ({"rope_theta": 1.0}, r"model\.rope_theta"),
        ({"rms_norm_eps": 0.0}, r"model\.rms_norm_eps"),
        ({"initializer_range": 0.0}, r"model\.initializer_range"),
        ({"bias_update_speed": -0.1}, r"model\.bias_update_speed"),
        ({"balance_loss_alpha": -0.1}, r"model\.balance_loss_alpha"),
        ({"mtp_loss_weight": -0.1}, r"^model\.mtp_loss_weight=-0\.1 must not be negative"),
        ({"num_nextn_predict_layers": 2}, r"^model\.num_nextn_predict_layers=2 must be 0 or 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("key", ["hidden_size", "moe_intermediate_size"])
def test_widths_that_the_grouped_product_cannot_take_are_refused(key: str) -> None:
    # F.grouped_mm wants rows of whole 16 bytes: 4 elements in FP32, 8 in BF16.
    with pytest.raises(ValueError, match=rf"^model\.{key}=18 must be a multiple of 8"):
        tiny(**{key: 18})


def test_the_edges_are_allowed() -> None:
    tiny(num_experts_per_tok=4, first_k_dense_replace=0, n_shared_experts=0, q_lora_rank=None)
    tiny(first_k_dense_replace=3, n_group=8, topk_group=8, num_experts_per_tok=8)


def test_the_defaults_are_deepseek_v3() -> None:
    config = ModelConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.qk_head_dim) == (61, 7168, 192)
    assert [layer for layer in range(61) if not config.is_moe(layer)] == [0, 1, 2]
