"""Which layers of a model compute in FP8, with which recipe, and that the whole model then follows the wide one."""

import pytest
import torch
from torch import Tensor

from model.fp8.assign import AFTER_ATTENTION, COMBINED, DISPATCHED, PLAIN, recipes, set_precision
from model.fp8.gemm import Emulated, Reference
from model.linear import GroupedLinear, Linear
from model.transformer import Transformer, initialise
from tests.model.tiny import tiny


def whole(**changes: int) -> Transformer:
    """A model with tails everywhere: no width is a multiple of 128."""
    sizes = dict(hidden_size=72, intermediate_size=200, moe_intermediate_size=136, initializer_range=0.05)
    model = Transformer(tiny(**sizes, **changes))
    initialise(model, 1)
    return model


def test_which_layers_compute_in_fp8() -> None:
    found = recipes(whole())
    wide = {name for name, recipe in found.items() if recipe is None}
    assert wide == {"layers.1.router.centroids", "layers.2.router.centroids", "head"}
    assert found["layers.1.attn.o"] is AFTER_ATTENTION
    assert found["layers.1.experts.gate_up"] is DISPATCHED and found["layers.1.experts.down"] is COMBINED
    assert all(found[f"layers.0.{name}"] is PLAIN for name in ("attn.q_a", "attn.kv_b", "mlp.gate_up", "mlp.down"))
    assert len(found) == sum(isinstance(m, Linear | GroupedLinear) for m in whole().modules())


def test_a_layer_without_an_assignment_is_refused() -> None:
    model = whole()
    model.extra = Linear(8, 8)
    with pytest.raises(AssertionError, match="no precision is assigned to extra"):
        set_precision(model, Emulated())


def losses_and_gradients(model: Transformer, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens[:, :-1], tokens[:, 1:])
    return [loss.cross_entropy.detach(), *torch.autograd.grad(loss.cross_entropy, list(model.parameters()))]


TOKENS = torch.randint(0, 40, (4, 33), generator=torch.Generator().manual_seed(9))


def test_a_dense_model_in_fp8_follows_the_wide_one() -> None:
    # Roundings of .026 add up over three layers and back. With experts a rounded score also sends tokens elsewhere.
    model = whole(first_k_dense_replace=3)
    wide = losses_and_gradients(model, TOKENS)
    set_precision(model, Emulated())
    narrow = losses_and_gradients(model, TOKENS)
    assert narrow[0].item() == pytest.approx(wide[0].item(), rel=2e-3)
    for got, want in zip(narrow[1:], wide[1:], strict=True):
        assert 0.02 < ((got - want).norm() / want.norm()).item() < 0.3


def test_precision_can_be_set_and_taken_back() -> None:
    model = whole()
    wide = losses_and_gradients(model, TOKENS)
    set_precision(model, Emulated())
    narrow = losses_and_gradients(model, TOKENS)
    assert all(t.isfinite().all() for t in narrow) and narrow[0] != wide[0]
    assert all(torch.equal(a, b) for a, b in zip(losses_and_gradients(model, TOKENS), narrow, strict=True))
    set_precision(model, Reference())
    assert losses_and_gradients(model, TOKENS)[0].item() == pytest.approx(narrow[0].item(), rel=1e-4)
    set_precision(model, None)
    assert all(torch.equal(a, b) for a, b in zip(losses_and_gradients(model, TOKENS), wide, strict=True))
