"""The published form: which tensors there are, where they lie in ours, and what a config.json says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.huggingface import HuggingFaceError, is_left_out, model_config, published, published_config
from model.transformer import Transformer
from tests.model.tiny import tiny

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}
# What training adds, and a config.json knows nothing of.
OURS = {key: getattr(ModelConfig, key) for key in ("bias_update_speed", "balance_loss_alpha", "mtp_loss_weight")}

configs = st.builds(
    tiny,
    first_k_dense_replace=st.integers(0, 3),
    n_shared_experts=st.integers(1, 3),
    n_group=st.sampled_from([2, 4]),
    q_lora_rank=st.none() | st.integers(1, 20),
    v_head_dim=st.integers(1, 20),
    norm_topk_prob=st.booleans(),
    rope_theta=st.floats(2, 1e6),
    original_max_position_embeddings=st.integers(1, 10**5),
    yarn_factor=st.sampled_from([1.0, 2.5, 40.0]),
    yarn_mscale=st.sampled_from([0.0, 0.7, 1.0]),
    yarn_mscale_all_dim=st.sampled_from([0.0, 0.7, 1.0]),
    num_nextn_predict_layers=st.integers(0, 1),
)


@settings(deadline=None, max_examples=40)
@given(configs)
def test_published_tensors_cover_every_element_once(config: ModelConfig) -> None:
    tensors = list(published(config))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    with torch.device("meta"):
        model = Transformer(config)
    ours = {name: value.numel() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    ends: dict[str, int] = {}
    for tensor in tensors:
        assert tensor.offset == ends.get(tensor.parameter, 0), tensor  # in order, without a gap
        ends[tensor.parameter] = tensor.offset + tensor.numel
    assert ends == ours
    assert {t.parameter for t in tensors if t.is_bias} == {name for name, _ in model.named_buffers()}


@settings(deadline=None, max_examples=60)
@given(configs)
def test_a_configuration_comes_back_from_its_published_form(config: ModelConfig) -> None:
    values = published_config(config, "bfloat16", SPECIAL)
    expected = replace(config, **OURS)
    if config.yarn is None:  # constants without effect are not written
        expected = replace(expected, yarn_mscale=1.0, yarn_mscale_all_dim=1.0)
    assert model_config(values) == expected
    assert values["max_position_embeddings"] == round(config.original_max_position_embeddings * config.yarn_factor)


def values_of(**changes: Any) -> dict[str, Any]:
    return {**published_config(tiny(yarn_factor=40.0), "bfloat16", SPECIAL), **changes}


def test_position_as_transformers_5_writes_it() -> None:
    old = values_of()
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    scaling = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    scaling["rope_type"] = scaling.pop("type")
    assert model_config({**new, "rope_parameters": scaling}) == model_config(old)
    plain = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert model_config(plain).yarn is None and model_config(plain).rope_theta == 500.0


def test_scales_that_a_file_does_not_give_are_those_of_transformers() -> None:
    scaling = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}
    config = model_config(values_of(rope_scaling=scaling))
    assert config.yarn is not None
    assert (config.yarn.beta_fast, config.yarn.beta_slow) == (32, 1)
    assert config.yarn.rotation_scale == pytest.approx(0.1 * 2.0794415 + 1)
    assert config.softmax_scale == config.qk_head_dim**-0.5


def test_what_deepseek_adds_is_no_obstacle() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    values = values_of(quantization_config=fp8, auto_map={}, ep_size=1, seq_aux=True)
    assert model_config(values) == model_config(values_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v2"}, "model_type='deepseek_v2' must be 'deepseek_v3'"),
        ({"model_type": None}, "model_type=None must be 'deepseek_v3'"),
        ({"rope_interleave": False}, "rope_interleave=False must be True"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' must be 'sigmoid'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 must be 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True must be False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
        ({"hidden_size": "16"}, "hidden_size='16' must be an integer"),
        ({"num_nextn_predict_layers": 2}, "model.num_nextn_predict_layers=2 must be 0 or 1"),
        ({"hidden_size": 20}, "model.hidden_size=20 must be a multiple of 8"),
        ({"n_group": True}, "n_group=True must be an integer"),
        ({"q_lora_rank": 1.5}, "q_lora_rank=1.5 must be an integer"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type='linear' must be 'yarn' or 'default'"),
        ({"rope_scaling": 3}, "rope_scaling=3 must be an object or null"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings is missing"),
        (
            {"rope_scaling": {**values_of()["rope_scaling"], "attention_factor": 2.0}},
            "rope_scaling.attention_factor must be absent",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq' must be 'fp8'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"quantization_config.weight_block_size=\[64, 64\] must be \[128, 128\]",
        ),
    ],
)
def test_another_model_is_refused_by_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HuggingFaceError, match=message):
        model_config(values_of(**changes))


@pytest.mark.parametrize("key", ["hidden_size", "q_lora_rank", "n_routed_experts", "max_position_embeddings"])
def test_a_missing_key_is_named(key: str) -> None:
    values = values_of(rope_scaling=None)
    del values[key]
    with pytest.raises(HuggingFaceError, match=f"{key} is missing and must be an integer"):
        model_config(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_shared_experts": 0}, "model.n_shared_experts=0 must be at least 1"),
        ({"n_group": 8, "topk_group": 4}, "model.n_group=8 must leave each group two of the 8 experts"),
    ],
)
def test_a_model_that_others_cannot_run_is_not_published(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HuggingFaceError, match=message):
        published_config(tiny(**changes), "bfloat16", SPECIAL)


@pytest.mark.parametrize(
    ("name", "modules", "left_out"),
    [
        ("model.layers.3.eh_proj.weight", 1, True),
        ("model.layers.4.eh_proj.weight", 1, False),
        ("model.layers.3.eh_proj.weight", 0, False),
        ("model.layers.30.eh_proj.weight", 1, False),
        ("model.layers.2.eh_proj.weight", 1, False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", 0, True),
    ],
)
def test_only_later_modules_and_frequencies_are_left_out(name: str, modules: int, left_out: bool) -> None:
    assert is_left_out(name, tiny(), modules) is left_out
