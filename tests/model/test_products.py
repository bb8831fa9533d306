"""The products of a CPU's own against FP64, on shapes that do not fill tiles and panels."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.fp8.gemm import Emulated
from model.fp8.quantise import Tile, quantise
from model.kernels import products, registers
from tests.model.threads import assert_threads_change_nothing

pytestmark = pytest.mark.skipif(not registers.available(), reason="needs a CPU with AVX512_BF16 and without AMX")

seeds = st.integers(0, 2**31)
counts = st.lists(st.integers(0, 30), min_size=1, max_size=4)
halves = st.integers(1, 40)
ROUNDING, FP32_SUM = 2.0**-8, 2.0**-22
"""Of a result, relative; and of a sum, relative to the sum of magnitudes."""


def drawn(seed: int, counts_E: list[int], inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """x [R, D], gy [R, F], weights [E, F, D] and where the experts' rows end."""
    torch.manual_seed(seed)
    shapes = (sum(counts_E), inputs), (sum(counts_E), outputs), (len(counts_E), outputs, inputs)
    x, gy, weight = (torch.randn(shape).bfloat16() for shape in shapes)
    return x, gy, weight, np.cumsum(counts_E).astype(np.int32)


def assert_close(got: Tensor, wanted: Tensor, magnitude: Tensor, rounding: float) -> None:
    assert ((got.double() - wanted).abs() <= rounding * wanted.abs() + FP32_SUM * magnitude).all()


@settings(deadline=None, max_examples=60)
@given(counts, halves, halves, seeds)
def test_the_three_products(counts_E: list[int], half_inputs: int, half_outputs: int, seed: int) -> None:
    x, gy, weight, ends = drawn(seed, counts_E, 2 * half_inputs, 2 * half_outputs)
    y, gx = products.forward(x, weight, ends), products.input_gradient(gy, weight, ends)
    start = torch.randn(weight.shape)
    buffer = start.clone()
    products.add_weight_gradient(gy, x, ends, buffer)
    for expert, (first, last) in enumerate(pairwise([0, *ends.tolist()])):
        rows, w = slice(first, last), weight[expert].double()
        xs, gys, was = x[rows].double(), gy[rows].double(), start[expert].double()
        assert_close(y[rows], xs @ w.t(), xs.abs() @ w.t().abs(), ROUNDING)
        assert_close(gx[rows], gys @ w, gys.abs() @ w.abs(), ROUNDING)
        assert_close(buffer[expert], was + gys.t() @ xs, was.abs() + gys.t().abs() @ xs.abs(), 0)


def test_a_row_s_bits_are_its_own_however_many_rows_and_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gy, weight, ends = drawn(1, [29, 0, 14], 72, 104)

    def all_of_them() -> list[Tensor]:
        buffer = torch.ones(weight.shape)
        products.add_weight_gradient(gy, x, ends, buffer)
        return [products.forward(x, weight, ends), products.input_gradient(gy, weight, ends), buffer]

    y = products.forward(x, weight, ends)
    for row in range(29):
        one = products.forward(x[row : row + 1], weight[:1], np.ones(1, np.int32))
        assert torch.equal(one[0], y[row])
    assert_threads_change_nothing(monkeypatch, all_of_them)


def test_threads_share_products_of_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gy, weight, ends = drawn(4, [150, 0, 33], 200, 136)
    rows, blocks = (quantise(of, Tile.ROW) for of in (x, gy)), quantise(weight, Tile.BLOCK)
    x_rows, gy_rows = rows
    groups = torch.from_numpy(ends)
    columns = [quantise(of, Tile.COLUMN, ends_E=groups) for of in (gy, x)]

    def all_of_them() -> list[Tensor]:
        gemm, dtype = Emulated(), torch.bfloat16
        made = gemm.fprop(x_rows, blocks, groups, dtype), gemm.dgrad(gy_rows, blocks, groups, dtype)
        return [*made, gemm.wgrad(*columns)]

    assert_threads_change_nothing(monkeypatch, all_of_them)


def test_nan_and_infinity_are_not_hidden() -> None:
    for bad in (float("nan"), float("inf")):
        x, gy, weight, ends = drawn(2, [5, 6], 40, 40)
        x[3, 17], gy[7, 21] = bad, bad
        buffer = torch.zeros(weight.shape)
        products.add_weight_gradient(gy, x, ends, buffer)
        y, gx = products.forward(x, weight, ends), products.input_gradient(gy, weight, ends)
        assert not y[3].isfinite().any() and y[[0, 1, 2, 4, 5, 6, 7, 8, 9, 10]].isfinite().all()
        assert not gx[7].isfinite().any() and gx[[0, 1, 2, 3, 4, 5, 6, 8, 9, 10]].isfinite().all()
        assert not buffer[0, :, 17].isfinite().any() and not buffer[1, 21].isfinite().any()


def test_other_matrices_are_not_for_them() -> None:
    """Sums run over pairs."""
    for inputs, outputs, dtype in ((6, 7, torch.bfloat16), (7, 6, torch.bfloat16), (8, 8, torch.float32)):
        assert not products.serves(torch.empty(0, inputs).to(dtype), torch.empty(2, outputs, inputs).to(dtype))
