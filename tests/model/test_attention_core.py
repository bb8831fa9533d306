"""The attention core of a CPU's own against the definition in FP64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import attention_core as core
from model.kernels import registers
from tests.model.threads import assert_threads_change_nothing

pytestmark = pytest.mark.skipif(not registers.available(), reason="needs a CPU with AVX512_BF16 and without AMX")

seeds = st.integers(0, 2**31)
ROUNDINGS = 2.0**-7
"""Of a result, and of the weights, gradients of logits or results that its terms are made of: two of 2^-8."""


def drawn(seed: int, batch: int, length: int, heads: int, width: int, values: int) -> list[Tensor]:
    """Queries, keys, values and a gradient of the result."""
    torch.manual_seed(seed)
    widths = width, width, values, values
    return [torch.randn(batch, length, heads, of).bfloat16() for of in widths]


def softmax(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights [B, H, S, T] and the logarithms of their sums."""
    logits_BHST = torch.einsum("bshk,bthk->bhst", q, k) * scale
    later = torch.ones(logits_BHST.shape[-2:], dtype=torch.bool).triu(1)
    logits_BHST = logits_BHST.masked_fill(later, -torch.inf)
    return logits_BHST.softmax(-1), logits_BHST.logsumexp(-1)


def weighted(weights_BHST: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhst,bthv->bshv", weights_BHST, v)


def assert_near(got: Tensor, wanted: Tensor, magnitude: Tensor) -> None:
    """Entry by entry; ``magnitude``: the sum of its terms' magnitudes."""
    assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
    assert ((got.double() - wanted).abs() <= ROUNDINGS * magnitude + 1e-30).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 2), st.integers(1, 110), st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), seeds)
def test_core_and_its_gradients(
    batch: int, length: int, heads: int, half_width: int, half_values: int, seed: int
) -> None:
    *read, g = drawn(seed, batch, length, heads, 2 * half_width, 2 * half_values)
    scale = (2 * half_width) ** -0.5
    leaves = [of.double().requires_grad_() for of in read]
    weights, log_sums = softmax(*leaves[:2], scale)
    wanted = weighted(weights, leaves[2])
    wanted_gradients = torch.autograd.grad(wanted, leaves, g.double())
    out, kept = core.forward(*read, scale)
    q, k, v, g_out = (of.double().abs() for of in (*read, g))
    assert_near(out, wanted, weighted(weights, v))
    torch.testing.assert_close(kept.double(), log_sums, rtol=1e-5, atol=1e-5)
    # A logit's gradient is its weight times the difference of two sums, each with roundings of its own.
    sums = torch.einsum("bshv,bthv->bhst", g_out, v) + (g_out * weighted(weights, v)).sum(-1).mT.unsqueeze(-1)
    logits = weights * sums * scale
    magnitudes = weighted(logits, k), weighted(logits.mT, q), weighted(weights.mT, g_out)
    for got, gradient, magnitude in zip(
        core.backward(*read, out, kept, g, scale), wanted_gradients, magnitudes, strict=True
    ):
        assert_near(got, gradient, magnitude)


def test_no_query_sees_a_later_token() -> None:
    """Whatever is there, and to the bit."""
    *read, _ = drawn(1, 1, 70, 2, 8, 6)
    out = core.forward(*read, 0.5)[0]
    for token in (1, 12, 33, 69):
        changed = [of.clone() for of in read]
        for of in changed:
            of[:, token:] *= 100
        again = core.forward(*changed, 0.5)[0]
        assert torch.equal(again[:, :token], out[:, :token]) and not torch.equal(again[:, token], out[:, token])


def test_large_logits_and_nan() -> None:
    *read, g = drawn(2, 1, 40, 1, 8, 8)
    q, k, v = read
    weights, _ = softmax((q * 256).double(), k.double(), 1.0)
    out = core.forward(q * 256, k, v, 1.0)[0]
    assert_near(out, weighted(weights, v.double()), weighted(weights, v.double().abs()))
    g[0, 20, 0, 3] = float("nan")
    gq, gk, gv = core.backward(*read, *core.forward(*read, 1.0), g, 1.0)
    assert gq[0, 20].isnan().all() and gk[0, :21].isnan().all() and gv[0, :21, 0, 3].isnan().all()
    assert gq[0, :20].isfinite().all() and gv[0, :, 0, :3].isfinite().all()
    for of in (q, k, v):
        of[0, 20, 0, 3] = float("nan")
        assert core.forward(*read, 1.0)[0][0, 20].isnan().any()
        of[0, 20, 0, 3] = 1


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    *read, g = drawn(3, 2, 50, 3, 12, 10)

    def all_of_them() -> list[Tensor]:
        out, kept = core.forward(*read, 0.3)
        return [out, kept, *core.backward(*read, out, kept, g, 0.3)]

    assert_threads_change_nothing(monkeypatch, all_of_them)
