"""The Triton kernels give what the definitions give: in the interpreter on a CPU, or on a GPU that has them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.fp8.assign import set_precision
from model.fp8.gemm import Reference, Triton
from model.fp8.quantise import Quantised, Scale, Tile, dequantise, quantise
from model.mlp import swiglu
from tests.model.test_fp8_gemm import operands
from tests.model.test_fp8_linear import gated
from tests.model.test_fp8_quantise import same_bits

kernels = pytest.importorskip("model.fp8.triton_kernels", exc_type=ImportError)
ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("the GPU has no FP8", allow_module_level=True)


def same(got: Quantised, want: Quantised) -> bool:
    return (
        (got.tile, got.format, got.width) == (want.tile, want.format, want.width)
        and (got.ends_E is want.ends_E)
        and same_bits(got.scales, want.scales)
        and same_bits(got.stored, want.stored)
    )


def hard(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Numbers of many sizes, with ties between E4M3's, its subnormal numbers, zeros, and values too small for FP32."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).mul(8).exp()
    x *= torch.randn(width, generator=generator).mul(3).exp() * (torch.rand(rows, width, generator=generator) > 0.1)
    ties = torch.arange(width) * 2.0**-10 - 2.0**-4
    x[0], x[1] = ties, ties * 16
    x[0, 0] = x[1, 0] = 448.0  # the scale is 1
    x[2] = 1e-42
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_quantising_are_the_definition_bit_by_bit(scale: Scale, dtype: torch.dtype) -> None:
    x = hard(150, 200, dtype)
    x[140, 199], x[149, 0] = -float("nan"), float("nan")
    x[3, 5] = -float("inf")
    ends = torch.tensor([0, 7, 139, 139, 150], dtype=torch.int32, device=DEVICE)
    rows, columns = kernels.rows_and_columns(x, scale, None)
    assert same(rows, quantise(x, Tile.ROW, scale)) and same(columns, quantise(x, Tile.COLUMN, scale))
    assert columns.stored.t().is_contiguous(), "Wgrad sums over tokens"
    _, columns = kernels.rows_and_columns(x, scale, ends)
    assert same(columns, quantise(x, Tile.COLUMN, scale, ends_E=ends))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_is_quantised_to_nothing(shape: tuple[int, int]) -> None:
    x = torch.empty(shape, device=DEVICE)
    rows, columns = kernels.rows_and_columns(x, Scale.FP32, None)
    assert same(rows, quantise(x, Tile.ROW)) and same(columns, quantise(x, Tile.COLUMN))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_quantised_as_the_definition_but_for_its_exponential(weighted: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    h = (3 * torch.randn(140, 400, generator=generator)).to(DEVICE, dtype)
    weights = torch.rand(140, generator=generator).to(DEVICE) if weighted else None
    got = (
        kernels.swiglu_rows(h, weights, Scale.POWER_OF_TWO),
        kernels.swiglu_columns(h, weights, Scale.POWER_OF_TWO, None),
    )
    y = swiglu(h, weights)
    for q, tile in zip(got, (Tile.ROW, Tile.COLUMN), strict=True):
        want = quantise(y, tile, Scale.POWER_OF_TWO)
        assert torch.equal(q.scales, want.scales)
        # An exponential that is off by 2^-23 may cross a boundary of BF16 and then one of E4M3, to the next number.
        moved = dequantise(q) != dequantise(want)
        assert moved.float().mean() < 1e-3
        assert ((dequantise(q) - y.float()).abs()[moved] <= y.float().abs()[moved] * 2.0**-4 * 1.01).all()


def test_a_product_in_bf16_is_rounded_once() -> None:
    x, w = (t.to(DEVICE) for t in operands(torch.Generator().manual_seed(2), (20, 200), (140, 200)))
    a, b = quantise(x, Tile.ROW), quantise(w, Tile.BLOCK)
    wide, narrow = (Triton().product(a, b, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(narrow, wide.bfloat16())


def test_nan_reaches_its_results_and_no_others() -> None:
    x, w = (t.to(DEVICE) for t in operands(torch.Generator().manual_seed(4), (6, 300), (10, 300)))
    x[2, 200] = float("nan")
    a, b = quantise(x, Tile.ROW), quantise(w, Tile.BLOCK)
    y = Triton().fprop(a, b, None, torch.float32)
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()


def test_experts_through_the_kernels_follow_the_definition() -> None:
    module, inputs, _ = gated(True, seed=6)
    module.to(DEVICE)
    leaves = [t[:150].clone().to(DEVICE).requires_grad_() for t in inputs]
    ends = torch.tensor([140, 140, 150], dtype=torch.int32, device=DEVICE)
    gy, found = torch.randn(150, 256, device=DEVICE), []
    for gemm in (Reference(), Triton()):
        set_precision(module, gemm)
        y = module(*leaves, ends)
        found.append([y.detach(), *torch.autograd.grad(y, [*leaves, *module.parameters()], gy)])
    # The last bit of a sum or an exponential moves few numbers across a boundary of E4M3.
    for want, got in zip(*found, strict=True):
        assert ((got - want).norm() / want.norm()).item() < 2e-3


def test_hopper_gets_its_tensor_cores_and_the_rounding_that_was_tested(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.model.triton_for_hopper"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ptx = json.loads(result.stdout)
    assert re.search(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", ptx["product"])
    # Neither flushed to zero nor fused; divisions are to nearest.
    assert "div.rn.f32" in ptx["quantise"]
    for text in ptx.values():
        assert not re.search(r"\.ftz|\bfma\.", text)
