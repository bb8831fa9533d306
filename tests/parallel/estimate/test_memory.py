"""Memory: parameters against the model's own count, activations against the bytes that the runtime keeps alive."""

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recompute import kept_bytes
from model import filling
from model.config import ModelConfig, Recompute
from model.size import size
from parallel.estimate.memory import active_parameters, layer_activation_bytes, stage_parameters
from parallel.estimate.operations import Operations
from parallel.estimate.stages import stage_layers
from parallel.estimate.workload import Workload
from parallel.mesh import Layout
from tests.parallel.estimate.cpu import widens_the_core
from tests.parallel.estimate.published import H800, PUBLISHED

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_hidden_layers=4,
    first_k_dense_replace=2,
    intermediate_size=768,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
)


@pytest.mark.parametrize("expert", [1, 64])
def test_parameters_are_those_of_the_model(expert: int) -> None:
    workload = replace(PUBLISHED, mtp=0, layout=Layout(pipeline=16, data=128, expert=expert))
    stages = stage_parameters(Operations(workload, H800), stage_layers(workload, 16))
    biases = 58 * 256  # of the routers: no gradient, no optimizer state
    assert sum(stage.dense + expert * stage.routed for stage in stages) == size(workload.model).total - biases


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2), st.sampled_from([None, 24]), st.integers(1, 4), st.integers(0, 1))
def test_active_parameters_are_those_of_the_model(
    dense: int, shared: int, q_rank: int | None, k: int, mtp: int
) -> None:
    changes = dict(first_k_dense_replace=dense, n_shared_experts=shared, q_lora_rank=q_rank, num_experts_per_tok=k)
    model = replace(PUBLISHED.model, num_hidden_layers=3, n_routed_experts=8, n_group=1, topk_group=1, **changes)
    workload = replace(PUBLISHED, model=model, mtp=mtp, layout=Layout(pipeline=1, data=4, expert=4))
    assert active_parameters(Operations(workload, H800)) == size(model).active


def test_multi_token_prediction_adds_the_published_parameters() -> None:
    """11.6B without the embedding and the head, which are the main model's; the released file has copies of both."""
    layers = stage_layers(PUBLISHED, 16)
    each = [stage_parameters(Operations(replace(PUBLISHED, mtp=mtp), H800), layers) for mtp in (0, 1)]
    without, with_one = (sum(stage.dense + 64 * stage.routed for stage in stages) for stages in each)
    assert with_one - without == pytest.approx(11.6e9, rel=0.01)


SELECTIVE: Recompute = ("norm", "mla_up", "swiglu")


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("change", "policy"),
    [({}, policy) for policy in ((), ("norm",), ("mla_up",), ("swiglu",), SELECTIVE, "full")]
    + [({"q_lora_rank": None}, ()), ({"v_head_dim": 48}, SELECTIVE), ({"n_shared_experts": 2}, "full")],
)
def test_a_layer_keeps_what_is_predicted(layer: int, change: dict[str, int | None], policy: Recompute) -> None:
    """Within 2 %, in FP32, where a CPU widens nothing. Layer 1 is dense, layer 2 has experts."""
    model = replace(SMALL, recompute=policy, **change)  # type: ignore[arg-type]
    workload = Workload(model, Layout(), "dualpipe", 256, 2, 1, "fp32", 4)
    predicted = layer_activation_bytes(workload, model.is_moe(layer))
    assert predicted == pytest.approx(kept_bytes(model, layer, "fp32", 256, 2), rel=0.02)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("policy", [("mla_up",), SELECTIVE])
def test_a_layer_in_a_narrow_format_saves_what_is_predicted(
    layer: int, precision: Literal["bf16", "fp8"], policy: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is what the attention core keeps, which a CPU may run in FP32: twice of it for BF16. A CPU that fills
    the rows of experts up keeps those in excess too; here there are none."""
    monkeypatch.setattr(filling, "GROUP_ROWS", 1)
    model = replace(SMALL, recompute=policy)
    workload = Workload(model, Layout(), "dualpipe", 256, 2, 1, precision, 4)
    predicted = layer_activation_bytes(workload, model.is_moe(layer))
    if widens_the_core(model):
        predicted += 512 * model.num_attention_heads * model.v_head_dim * 2
    assert predicted == pytest.approx(kept_bytes(model, layer, precision, 256, 2), rel=0.02)
