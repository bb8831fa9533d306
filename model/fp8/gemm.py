"""Products of quantised matrices: one definition, and the ways to compute it.

    out[m, n] = sum over tiles k of 128 of   (sum over the tile of qa · qb)  ·  sa[m, k] · sb[n, k]

with a [M, K] in ROW tiles and b [N, K] in ROW tiles or BLOCKs; the sum over tiles is in FP32, which is the promotion
every 128 of K that Hopper's tensor cores need (report, 3.3.2). The three products of a linear layer y = x Wᵀ are

    Fprop  y = x Wᵀ        x ROW                    W BLOCK
    Dgrad  gx = gy W       gy ROW                   Wᵀ, whose tiles are BLOCKs too
    Wgrad  gW = gyᵀ x      gyᵀ from gy in COLUMNs    xᵀ from x in COLUMNs

each for one matrix or, with rows sorted by expert, for a matrix an expert.

M, N outer dims, K summed dim, E experts, T tokens (rows), F outputs and D inputs of a layer, (E,) for experts alone.
"""

import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import SIZE
from model.fp8.quantise import Quantised, Scale, Tile, column_ends, dequantise, quantise
from model.kernels import registers
from model.mlp import activate


class PrecisionError(ValueError):
    """FP8 was asked for where it cannot be had; one line that says what would work."""


class Gemm(ABC):
    """A way to compute products, in ``dtype`` (FP32 or BF16), and what is quantised more than one way or on the way to
    them. ``product`` is the one that a subclass needs."""

    name: str

    @abstractmethod
    def product(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        """[M, K] x [N, K] -> [M, N]."""

    def by_rows(self, a: Quantised, b: Quantised, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, K] x [E, N, K] -> [M, N]: rows of ``a`` up to ``ends_E[e]`` with matrix e."""
        out = a.scales.new_empty(a.stored.shape[0], b.stored.shape[1], dtype=dtype)
        start = 0
        for expert, stop in enumerate(ends_E.tolist()):
            if start < stop:
                out[start:stop] = self.product(a.rows(start, stop), b.matrix(expert), dtype)
            start = stop
        return out

    def by_columns(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        """[M, K] x [N, K] -> [E, M, N]: matrix e sums over the columns of expert e, as the ``ends_E`` of both say."""
        assert a.ends_E is not None
        pairs = zip(_columns(a), _columns(b), strict=True)
        return torch.stack([self.product(x, y, dtype) for x, y in pairs])

    def rows_and_columns(self, x_TD: Tensor, scale: Scale, ends_E: Tensor | None) -> tuple[Quantised, Quantised]:
        """A matrix in E4M3 in ROW tiles and in COLUMN tiles: an output gradient as Dgrad and as Wgrad take it."""
        return quantise(x_TD, Tile.ROW, scale), quantise(x_TD, Tile.COLUMN, scale, ends_E=ends_E)

    def swiglu_rows(self, x_T2D: Tensor, weights_T: Tensor | None, scale: Scale) -> Quantised:
        """``model.mlp.swiglu`` as Fprop takes it."""
        return quantise(activate(x_T2D, weights_T), Tile.ROW, scale)

    def swiglu_columns(self, x_T2D: Tensor, weights_T: Tensor | None, scale: Scale, ends_E: Tensor | None) -> Quantised:
        """The same as Wgrad takes it."""
        return quantise(activate(x_T2D, weights_T), Tile.COLUMN, scale, ends_E=ends_E)

    def fprop(self, x: Quantised, w: Quantised, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[T, D], [(E,) F, D] -> [T, F]."""
        return self.product(x, w, dtype) if ends_E is None else self.by_rows(x, w, ends_E, dtype)

    def dgrad(self, gy: Quantised, w: Quantised, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[T, F], [(E,) F, D] -> [T, D]."""
        return self.fprop(gy, w.t(), ends_E, dtype)

    def wgrad(self, gy: Quantised, x: Quantised) -> Tensor:
        """[T, F], [T, D], both in COLUMN tiles -> FP32 [(E,) F, D]."""
        a, b = gy.t(), x.t()
        return self.product(a, b, torch.float32) if a.ends_E is None else self.by_columns(a, b, torch.float32)


class Reference(Gemm):
    """The definition."""

    name = "reference"

    def product(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        assert a.tile is Tile.ROW and b.tile in (Tile.ROW, Tile.BLOCK), (a.tile, b.tile)
        qa, qb = a.stored.float(), b.stored.float()
        sb = b.scales if b.tile is Tile.ROW else b.scales.repeat_interleave(SIZE, 0)[: len(qb)]
        out = qa.new_zeros(len(qa), len(qb))
        for k in range(a.scales.shape[1]):
            part = slice(k * SIZE, (k + 1) * SIZE)
            out += (qa[:, part] @ qb[:, part].t()) * a.scales[:, k, None] * sb[:, k]
        return out.to(dtype)


class Emulated(Gemm):
    """Anywhere. A CPU with AVX512_BF16 computes the definition by our own kernels. Elsewhere scales go into operands,
    and one FP32 product does the rest: products of two E4M3 numbers are exact in FP32 and so is a power-of-two scale;
    another one costs a rounding of each operand, 2^-24."""

    name = "emulated"

    def by_kernel(self, a: Quantised) -> bool:
        return a.stored.device.type == "cpu" and registers.available()

    def product(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        if self.by_kernel(a) and b.tile is Tile.BLOCK:
            return _by_blocks(a, b, torch.tensor([len(a.stored)], dtype=torch.int32), dtype)
        if self.by_kernel(a):
            return _weight_gradient(a.t(), b.t()).squeeze(0).to(dtype)
        return F.linear(_widened(a), _widened(b)).to(dtype)

    def by_rows(self, a: Quantised, b: Quantised, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
        if self.by_kernel(a):
            return _by_blocks(a, b, ends_E, dtype)
        return F.grouped_mm(_widened(a), _widened(b).transpose(1, 2), offs=ends_E).to(dtype)

    def by_columns(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        if self.by_kernel(a):
            return _weight_gradient(a.t(), b.t()).to(dtype)
        return F.grouped_mm(_widened(a), _widened(b).t(), offs=a.ends_E).to(dtype)


def _by_blocks(a: Quantised, b: Quantised, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    from model.kernels import scaled_products as kernels

    assert a.tile is Tile.ROW and b.tile is Tile.BLOCK, (a.tile, b.tile)
    turned = not b.stored.is_contiguous()
    w = b.t() if turned else b
    w_EFD, sw_EXY = (of if of.ndim == 3 else of.unsqueeze(0) for of in (w.stored, w.scales))
    return kernels.by_blocks(a.stored, a.scales, w_EFD, sw_EXY, turned, ends_E.numpy(), dtype)


def _weight_gradient(gy: Quantised, x: Quantised) -> Tensor:
    """[E, F, D]; a layer without experts has one."""
    from model.kernels import scaled_products as kernels

    assert gy.tile is x.tile is Tile.COLUMN, (gy.tile, x.tile)
    ends = [len(gy.stored)] if gy.ends_E is None else gy.ends_E.tolist()
    stops, ends_E = np.array(column_ends(ends), np.int64), np.array(ends, np.int32)
    return kernels.weight_gradient(gy.stored, gy.scales, x.stored, x.scales, stops, ends_E)


def _widened(q: Quantised) -> Tensor:
    """The numbers in FP32, in the order in which memory holds them: an operand is often a transpose, and one with
    ``ends_E`` always."""
    turned = q.ends_E is not None or not q.stored.is_contiguous()
    return dequantise(q.t()).transpose(-1, -2) if turned else dequantise(q)


class ScaledMM(Gemm):
    """Hopper's tensor cores through torch's block-scaled product, which cuBLAS has since CUDA 12.9. Sizes are padded to
    multiples of 16, and of 128 along K; both operands have K contiguous. Experts take turns."""

    name = "scaled_mm"

    def product(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        if not (a.stored.numel() and b.stored.numel()):
            return a.scales.new_zeros(a.stored.shape[0], b.stored.shape[0], dtype=dtype)
        return scaled_mm(*_operand(a), *_operand(b), dtype)[: a.stored.shape[0], : b.stored.shape[0]]


def scaled_mm(a: Tensor, sa: Tensor, a_tile: Tile, b: Tensor, sb: Tensor, b_tile: Tile, dtype: torch.dtype) -> Tensor:
    recipe = {Tile.ROW: F.ScalingType.BlockWise1x128, Tile.BLOCK: F.ScalingType.BlockWise128x128}
    return F.scaled_mm(a, b.t(), sa, recipe[a_tile], sb, recipe[b_tile], output_dtype=dtype)


def _operand(q: Quantised) -> tuple[Tensor, Tensor, Tile]:
    """A matrix as cuBLAS wants it. Scales of ROW tiles stand column by column, [rows, K / 128]; those of BLOCKs are
    transposed, [K / 128, rows / 128], with K / 128 padded to a multiple of 4 and contiguous."""
    rows, width = q.stored.shape
    padding = (0, -width % SIZE, 0, -rows % 16)
    # Torch pads bytes, not float8; zero bytes are zeros.
    stored = F.pad(q.stored.view(torch.uint8), padding).contiguous().view(torch.float8_e4m3fn)
    if q.tile is Tile.ROW:
        return stored, F.pad(q.scales, (0, 0, 0, padding[3])).t().contiguous().t(), q.tile
    return stored, F.pad(q.scales, (0, -q.scales.shape[1] % 4)).contiguous().t(), q.tile


class Triton(Gemm):
    """Kernels of our own, for one matrix or all experts in one launch. Experimental."""

    name = "triton"

    def __init__(self) -> None:
        from model.fp8 import triton_kernels

        self._kernels = triton_kernels

    def product(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        return self._kernels.product(a, b, None, dtype)

    def by_rows(self, a: Quantised, b: Quantised, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
        return self._kernels.product(a, b, ends_E, dtype)

    def by_columns(self, a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        return self._kernels.product(a, b, None, dtype)

    def rows_and_columns(self, x_TD: Tensor, scale: Scale, ends_E: Tensor | None) -> tuple[Quantised, Quantised]:
        return self._kernels.rows_and_columns(x_TD, scale, ends_E)

    def swiglu_rows(self, x_T2D: Tensor, weights_T: Tensor | None, scale: Scale) -> Quantised:
        return self._kernels.swiglu_rows(x_T2D, weights_T, scale)

    def swiglu_columns(self, x_T2D: Tensor, weights_T: Tensor | None, scale: Scale, ends_E: Tensor | None) -> Quantised:
        return self._kernels.swiglu_columns(x_T2D, weights_T, scale, ends_E)


def _columns(q: Quantised) -> list[Quantised]:
    """The columns of each expert, in ROW tiles of their own."""
    assert q.ends_E is not None and q.tile is Tile.ROW, q
    found, start, first = [], 0, 0
    for stop in q.ends_E.tolist():
        last = first - (start - stop) // SIZE
        part = q.stored[:, start:stop], q.scales[:, first:last]
        found.append(Quantised(*part, q.tile, q.format, stop - start))
        start, first = stop, last
    return found


BACKENDS: dict[str, type[Gemm]] = {of.name: of for of in (Reference, Emulated, ScaledMM, Triton)}


@dataclass(frozen=True)
class Choice:
    """A way to compute products, and why it is this one."""

    gemm: Gemm
    reason: str

    def __str__(self) -> str:
        return f"FP8 products: {self.gemm.name} ({self.reason})"


def choose(name: str, device: torch.device) -> Choice:
    """``name``: a backend or "auto", the fastest that ``device`` has. Raises PrecisionError for one that it has not. A
    CPU's kernels are compiled here, before there is a step to wait for them."""
    choice = _chosen(name, device)
    if device.type == "cpu":
        importlib.import_module("model.kernels.tiles")
        importlib.import_module("model.kernels.scaled_products")
    return choice


def _chosen(name: str, device: torch.device) -> Choice:
    if name == "auto":
        lacking = _lacks_scaled_mm(device)
        if lacking is None:
            return Choice(ScaledMM(), "auto: the device has Hopper's FP8 tensor cores")
        return Choice(Emulated(), f"auto: {lacking}")
    if name not in BACKENDS:
        raise PrecisionError(f"FP8 backend {name!r} must be auto, {', '.join(BACKENDS)}")
    needs = {
        ScaledMM.name: ("a Hopper GPU (SM90) and torch built with CUDA 12.9 or newer", _lacks_scaled_mm),
        Triton.name: ("the package triton and a GPU with FP8 (SM89 or newer), or TRITON_INTERPRET=1", _lacks_triton),
    }
    if name in needs:
        what, lacks = needs[name]
        if (lacking := lacks(device)) is not None:
            raise PrecisionError(
                f"FP8 backend {name} needs {what}, and {lacking}; 'emulated' computes the same anywhere"
            )
    return Choice(BACKENDS[name](), "as asked")


def _lacks_scaled_mm(device: torch.device) -> str | None:
    """What ``device`` lacks for ``ScaledMM``, or None."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is SM{capability[0]}{capability[1]}"
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if version < (12, 9):
        return f"this torch is built with CUDA {torch.version.cuda}"
    return None


def _lacks_triton(device: torch.device) -> str | None:
    """What this process or ``device`` lacks for ``Triton``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} is SM{major}{minor}" if (major, minor) < (8, 9) else None
