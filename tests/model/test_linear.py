"""The split backward is plain autograd's, at another time: input gradients at once, weight gradients when applied."""

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import model.linear
from model.linear import Embedding, GroupedLinear, Linear, WeightGradients, own

BF16 = 2.0**-8
"""Half a unit in the last place of BF16, relative: what one rounding may change."""
FP32 = 1e-5
seeds = st.integers(0, 2**31)


def filled(module: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def owned(module: nn.Module) -> tuple[WeightGradients, Tensor]:
    """Give the module's one weight a buffer: (its owner, the buffer)."""
    buffer = torch.zeros(module.weight.shape)
    owner = WeightGradients({module.weight: buffer})
    own(module, owner)
    return owner, buffer


def split(module: nn.Module, x: Tensor, gy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gx, gW) with an owner."""
    owner, buffer = owned(module)
    x = x.detach().requires_grad_()
    y = module(x, *rest)
    (gx,) = torch.autograd.grad(y, x, gy)
    owner.apply(owner.take())
    own(module, None)
    return y.detach(), gx, buffer


def plain(module: nn.Module, x: Tensor, gy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gx, gW) by autograd, in FP64."""
    x = x.detach().double().requires_grad_()
    weight = module.weight.detach().double().requires_grad_()
    if isinstance(module, GroupedLinear):
        starts = [0, *rest[0].tolist()]
        y = torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weight, strict=False)])
    else:
        y = x @ weight.T
    gx, gw = torch.autograd.grad(y, [x, weight], gy.double())
    return y.detach(), gx, gw


def assert_near(got: Tensor, exact: Tensor, rounding: float = 0.0) -> None:
    """Within FP32's error of a short sum of terms of order one, however they cancel, and one rounding of the result to
    a narrower format."""
    tolerance = FP32 * max(1.0, exact.abs().max().item()) if exact.numel() else 0.0
    torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=tolerance)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9), seeds)
def test_linear(leading: list[int], inputs: int, outputs: int, seed: int) -> None:
    layer = filled(Linear(inputs, outputs), seed)
    x, gy = torch.randn(*leading, inputs), torch.randn(*leading, outputs)
    for got, exact in zip(split(layer, x, gy), plain(layer, x, gy), strict=True):
        assert_near(got, exact)
    torch.testing.assert_close(split(layer, x, gy)[0], layer(x), rtol=FP32, atol=FP32)


rows_by_expert = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@settings(deadline=None)
@given(rows_by_expert, st.integers(1, 3), st.integers(1, 3), seeds)
def test_grouped_linear(rows: list[int], inputs: int, outputs: int, seed: int) -> None:
    layer = filled(GroupedLinear(len(rows), 4 * inputs, 4 * outputs), seed)
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    x, gy = torch.randn(sum(rows), 4 * inputs), torch.randn(sum(rows), 4 * outputs)
    for got, exact in zip(split(layer, x, gy, ends), plain(layer, x, gy, ends), strict=True):
        assert_near(got, exact)
    torch.testing.assert_close(split(layer, x, gy, ends)[0], layer(x, ends), rtol=FP32, atol=FP32)


@pytest.mark.parametrize("rows", [[0, 0, 0], [0], [7], [0, 4, 0, 0, 2, 0]])
def test_experts_without_rows_give_zeros(rows: list[int]) -> None:
    layer = filled(GroupedLinear(len(rows), 8, 4), seed=1)
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    x, gy = torch.randn(sum(rows), 8), torch.randn(sum(rows), 4)
    results = split(layer, x, gy, ends)
    for got, exact in zip(results, plain(layer, x, gy, ends), strict=True):
        assert_near(got, exact)
    for expert, count in enumerate(rows):
        assert results[2][expert].any() == (count > 0)


def test_a_gradient_that_autograd_expanded_is_taken_as_it_is() -> None:
    # The gradient of a sum is one number seen everywhere, with strides of 0.
    layer = filled(GroupedLinear(2, 8, 4), seed=2)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    x = torch.randn(3, 8)
    gy = torch.ones(1, 1).expand(3, 4)
    for got, exact in zip(split(layer, x, gy, ends), plain(layer, x, gy, ends), strict=True):
        assert_near(got, exact)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
def test_embedding(tokens: list[int], dtype: torch.dtype, seed: int) -> None:
    table = filled(Embedding(7, 5), seed).to(dtype)
    owner, buffer = owned(table)
    numbers = torch.tensor(tokens).view(1, -1)
    gy = torch.randn(1, len(tokens), 5, dtype=dtype)
    y = table(numbers)
    y.backward(gy)
    exact = torch.zeros(7, 5, dtype=torch.float64)
    for place, token in enumerate(tokens):
        assert torch.equal(y[0, place], table.weight[token])
        exact[token] += gy[0, place].double()
    assert_near(buffer, exact)
    assert owner.take() == []


def test_an_embedding_on_a_gpu_adds_in_an_order_that_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """There ``index_add_`` has none. A CPU that calls itself a GPU shows which sum is taken, and that it is the sum."""
    table = filled(Embedding(3, 5), 4)
    _, buffer = owned(table)
    numbers, gy = torch.tensor([[2, 0, 2, 2]]), torch.randn(1, 4, 5)
    y = table(numbers)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "index_add_", None)
    y.backward(gy)
    assert_near(buffer, torch.stack([gy[0, 1], torch.zeros(5), gy[0, [0, 2, 3]].sum(0)]).double())


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_bf16_rounds_its_results_and_nothing_else(kind: str, widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both ways to multiply BF16: its operands widened to FP32, and as the device does it.
    monkeypatch.setattr(model.linear, "_slow_bf16", lambda device_type: widened)
    for seed in range(10):
        module = Linear(16, 8) if kind == "linear" else GroupedLinear(3, 16, 8)
        layer = filled(module, seed).bfloat16()
        rest = () if kind == "linear" else (torch.tensor([4, 4, 12], dtype=torch.int32),)
        x, gy = torch.randn(12, 16).bfloat16(), torch.randn(12, 8).bfloat16()
        y, gx, gw = split(layer, x, gy, *rest)
        exact_y, exact_gx, exact_gw = plain(layer, x, gy, *rest)
        assert (y.dtype, gx.dtype, gw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert_near(y, exact_y, BF16)
        assert_near(gx, exact_gx, BF16)
        assert_near(gw, exact_gw, 0 if widened else BF16)


@pytest.mark.parametrize("with_owner", [True, False])
def test_a_bf16_weight_serves_an_fp32_input_exactly(with_owner: bool) -> None:
    # The router's gate: FP32 arithmetic whatever the parameters are kept in.
    layer = filled(Linear(12, 6), seed=3).bfloat16()
    x, gy = torch.randn(5, 12), torch.randn(5, 6)
    exact = plain(layer, x, gy)
    if with_owner:
        for got, want in zip(split(layer, x, gy), exact, strict=True):
            assert got.dtype == torch.float32
            assert_near(got, want)
    else:
        assert layer(x).dtype == torch.float32
        assert_near(layer(x).detach(), exact[0])


def feed_linear(layer: nn.Module) -> Tensor:
    return layer(torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True))


def feed_grouped(layer: nn.Module) -> Tensor:
    ends = torch.tensor([0, 1], dtype=torch.int32)
    return layer(torch.ones(1, 8, dtype=torch.bfloat16, requires_grad=True), ends)


def feed_embedding(layer: nn.Module) -> Tensor:
    return layer(torch.tensor([3]))


@pytest.mark.parametrize(
    "make,feed,where",
    [
        (lambda: Linear(4, 4), feed_linear, slice(None)),
        (lambda: GroupedLinear(2, 8, 8), feed_grouped, 1),
        (lambda: Embedding(5, 4), feed_embedding, 3),
    ],
    ids=["linear", "grouped", "embedding"],
)
def test_micro_batches_add_up_in_fp32(
    make: Callable[[], nn.Module], feed: Callable[[nn.Module], Tensor], where: int | slice
) -> None:
    # In BF16 256 + 1 is 256, so a sum of ones would stop there.
    layer = filled(make(), seed=4).bfloat16()
    owner, buffer = owned(layer)
    for _ in range(300):
        y = feed(layer)
        y.backward(torch.ones_like(y))
        owner.apply(owner.take())
    assert torch.equal(buffer[where], torch.full_like(buffer[where], 300.0))
    assert buffer.sum() == buffer[where].sum()


def test_no_weight_gradient_appears_before_it_is_applied() -> None:
    linear, grouped = filled(Linear(8, 8), seed=5), filled(GroupedLinear(2, 8, 8), seed=6)
    buffers = {linear.weight: torch.zeros(8, 8), grouped.weight: torch.zeros(2, 8, 8)}
    owner = WeightGradients(buffers)
    own(linear, owner)
    own(grouped, owner)
    ends = torch.tensor([2, 3], dtype=torch.int32)
    deferred, inputs = [], [torch.randn(3, 8, requires_grad=True) for _ in range(2)]
    for x in inputs:
        y = grouped(linear(x), ends)
        y.backward(torch.ones_like(y))
        deferred.append(owner.take())
        assert x.grad is not None and x.grad.any()
    assert owner.take() == []
    for buffer in buffers.values():
        assert not buffer.any()

    # The second micro-batch's W comes first; each adds what it deferred and no more.
    alone = {}
    for order, which in enumerate((1, 0)):
        before = {p: b.clone() for p, b in buffers.items()}
        owner.apply(deferred[which])
        alone[which] = {p: b - before[p] for p, b in buffers.items()}
        assert all(part.any() for part in alone[which].values()), order
    for which, x in enumerate(inputs):
        own(linear, None)
        own(grouped, None)
        y = grouped(linear(x.detach()), ends)
        exact = torch.autograd.grad(y, list(buffers), torch.ones_like(y))
        for parameter, gradient in zip(buffers, exact, strict=True):
            torch.testing.assert_close(alone[which][parameter], gradient, rtol=FP32, atol=FP32)
    assert linear.weight.grad is None and grouped.weight.grad is None


def test_an_input_that_needs_no_gradient_still_gives_the_weights_theirs() -> None:
    layer = filled(Linear(6, 4), seed=7)
    owner, buffer = owned(layer)
    x, gy = torch.randn(3, 6), torch.randn(3, 4)
    layer(x).backward(gy)
    owner.apply(owner.take())
    torch.testing.assert_close(buffer, gy.T @ x, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_what_a_micro_batch_kept_is_gone_after_its_weight_gradients(kind: str) -> None:
    layer = filled(Linear(8, 8) if kind == "linear" else GroupedLinear(2, 8, 8), seed=8)
    rest = () if kind == "linear" else (torch.tensor([1, 3], dtype=torch.int32),)
    owner, buffer = owned(layer)

    def one_round() -> tuple[list[StorageWeakRef], int]:
        x, gy = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
        watched = [StorageWeakRef(t.untyped_storage()) for t in (x, gy)]
        y = layer(x, *rest)
        y.backward(gy)
        del x, gy, y
        collected = owner.take()
        assert not watched[0].expired(), "W needs the input"
        owner.apply(collected)
        del collected
        return watched, sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()  # what only the cycle collector frees would stay through a step
    try:
        first, tensors = one_round()
        second, tensors_again = one_round()
    finally:
        gc.enable()
    assert all(ref.expired() for ref in first + second)
    assert tensors_again == tensors
    assert buffer.grad_fn is None and not buffer.requires_grad


class Doubled:
    """``Products`` that shows what it was asked for: twice the layer, and nothing for the owner."""

    def linear(
        self,
        x: Tensor,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        payload: object | None = None,
        again: object | None = None,
    ) -> Tensor:
        self.asked = weight, owner, ends_E, payload
        rows = x if payload is None else payload
        return 2 * rows @ (weight if ends_E is None else weight[0]).T


def test_products_take_the_place_of_the_layers_own() -> None:
    x, ends, payload = torch.randn(3, 8), torch.tensor([3], dtype=torch.int32), torch.randn(3, 8)
    linear, grouped = filled(Linear(8, 4), seed=9), filled(GroupedLinear(1, 8, 4), seed=10)
    own_results = linear(x), grouped(x, ends)
    for module in (linear, grouped):
        owner, _ = owned(module)
        module.products = Doubled()
    assert torch.equal(linear(x), 2 * x @ linear.weight.T)
    assert linear.products.asked == (linear.weight, linear.owner, None, None)
    assert torch.equal(grouped(x, ends, payload), 2 * payload @ grouped.weight[0].T)
    assert grouped.products.asked == (grouped.weight, owner, ends, payload)
    for module in (linear, grouped):
        own(module, None)
        module.products = None
    assert torch.equal(linear(x), own_results[0]) and torch.equal(grouped(x, ends), own_results[1])
    with pytest.raises(AssertionError, match="without products"):
        grouped(x, ends, payload)
