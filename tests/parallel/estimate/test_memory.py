"""Memory: parameters against the model's own count, activations against the bytes that the runtime keeps alive."""

import gc
from dataclasses import replace

import pytest
import torch

from dualpipe.program import Work
from model.config import ModelConfig
from model.exchange import LocalExchange
from model.linear import WeightGradients, own
from model.size import size
from model.transformer import Transformer, initialise
from parallel.estimate.memory import layer_activation_bytes, stage_parameters
from parallel.estimate.operations import Operations
from parallel.estimate.stages import stage_layers
from parallel.estimate.workload import Workload
from parallel.mesh import Layout
from parallel.stage import ModelStage, StepScale
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


def test_multi_token_prediction_adds_the_published_parameters() -> None:
    """11.6B without the embedding and the head, which are the main model's; the released file has copies of both."""
    layers = stage_layers(PUBLISHED, 16)
    each = [stage_parameters(Operations(replace(PUBLISHED, mtp=mtp), H800), layers) for mtp in (0, 1)]
    without, with_one = (sum(stage.dense + 64 * stage.routed for stage in stages) for stages in each)
    assert with_one - without == pytest.approx(11.6e9, rel=0.01)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("change", [{}, {"q_lora_rank": None}, {"v_head_dim": 48}, {"n_shared_experts": 2}])
def test_a_layer_keeps_what_is_predicted(layer: int, change: dict[str, int | None]) -> None:
    """Within 2 %, in FP32, where a CPU widens nothing. Layer 1 is dense, layer 2 has experts."""
    model = replace(SMALL, **change)
    workload = Workload(model, Layout(), "dualpipe", 256, 2, 1, "fp32", 4)
    predicted = layer_activation_bytes(workload, model.is_moe(layer))
    assert predicted == pytest.approx(_measured(model, layer), rel=0.02)


def _measured(config: ModelConfig, layer: int) -> int:
    """Bytes of all tensors that a forward of one layer leaves alive, without its output, which is sent away."""
    model = Transformer(config, [layer], range(config.n_routed_experts))
    initialise(model, seed=1)
    gradients = WeightGradients({p: torch.zeros_like(p) for p in model.parameters()})
    own(model, gradients)
    stage = ModelStage(model, gradients, LocalExchange(config.n_routed_experts), torch.device("cpu"))
    stage.begin({}, StepScale(512, 2), training=True)
    x_BSD = torch.randn(2, 256, config.hidden_size)
    model.rotations(256, x_BSD.device)
    before = {*_alive(), *(t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()))}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_BSD = stage.forward(Work(1, 0), x_BSD)
    assert y_BSD is not None
    kept = {**saved, **_alive(), x_BSD.untyped_storage().data_ptr(): x_BSD.untyped_storage().nbytes()}
    del kept[y_BSD.untyped_storage().data_ptr()]
    inputs = {x_BSD.untyped_storage().data_ptr()}
    return sum(size for place, size in kept.items() if place not in before or place in inputs)


def _alive() -> dict[int, int]:
    """Storages of the tensors that Python knows: place -> bytes."""
    gc.collect()
    storages = (o.untyped_storage() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
