"""SwiGLU against its definition, its own backward against autograd's, and experts against a loop over them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import model.filling
import model.mlp
from model.linear import WeightGradients, own
from model.mlp import MLP, Experts, _SwiGLU, swiglu
from tests.model.tiny import tiny

BF16 = 2.0**-8
FP32 = 5e-5  # of the largest; a sum of a few terms may cancel
seeds = st.integers(0, 2**31)


def formula(x: Tensor, weights: Tensor | None) -> Tensor:
    """g / (1 + exp(-g)) · u, times the gate value, in FP64."""
    gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    y = gate / (1 + torch.exp(-gate)) * up
    return y if weights is None else y * weights[:, None]


def exact(x: Tensor, weights: Tensor | None, gy: Tensor) -> list[Tensor]:
    """[y, gx] and the gate values' gradient if there are any, in FP64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weights) if t is not None]
    y = formula(leaves[0], leaves[1] if len(leaves) > 1 else None)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy.double())]


def fast(x: Tensor, weights: Tensor | None, gy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weights) if t is not None]
    y = _SwiGLU.apply(leaves[0], leaves[1] if len(leaves) > 1 else None)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def assert_near(got: Tensor, want: Tensor, rounding: float = 0.0) -> None:
    atol = FP32 * want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=atol)


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(1, 9), st.booleans(), st.sampled_from([0.1, 1.0, 10.0]), seeds)
def test_swiglu_fp32(rows: int, width: int, gated: bool, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, gy = size * torch.randn(rows, 2 * width), torch.randn(rows, width)
    weights = torch.rand(rows) if gated else None
    wanted = exact(x, weights, gy)
    assert_near(swiglu(x, weights), wanted[0])
    for got, want in zip(fast(x, weights, gy), wanted, strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("gated", [True, False])
def test_swiglu_bf16_computes_in_fp32_and_rounds_once(gated: bool) -> None:
    torch.manual_seed(1)
    for _ in range(20):
        x, gy = torch.randn(9, 24).bfloat16(), torch.randn(9, 12).bfloat16()
        weights = torch.rand(9) if gated else None
        wanted, results = exact(x, weights, gy), fast(x, weights, gy)
        assert_near(swiglu(x, weights), wanted[0], BF16)
        assert_near(results[0], wanted[0], BF16)
        assert_near(results[1], wanted[1], BF16)
        if gated:
            assert results[2].dtype == torch.float32
            assert_near(results[2], wanted[2])


def test_swiglu_saturates_without_overflow() -> None:
    x = torch.tensor([[100.0, 2.0], [-100.0, 2.0], [1e30, 2.0], [-1e30, 2.0]], requires_grad=True)
    y = _SwiGLU.apply(x, None)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y, torch.tensor([[200.0], [0.0], [2e30], [0.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, 100.0], [0.0, 0.0], [2.0, 1e30], [0.0, 0.0]]))


def filled(module: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def run(module: nn.Module, inputs: list[Tensor], rest: list[Tensor], gy: Tensor, with_owner: bool) -> list[Tensor]:
    """[y, gradients of ``inputs``..., gradients of the weights...]."""
    parameters = list(module.parameters())
    buffers = [torch.zeros(p.shape) for p in parameters]
    owner = WeightGradients(dict(zip(parameters, buffers, strict=True)))
    own(module, owner if with_owner else None)
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = module(*inputs, *rest)
    if not with_owner:
        return [y.detach(), *torch.autograd.grad(y, inputs + parameters, gy)]
    found = torch.autograd.grad(y, inputs, gy)
    owner.apply(owner.take())
    return [y.detach(), *found, *buffers]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(1, 8), st.integers(1, 8), seeds)
def test_mlp_with_an_owner_is_the_plain_one(leading: list[int], hidden: int, width: int, seed: int) -> None:
    mlp = filled(MLP(hidden, width), seed)
    x, gy = torch.randn(*leading, hidden), torch.randn(*leading, hidden)
    results = [run(mlp, [x], [], gy, with_owner) for with_owner in (True, False)]
    for got, want in zip(*results, strict=True):
        assert_near(got, want.double())
    gate, up = mlp.gate_up.weight.detach().chunk(2)
    want = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.detach().T
    assert_near(results[0][0], want.double())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans(), seeds)
def test_experts_are_a_loop_over_them(rows: list[int], filling: bool, seed: int) -> None:
    experts = filled(Experts(tiny(), range(len(rows))), seed)
    hidden, total = tiny().hidden_size, sum(rows)
    x, weights, gy = torch.randn(total, hidden), torch.rand(total), torch.randn(total, hidden)
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.mlp, "compiles_shapes", lambda x, weight: filling)
        patch.setattr(model.filling, "GROUP_ROWS", 4)
        results = [run(experts, [x, weights], [ends], gy, with_owner) for with_owner in (True, False)]

    leaves = [t.detach().double().requires_grad_() for t in (x, weights, *experts.parameters())]
    x64, weights64, gate_up, down = leaves
    parts, first = [], 0
    for expert, count in enumerate(rows):
        part = slice(first, first + count)
        parts.append(formula(x64[part] @ gate_up[expert].T, None) @ down[expert].T * weights64[part, None])
        first += count
    y = torch.cat(parts)
    wanted = [y.detach(), *torch.autograd.grad(y, leaves, gy.double())]
    for got_fast, got_slow, want in zip(*results, wanted, strict=True):
        assert_near(got_fast, want)
        assert_near(got_slow, want)
