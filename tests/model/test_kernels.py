"""Kernels against the definitions that they compute, bit by bit where nothing is summed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.caching import IndexDataCacheFile
from torch import Tensor

import model.kernels.calls
from model.attention import core_inputs
from model.kernels import core_inputs as core
from model.kernels import jit, norm, scalars
from model.kernels import swiglu as kernels
from model.kernels.jit import kernel
from model.mlp import swiglu, swiglu_backward
from model.norm import rms_norm
from model.rope import rotate, rotations
from tests.model.threads import assert_threads_change_nothing

seeds = st.integers(0, 2**31)
ULP = 2.0**-8
"""Half a unit in BF16's last place at most; twice that where FP32 fell on the other side of a tie."""


def drawn(*shape: int) -> Tensor:
    """BF16 of magnitudes from 2^-20 to 2^10."""
    return (torch.randn(shape) * torch.exp2(torch.randint(-20, 11, shape).float())).bfloat16()


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """Equal but for ties, and NaN where NaN is."""
    torch.testing.assert_close(got.float(), want.float(), rtol=2 * ULP, atol=1e-30, equal_nan=True)
    assert (got != want).logical_and(~want.isnan()).float().sum() <= 0.02 * got.numel()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 70), st.booleans(), seeds)
def test_swiglu(rows: int, width: int, gated: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, gy, weights = drawn(rows, 2 * width), drawn(rows, width), torch.rand(rows) if gated else None
    torch.testing.assert_close(kernels.forward(x, weights), swiglu(x, weights), rtol=2 * ULP, atol=1e-30)
    (gx, gweights), (wanted, wanted_weights) = kernels.backward(x, weights, gy), swiglu_backward(x, weights, gy)
    assert gx.dtype == torch.bfloat16
    widened = kernels.backward(x.float(), weights, gy.float())[0]
    torch.testing.assert_close(widened, gx, rtol=2 * ULP, atol=1e-30)
    torch.testing.assert_close(kernels.forward(x.float(), weights), swiglu(x.float(), weights), rtol=1e-6, atol=1e-30)
    # 1 + g (1 - sigmoid) cancels where silu' is zero, near g = -1.28.
    torch.testing.assert_close(
        gx.float(), wanted, rtol=2 * ULP, atol=1e-6 * max(wanted.abs().amax(), 1e-30) if rows else 0
    )
    if gated:
        magnitude = (swiglu(x.double(), None) * gy).abs().sum(-1)
        assert ((gweights - wanted_weights).abs() <= 1e-5 * magnitude).all()
    else:
        assert gweights is None and wanted_weights is None


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 70), seeds)
def test_norm(rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, gy = torch.randn(2, rows, width).bfloat16(), torch.randn(2, rows, width).bfloat16()
    weight = torch.rand(width).bfloat16()
    y, scale = norm.forward(x, weight, 1e-6)
    assert_rounded(y, rms_norm(x, weight, 1e-6))
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    plain = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + 1e-6) * leaves[1]
    wanted = torch.autograd.grad(plain, leaves, gy.double())
    gx, gweight = norm.backward(x, weight, scale, gy)
    largest = (gy * weight).abs().amax().item() * scale.max().item() if rows else 0  # of the two that are subtracted
    torch.testing.assert_close(gx.double(), wanted[0], rtol=2 * ULP, atol=1e-6 * largest)
    torch.testing.assert_close(gweight.double(), wanted[1], rtol=1e-5, atol=1e-5 * max(rows, 1))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9), st.integers(1, 25), st.booleans(), seeds
)
def test_core_inputs(heads: int, tokens: int, pairs: int, nope: int, values: int, packed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    width = nope + 2 * pairs
    shapes = (2, tokens, heads, width), (2, tokens, heads, nope + values), (2, tokens, 2 * pairs)
    read = [torch.randn(shape).bfloat16() for shape in shapes]
    turns = rotations(16, 2 * pairs, 1e4)
    turns = turns[torch.randint(16, (2, tokens))] if packed else turns[:tokens]

    def definition(query: Tensor, keys_values: Tensor, k_rope: Tensor) -> list[Tensor]:
        turned, shared = rotate(query[..., nope:], turns), rotate(k_rope.unsqueeze(2), turns).expand(-1, -1, heads, -1)
        q, k = torch.cat([query[..., :nope], turned], -1), torch.cat([keys_values[..., :nope], shared], -1)
        return [of.transpose(1, 2) for of in core_inputs(q, k, keys_values[..., nope:])]

    got = core.forward(*read, turns, nope, max(width, values), torch.float32)
    for made, defined in zip(got, definition(*read), strict=True):
        assert_rounded(made.bfloat16(), defined.bfloat16())
        assert torch.equal(made.bfloat16().float(), made), "rounded to BF16"
    leaves, gradients = [of.float().requires_grad_() for of in read], [torch.randn(of.shape) for of in got]
    exact = torch.autograd.grad(definition(*leaves), leaves, gradients)
    for made, defined in zip(core.backward(*gradients, turns, nope, values), exact, strict=True):
        torch.testing.assert_close(made.float(), defined, rtol=2 * ULP, atol=1e-5 * heads)


def test_threads_do_not_change_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x, gy, weights, scale = drawn(37, 64), drawn(37, 32), torch.rand(37), torch.rand(64)
    query, keys_values, k_rope = (torch.randn(3, 7, *of).bfloat16() for of in ((2, 12), (2, 16), (4,)))
    turns = rotations(7, 4, 1e4)

    def all_of_them() -> list[Tensor]:
        y, scales = norm.forward(x, scale, 1e-6)
        q, k, v = core.forward(query, keys_values, k_rope, turns, 8, 12, torch.float32)
        back = core.backward(q, k, v, turns, 8, 8)
        gates = kernels.backward(x, weights, gy)
        return [y, q, k, v, *back, kernels.forward(x, weights), *gates, *norm.backward(x, scale, scales, x)]

    monkeypatch.setattr(norm, "BLOCK_ELEMENTS", 64)
    assert_threads_change_nothing(monkeypatch, all_of_them, repeats=20)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_all_rows_and_none_is_given_no_row(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However wide they are. A kernel that steps by what a row had it do would go on for ever without one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows in range(9):
        for width in (1, model.kernels.calls.PART_ELEMENTS):
            given_to: list[tuple[int, int]] = []
            model.kernels.calls.by_rows(rows, width, lambda *of, to=given_to: to.append(of))
            assert all(first < last for first, last in given_to)
            assert sorted(row for of in given_to for row in range(*of)) == list(range(rows))
            assert len(given_to) == min(rows, threads if width > 1 else 1)


def test_nan_and_infinity_are_not_hidden() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for column in range(4):
            x = torch.ones(3, 4).bfloat16()
            x[1, column] = bad
            y, gx = kernels.forward(x, None), kernels.backward(x, None, torch.ones(3, 2).bfloat16())[0]
            assert not y[1].isfinite().all() and y[[0, 2]].isfinite().all()
            assert not gx[1].isfinite().all() or bad == float("inf"), "silu is a straight line there"
            normed, _ = norm.forward(x, torch.ones(4), 1e-6)
            assert normed[1].isnan().any() and normed[[0, 2]].isfinite().all()


@numba.njit
def _exp(x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    for i in range(len(x)):
        y[i] = scalars.exp(x[i])
    return y


@numba.njit
def _narrow(x: np.ndarray) -> np.ndarray:
    y = np.empty(len(x), np.int16)
    for i in range(len(x)):
        y[i] = scalars.narrow(x[i])
    return y


def test_the_exponential_is_within_a_unit_in_the_last_place() -> None:
    x = np.random.default_rng(1).uniform(-87, 88, 100_000).astype(np.float32)
    assert np.abs(_exp(x) / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7


def test_rounding_to_bf16_is_torch_s() -> None:
    bits = np.random.default_rng(2).integers(-(2**31), 2**31, 1_000_000, dtype=np.int64).astype(np.int32)
    x = torch.from_numpy(bits).view(torch.float32)
    got = torch.from_numpy(_narrow(x.numpy())).view(torch.bfloat16)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got[~x.isnan()], x[~x.isnan()].bfloat16())


def doubled(x):
    for i in range(len(x)):
        x[i] *= 2


def halved(x):
    for i in range(len(x)):
        x[i] /= 2


def test_the_first_start_is_said_once_and_again_for_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def said(*functions: Callable[..., None]) -> list[str]:
        for function in functions:
            kernel("void(float32[::1])")(function)
        printed = capsys.readouterr()
        assert not printed.out
        return printed.err.splitlines()

    (line,) = said(doubled, halved)
    (note,) = tmp_path.rglob("compiling")
    assert line == f"compiling kernels for this CPU, once: half a minute of one core, kept in {note.parent}"
    assert said(doubled, halved) == []
    monkeypatch.setattr(jit, "_SOURCES", b"others")
    assert said(doubled, halved) == [line]


@pytest.mark.parametrize("trouble", ["no folder", "no room", "damaged"])
def test_a_cache_that_cannot_be_used_is_done_without(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that is said once, whatever the number of kernels."""
    jit._say_not_kept.cache_clear()
    folder = tmp_path / "cache"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    if trouble == "no folder":
        folder.write_text("")
    elif trouble == "no room":
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(IndexDataCacheFile, "save", Mock(side_effect=full))
    else:
        kernel("void(float32[::1])")(doubled)
        (index,) = folder.rglob("*.nbi")
        index.write_bytes(b"\\x80")
    x = np.ones(3, np.float32)
    for _ in range(2):
        kernel("void(float32[::1])")(doubled)(x)
    assert x.tolist() == [4, 4, 4]
    # Numba keeps it elsewhere when the folder is none.
    assert capsys.readouterr().err.count("every process compiles its own") == (trouble != "no folder")


def test_a_kernel_that_cannot_be_compiled_says_why() -> None:
    with pytest.raises(numba.core.errors.TypingError):
        kernel("void(float32)")(doubled)
