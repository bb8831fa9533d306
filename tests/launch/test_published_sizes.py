"""The configurations of published models are what they say they are."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.config import ConfigError, load
from model.config import ModelConfig
from model.size import size
from parallel.mesh import Layout

CONFIGS = Path(__file__).parents[2] / "configs"
RAMP = "phases.global_batch_size=[{until: 469B tokens, shape: linear, start: 3072, end: 15360}]"


def test_deepseek_v3_is_the_report_s_model_on_the_report_s_layout() -> None:
    config = load(CONFIGS / "deepseek-v3.yaml")
    assert config.model == ModelConfig(num_nextn_predict_layers=1, recompute=("norm", "mla_up", "swiglu"))
    assert str(size(config.model)) == (
        "671.0B parameters, 36.6B of them active for a token; 11.6B more for multi-token prediction"
    )
    assert config.layout == Layout(pipeline=16, data=128, expert=64) and config.layout.world_size == 2048
    assert config.microbatches == 120
    values = config.values()
    assert values.batches.tokens_before(config.train.steps) == pytest.approx(14.8e12, rel=1e-5)
    assert values.at(0).global_batch_size == 4096 and values.at(config.train.steps - 1).learning_rate == 7.3e-6
    early = load(CONFIGS / "deepseek-v3.yaml", ["layout.data=64", RAMP])
    assert early.values().at(0).global_batch_size == 3072
    with pytest.raises(ConfigError, match=r"gives step 1 3072 sequences: .* = 24 must .* \(32\)"):
        load(CONFIGS / "deepseek-v3.yaml", [RAMP])


def test_deepseek_v2_lite_has_its_size_under_the_newer_router() -> None:
    config = load(CONFIGS / "deepseek-v2-lite.yaml")
    assert size(config.model).total == 15_706_484_224 + 26 * 64  # as published, and a bias for each expert
    same_size = replace(config.model, norm_topk_prob=False, routed_scaling_factor=1.0)
    assert size(same_size) == size(config.model)


def test_moe_1b_is_a_billion_parameters_of_which_a_token_uses_a_quarter() -> None:
    found = size(load(CONFIGS / "moe-1b.yaml").model)
    assert str(found) == ("909.7M parameters, 215.5M of them active for a token; 57.2M more for multi-token prediction")
