"""Every way to compute FP8 products gives what the definition gives: the product of the dequantised operands."""

import importlib.util
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import model.fp8.gemm
from model.fp8 import SIZE
from model.fp8.gemm import BACKENDS, Choice, Emulated, Gemm, PrecisionError, Reference, ScaledMM, Triton, choose
from model.fp8.quantise import Quantised, Scale, Tile, dequantise, quantise

ROUNDING = 2.0**-22
"""Of an FP32 sum, relative to the sum of its terms' magnitudes."""
seeds = st.integers(0, 2**31)


class Widened(Emulated):
    """As on a CPU without kernels for it."""

    name = "widened"

    def by_kernel(self, a: Quantised) -> bool:
        return False


anywhere = pytest.mark.parametrize("gemm", [Reference(), Emulated(), Widened()], ids=lambda g: g.name)


def operands(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers whose rows differ in size."""
    return [
        torch.randn(shape, generator=generator) * torch.randn(*shape[:-1], 1, generator=generator).exp()
        for shape in shapes
    ]


def assert_product(got: Tensor, a: Quantised, b: Quantised) -> None:
    """``got`` is a bᵀ of the dequantised numbers, within the rounding of an FP32 sum."""
    wide_a, wide_b = dequantise(a).double(), dequantise(b).double()
    bound = ROUNDING * (a.width + 1) ** 0.5 * (wide_a.abs() @ wide_b.abs().t())
    assert got.shape == bound.shape and ((got.double() - wide_a @ wide_b.t()).abs() <= bound).all()


@anywhere
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 150), st.integers(1, 150), st.integers(1, 300), st.sampled_from(Scale), seeds)
def test_the_three_products_of_a_linear_layer(gemm: Gemm, t: int, f: int, d: int, scale: Scale, seed: int) -> None:
    x, w, gy = operands(torch.Generator().manual_seed(seed), (t, d), (f, d), (t, f))
    block = quantise(w, Tile.BLOCK)
    row_x, row_gy = (quantise(m, Tile.ROW, scale) for m in (x, gy))
    column_x, column_gy = (quantise(m, Tile.COLUMN, scale) for m in (x, gy))
    assert_product(gemm.fprop(row_x, block, None, torch.float32), row_x, block)
    assert_product(gemm.dgrad(row_gy, block, None, torch.float32), row_gy, block.t())
    assert_product(gemm.wgrad(column_gy, column_x), column_gy.t(), column_x.t())


@anywhere
@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from(Scale),
    seeds,
)
def test_the_three_products_of_experts(gemm: Gemm, rows: list[int], f: int, d: int, scale: Scale, seed: int) -> None:
    f, d, r = 8 * f, 8 * d, sum(rows)
    x, w, gy = operands(torch.Generator().manual_seed(seed), (r, d), (len(rows), f, d), (r, f))
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    block = quantise(w, Tile.BLOCK)
    row_x, row_gy = (quantise(m, Tile.ROW, scale) for m in (x, gy))
    column_x, column_gy = (quantise(m, Tile.COLUMN, scale, ends_E=ends) for m in (x, gy))
    y = gemm.fprop(row_x, block, ends, torch.float32)
    gx = gemm.dgrad(row_gy, block, ends, torch.float32)
    gw = gemm.wgrad(column_gy, column_x)
    assert gw.shape == w.shape
    for expert, (a, b) in enumerate(pairwise([0, *ends.tolist()])):
        assert_product(y[a:b], row_x.rows(a, b), block.matrix(expert))
        assert_product(gx[a:b], row_gy.rows(a, b), block.matrix(expert).t())
        alone = [quantise(m[a:b], Tile.COLUMN, scale).t() for m in (gy, x)]
        assert_product(gw[expert], *alone)


@anywhere
def test_bf16_results_are_rounded_once(gemm: Gemm) -> None:
    x, w = operands(torch.Generator().manual_seed(1), (40, 300), (24, 300))
    a, b = quantise(x, Tile.ROW), quantise(w, Tile.BLOCK)
    assert torch.equal(gemm.product(a, b, torch.bfloat16), gemm.product(a, b, torch.float32).bfloat16())


def test_the_error_at_k_4096_is_the_published_one() -> None:
    # .037 for N(0, 1), beside .0029 for BF16.
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randn(n, 4096, generator=generator) for n in (256, 192))
    exact = x.double() @ w.double().t()

    def error(got: Tensor) -> float:
        return ((got.double() - exact).norm() / exact.norm()).item()

    for gemm in (Reference(), Emulated()):
        y = gemm.fprop(quantise(x, Tile.ROW), quantise(w, Tile.BLOCK), None, torch.float32)
        assert error(y) == pytest.approx(0.037, rel=0.05)
    bf16 = (x.bfloat16().float() @ w.bfloat16().float().t()).bfloat16()
    assert error(bf16) == pytest.approx(0.0029, rel=0.05)


@anywhere
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_every_result_that_it_belongs_to(gemm: Gemm, bad: float) -> None:
    x, w = operands(torch.Generator().manual_seed(3), (6, 300), (10, 300))
    x[2, 200] = bad
    y = gemm.fprop(quantise(x, Tile.ROW), quantise(w, Tile.BLOCK), None, torch.float32)
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()
    gw = gemm.wgrad(quantise(torch.ones(6, 4), Tile.COLUMN), quantise(x, Tile.COLUMN))
    assert gw[:, 200].isnan().all() and gw[:, :200].isfinite().all()


def cublas(a: Tensor, b: Tensor, sa: Tensor, ra: Any, sb: Tensor, rb: Any, output_dtype: torch.dtype) -> Tensor:
    """What torch's block-scaled product asks of its arguments (torch 2.10 to 2.13), and the product itself."""
    row, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    (m, k), n = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn and sa.dtype == sb.dtype == torch.float32
    assert a.is_contiguous() and b.t().is_contiguous() and b.shape[0] == k
    assert m % 16 == n % 16 == 0 and k % SIZE == 0

    def widened(x: Tensor, s: Tensor, recipe: Any) -> Tensor:
        tiles = k // SIZE
        if recipe is row:
            assert s.shape == (len(x), tiles) and s.stride(0) == 1 and (tiles == 1 or s.stride(1) == len(x))
            return x.float() * s.repeat_interleave(SIZE, 1)
        padded = -(-tiles // 4) * 4
        assert recipe is block and s.shape == (padded, -(-len(x) // SIZE)) and s.stride(0) == 1
        assert s.shape[1] == 1 or s.stride(1) == padded
        return x.float() * s.t()[:, :tiles].repeat_interleave(SIZE, 0)[: len(x)].repeat_interleave(SIZE, 1)

    return (widened(a, sa, ra) @ widened(b.t(), sb, rb).t()).to(output_dtype)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 150), st.integers(1, 300), st.integers(1, 600), seeds)
def test_scaled_mm_gives_torch_what_it_asks_for(t: int, f: int, d: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_mm", cublas)
        x, w, gy = operands(torch.Generator().manual_seed(seed), (t, d), (f, d), (t, f))
        block, row_x, row_gy = quantise(w, Tile.BLOCK), quantise(x, Tile.ROW), quantise(gy, Tile.ROW)
        columns = quantise(gy, Tile.COLUMN), quantise(x, Tile.COLUMN)
        gemm = ScaledMM()
        assert_product(gemm.fprop(row_x, block, None, torch.float32), row_x, block)
        assert_product(gemm.dgrad(row_gy, block, None, torch.float32), row_gy, block.t())
        assert_product(gemm.wgrad(*columns), columns[0].t(), columns[1].t())


def test_scaled_mm_takes_experts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", cublas)
    ends = torch.tensor([0, 130, 130, 144], dtype=torch.int32)
    x, w, gy = operands(torch.Generator().manual_seed(4), (144, 72), (4, 40, 72), (144, 40))
    block, row_x = quantise(w, Tile.BLOCK), quantise(x, Tile.ROW)
    columns = [quantise(m, Tile.COLUMN, ends_E=ends) for m in (gy, x)]
    for got, want in (
        (ScaledMM().fprop(row_x, block, ends, torch.float32), Emulated().fprop(row_x, block, ends, torch.float32)),
        (ScaledMM().wgrad(*columns), Emulated().wgrad(*columns)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_backend_is_chosen_explicitly_or_said_why() -> None:
    cpu = torch.device("cpu")
    for name, of in BACKENDS.items():
        if of not in (ScaledMM, Triton):
            assert type(choose(name, cpu).gemm) is of
    auto = choose("auto", cpu)
    assert isinstance(auto.gemm, Emulated) and str(auto) == "FP8 products: emulated (auto: the device is cpu)"
    with pytest.raises(PrecisionError, match=r"scaled_mm needs a Hopper GPU \(SM90\).*the device is cpu; 'emulated'"):
        choose("scaled_mm", cpu)
    with pytest.raises(PrecisionError, match="'fast' must be auto, reference, emulated, scaled_mm, triton"):
        choose("fast", cpu)


def test_triton_is_refused_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(choose("triton", torch.device("cpu")).gemm, Triton)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(PrecisionError, match=r"triton needs the package triton and .*the device is cpu; 'emulated'"):
        choose("triton", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    with pytest.raises(PrecisionError, match="Card is SM80"):
        choose("triton", torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PrecisionError, match="triton is not installed"):
        choose("triton", torch.device("cuda"))


@pytest.mark.parametrize(
    "capability,cuda,lacks",
    [((9, 0), "12.9", None), ((9, 0), "13.0", None), ((9, 0), "12.8", "CUDA 12.8"), ((8, 0), "12.9", "Card is SM80")],
)
def test_hopper_has_scaled_mm(
    capability: tuple[int, int], cuda: str, lacks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    device = torch.device("cuda")
    choice = choose("auto", device)
    assert isinstance(choice, Choice) and isinstance(choice.gemm, ScaledMM if lacks is None else Emulated)
    if lacks is None:
        assert isinstance(choose("scaled_mm", device).gemm, ScaledMM)
    else:
        assert lacks in choice.reason
        with pytest.raises(PrecisionError, match=lacks):
            model.fp8.gemm.choose("scaled_mm", device)


def assert_follows(got: Tensor, want: Tensor, device: str) -> None:
    """On a CPU up to the order of an FP32 sum; tensor cores keep about 14 bits between promotions."""
    assert got.shape == want.shape
    assert ((got - want).norm() / want.norm()).item() < (2e-3 if device == "cuda" else 1e-6)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_that_the_machine_has_computes_the_definition(name: str, device: str) -> None:
    try:
        gemm = choose(name, torch.device(device)).gemm
    except PrecisionError as error:
        pytest.skip(str(error))
    ends = torch.tensor([0, 131, 131, 144], dtype=torch.int32, device=device)
    shapes = (144, 200), (136, 200), (4, 136, 200), (144, 136)
    x, w, ws, gy = (m.to(device) for m in operands(torch.Generator().manual_seed(5), *shapes))
    row_x, row_gy = quantise(x, Tile.ROW), quantise(gy, Tile.ROW, Scale.POWER_OF_TWO)
    for weight, of in ((quantise(w, Tile.BLOCK), None), (quantise(ws, Tile.BLOCK), ends)):
        columns = [quantise(m, Tile.COLUMN, ends_E=of) for m in (gy, x)]
        want = Reference().wgrad(*columns)
        assert_follows(gemm.wgrad(*columns), want, device)
        assert of is None or not (want[0].any() or want[2].any())
        for product, rows in (("fprop", row_x), ("dgrad", row_gy)):
            got, want = (getattr(g, product)(rows, weight, of, torch.float32) for g in (gemm, Reference()))
            assert_follows(got, want, device)
