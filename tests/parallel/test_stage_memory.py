"""What a stage holds of a micro-batch is gone as soon as nothing needs it."""

import gc
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dualpipe.program import Work
from model.exchange import LocalExchange, Pending
from model.mlp import MLP, Experts
from model.norm import RMSNorm
from tests.model.tiny import tiny
from tests.parallel.test_stage import SCALE, backward_input, batch, forward, staged


def watch_inputs(model: nn.Module, *kinds: type[nn.Module]) -> list[StorageWeakRef]:
    """Fills with the memory of the inputs of such modules while they run."""
    watched: list[StorageWeakRef] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        watched.append(StorageWeakRef(inputs[0].untyped_storage()))

    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(hook)
    return watched


def test_a_freed_micro_batch_leaves_nothing_behind() -> None:
    config = tiny()
    stages, _ = staged(config)
    stages[0].begin(batch(config), SCALE, training=True)

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def run(m: int) -> list[StorageWeakRef]:
        watched = watch_inputs(stages[0].model, RMSNorm, MLP, Experts)
        forward(stages, m)
        assert not any(ref.expired() for ref in watched)
        stages[0].backward(Work(0, m), None)
        stages[0].free(Work(0, m))
        return watched

    gc.collect()
    gc.disable()  # what only the cycle collector frees would stay through a step
    try:
        first = run(0)
        before = tensors()
        second = run(1)
        after = tensors()
    finally:
        gc.enable()
    assert first and all(ref.expired() for ref in first + second)
    assert after == before


def test_what_only_the_input_gradients_need_is_gone_before_w() -> None:
    config = tiny()
    stages, _ = staged(config)
    stages[0].begin(batch(config), SCALE, training=True)
    # No linear layer reads the residual stream itself, or a latent; each reads a normalised copy.
    watched = watch_inputs(stages[0].model, RMSNorm)
    forward(stages, 0)
    assert len(watched) == 1 + 4 * config.num_hidden_layers and not any(ref.expired() for ref in watched)
    gc.disable()
    try:
        backward_input(stages, 0)
        assert all(ref.expired() for ref in watched)
    finally:
        gc.enable()


def test_what_the_experts_computed_is_gone_once_it_was_sent() -> None:
    """K rows a token would otherwise stay until the backward, only to hold on to their graph."""
    config = tiny(num_hidden_layers=2, first_k_dense_replace=0)
    stages, _ = staged(config)
    watched: list[StorageWeakRef] = []

    class Watching(LocalExchange):
        def combine(self, y_RD: Tensor, layout: Any) -> Pending[Tensor]:
            watched.append(StorageWeakRef(y_RD.untyped_storage()))
            return super().combine(y_RD, layout)

    stages[0].exchange = Watching(config.n_routed_experts)
    stages[0].begin(batch(config), SCALE, training=True)
    gc.disable()
    try:
        forward(stages, 0)
        assert [ref.expired() for ref in watched] == [True, True]
    finally:
        gc.enable()
    stages[0].backward(Work(0, 0), None)
