"""RMSNorm against its formula, and its own backward against autograd's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.linear import WeightGradients, own
from model.norm import RMSNorm, rms_norm

BF16 = 2.0**-8
FP32 = 1e-5
EPS = 1e-6


def formula(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w, in FP64."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


def exact(x: Tensor, weight: Tensor, gy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gx, gw) in FP64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = formula(x, weight)
    return y.detach(), *torch.autograd.grad(y, [x, weight], gy.double())


def owned(x: Tensor, weight: Tensor, gy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gx, gw) with an owner, which gets the weight's gradient during the backward."""
    norm = RMSNorm(len(weight), EPS)
    norm.weight.data = weight.clone()
    buffer = torch.zeros(len(weight))
    owner = WeightGradients({norm.weight: buffer})
    own(norm, owner)
    x = x.detach().requires_grad_()
    y = norm(x)
    (gx,) = torch.autograd.grad(y, x, gy)
    assert owner.take() == [] and norm.weight.grad is None and buffer.grad_fn is None
    return y.detach(), gx, buffer


def assert_near(got: Tensor, want: Tensor, rounding: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=FP32 * want.abs().max().item())


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(1, 17),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.integers(0, 2**31),
)
def test_fp32(leading: list[int], features: int, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight, gy = size * torch.randn(*leading, features), torch.randn(features), torch.randn(*leading, features)
    assert_near(rms_norm(x, weight, EPS), exact(x, weight, gy)[0])
    (y, gx, gw), (want_y, want_gx, want_gw) = owned(x, weight, gy), exact(x, weight, gy)
    assert_near(y, want_y)
    assert_near(gw, want_gw)
    # gx is a difference; what its terms are rounded to stays when they cancel.
    terms = (gy * weight).abs().max() / (x.square().mean(-1) + EPS).sqrt().min()
    torch.testing.assert_close(gx.double(), want_gx, rtol=0, atol=FP32 * terms.item())


def test_bf16_computes_in_fp32_and_rounds_once() -> None:
    torch.manual_seed(1)
    for _ in range(20):
        x, gy = (torch.randn(7, 33).bfloat16() for _ in range(2))
        weight = torch.randn(33).bfloat16()
        y, gx, gw = owned(x, weight, gy)
        want_y, want_gx, want_gw = exact(x, weight, gy)
        assert (y.dtype, gx.dtype, gw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert_near(y, want_y, BF16)
        assert_near(rms_norm(x, weight, EPS), want_y, BF16)
        assert_near(gx, want_gx, BF16)
        assert_near(gw, want_gw)


def test_a_row_of_zeros_stays_zero_and_its_gradient_finite() -> None:
    # What a padded token looks like; eps alone is under the root.
    x, weight, gy = torch.zeros(2, 5), torch.ones(5), torch.randn(2, 5)
    y, gx, gw = owned(x, weight, gy)
    assert not y.any() and not gw.any()
    torch.testing.assert_close(gx, gy / EPS**0.5, rtol=FP32, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_fp32(dtype: torch.dtype) -> None:
    norm = RMSNorm(4, EPS).to(dtype)
    buffer = torch.zeros(4)
    own(norm, WeightGradients({norm.weight: buffer}))
    for _ in range(300):
        norm(torch.ones(1, 4, dtype=dtype, requires_grad=True)).backward(torch.ones(1, 4, dtype=dtype))
    torch.testing.assert_close(buffer, torch.full((4,), 300.0), rtol=FP32, atol=0)
