"""The scheme as Triton kernels: quantising both ways in one pass, with SwiGLU before it, and grouped products.

    x [T, D] -> q in ROW tiles [T, D]  and  q in COLUMN tiles, transposed [D, T]      one read of x, for Dgrad and Wgrad
    h [T, 2F] -> swiglu(h) one way or the other                                       it never reaches memory in BF16
    a [M, K] x b [N, K] -> [M, N], promoted to FP32 every 128 of K                    for all experts in one launch

Experimental: tested in Triton's interpreter on a CPU (TRITON_INTERPRET=1) and compiled for Hopper, not run on a GPU.
They need FP8 tensor cores there (SM89 or newer).

Numbers are rounded in integers, so that they are the definition's (``quantise.py``, ``formats.py``) bit by bit
wherever a kernel runs: Triton's interpreter does not round to even, and maxima drop NaN. T tokens, D and F channels,
M, N outer dims, K summed dim, E experts.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import SIZE
from model.fp8.formats import E4M3
from model.fp8.quantise import Quantised, Scale, Tile

LARGEST = tl.constexpr(E4M3.largest)
SMALLEST_SCALE = tl.constexpr(2.0**-126)
LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)
EDGE = tl.constexpr(SIZE)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Of a launch: a product that is fused with a sum would be rounded once instead of twice."""


@triton.jit
def _e4m3(x):
    """The codes of the nearest E4M3 numbers, ties to even. |x| up to 448 and its rounding, or NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 of FP32's 23 bits of mantissa go; the exponent's bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below the normal numbers the last bit is worth 2^-9, as is FP32's own from 2^14 on.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return tl.where(x == x, code | ((bits >> 24) & 0x80), 0x7F).to(tl.uint8)


@triton.jit
def _bf16(x):
    """The nearest BF16 numbers, ties to even, still in FP32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def _scales(x, AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """``quantise.scale_of`` of the tiles along an axis."""
    magnitude = tl.abs(x)
    spoilt = tl.max((magnitude <= LARGEST_FP32).to(tl.int32) ^ 1, AXIS)
    s = tl.maximum(tl.math.div_rn(tl.max(magnitude, AXIS), LARGEST), SMALLEST_SCALE)
    if POWER_OF_TWO:
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(spoilt != 0, float("nan"), s)


@triton.jit
def _quantise(
    x,
    weights_T,
    rows_TD,
    row_scales,
    columns_DT,
    column_scales,
    bounds,
    tokens,
    width,
    SWIGLU: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """A program has at most 128 tokens, ``bounds[i]`` to ``bounds[i + 1]``, and 128 channels."""
    tile, across = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(bounds + tile), tl.load(bounds + tile + 1)
    t, d = start + tl.arange(0, EDGE), across * EDGE + tl.arange(0, EDGE)
    # Places are counted from the tile's corner: 32 bits hold them there.
    token, channel = tl.arange(0, EDGE)[:, None], tl.arange(0, EDGE)[None, :]
    inside = (t[:, None] < stop) & (d[None, :] < width)
    first_t, first_d = start.to(tl.int64), (across * EDGE).to(tl.int64)
    if SWIGLU:
        gates, at = x + first_t * (2 * width) + first_d, token * (2 * width) + channel
        gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gates + width + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.math.div_rn(gate, 1.0 + tl.exp(-gate)) * up
        if WEIGHTED:
            y = y * tl.load(weights_T + t, mask=t < stop, other=0.0)[:, None]
        if x.dtype.element_ty == tl.bfloat16:
            y = _bf16(y)
    else:
        corner = x + first_t * width + first_d
        y = tl.load(corner + token * width + channel, mask=inside, other=0.0).to(tl.float32)
    if ROWS:
        s = _scales(y, 1, POWER_OF_TWO)
        corner = rows_TD + first_t * width + first_d
        tl.store(corner + token * width + channel, _e4m3(y * tl.math.div_rn(1.0, s)[:, None]), mask=inside)
        tl.store(row_scales + t * tl.num_programs(1) + across, s, mask=t < stop)
    if COLUMNS:
        s = _scales(y, 0, POWER_OF_TWO)
        corner = columns_DT + first_d * tokens + first_t
        tl.store(corner + channel * tokens + token, _e4m3(y * tl.math.div_rn(1.0, s)[None, :]), mask=inside)
        tl.store(column_scales + tile * width + d, s, mask=d < width)


@triton.jit
def _product(
    a,
    sa,
    b,
    sb,
    out,
    tasks,
    n_stop,
    a_m,
    a_k,
    sa_m,
    sa_k,
    b_e,
    b_n,
    b_k,
    sb_e,
    sb_n,
    sb_k,
    out_e,
    out_m,
    B_ROWS: tl.constexpr,
    BF16: tl.constexpr,
):
    """A program makes 128 x 128 results: those of ``tasks[i]``, see ``_tasks``."""
    task = tasks + tl.program_id(0) * 6
    m_start, m_stop, expert = tl.load(task), tl.load(task + 1), tl.load(task + 2).to(tl.int64)
    k_start, k_stop, k_tile = tl.load(task + 3), tl.load(task + 4), tl.load(task + 5)
    n_start = tl.program_id(1) * EDGE
    i, j, k = tl.arange(0, EDGE)[:, None], tl.arange(0, EDGE)[None, :], tl.arange(0, EDGE)
    m, n = m_start + tl.arange(0, EDGE), n_start + tl.arange(0, EDGE)
    # Places are counted from the tile's corner: 32 bits hold them there.
    a += m_start.to(tl.int64) * a_m + k_start.to(tl.int64) * a_k
    b += expert * b_e + n_start.to(tl.int64) * b_n + k_start.to(tl.int64) * b_k
    sa += k_tile * sa_k
    sb += expert * sb_e + k_tile * sb_k
    of_n = n if B_ROWS else n // EDGE
    total = tl.zeros((EDGE, EDGE), tl.float32)
    for _ in range(tl.cdiv(k_stop - k_start, EDGE)):
        left = k_stop - k_start
        qa = tl.load(a + i * a_m + j * a_k, mask=(m[:, None] < m_stop) & (k[None, :] < left), other=0.0)
        qb = tl.load(b + i * b_n + j * b_k, mask=(n[:, None] < n_stop) & (k[None, :] < left), other=0.0)
        scale_m = tl.load(sa + m * sa_m, mask=m < m_stop, other=0.0)
        scale_n = tl.load(sb + of_n * sb_n, mask=n < n_stop, other=0.0)
        total += tl.dot(qa, tl.trans(qb)) * scale_m[:, None] * scale_n[None, :]
        k_start += EDGE
        a += a_k * EDGE
        b += b_k * EDGE
        sa += sa_k
        sb += sb_k
    corner = out + expert * out_e + m_start.to(tl.int64) * out_m + n_start
    result = _bf16(total).to(tl.bfloat16) if BF16 else total
    tl.store(corner + i * out_m + j, result, mask=(m[:, None] < m_stop) & (n[None, :] < n_stop))


def rows_and_columns(x_TD: Tensor, scale: Scale, ends_E: Tensor | None) -> tuple[Quantised, Quantised]:
    """``Gemm.rows_and_columns`` in one pass; the columns are laid out for a sum over tokens."""
    both = _Output(x_TD, x_TD.shape[1], ends_E, rows=True, columns=True)
    both.fill(x_TD, None, False, scale)
    return both.rows, both.columns


def swiglu_rows(x_T2F: Tensor, weights_T: Tensor | None, scale: Scale) -> Quantised:
    """``Gemm.swiglu_rows``, up to the rounding of the exponential."""
    one = _Output(x_T2F, x_T2F.shape[1] // 2, None, rows=True, columns=False)
    one.fill(x_T2F, weights_T, True, scale)
    return one.rows


def swiglu_columns(x_T2F: Tensor, weights_T: Tensor | None, scale: Scale, ends_E: Tensor | None) -> Quantised:
    """``Gemm.swiglu_columns``, up to the same."""
    one = _Output(x_T2F, x_T2F.shape[1] // 2, ends_E, rows=False, columns=True)
    one.fill(x_T2F, weights_T, True, scale)
    return one.columns


class _Output:
    """What ``_quantise`` writes: [T, F] in ROW tiles and in COLUMN tiles, or one of them; the other has no memory."""

    def __init__(self, x: Tensor, width: int, ends_E: Tensor | None, rows: bool, columns: bool) -> None:
        tokens, self._asked = len(x), (rows, columns)
        self._bounds = _bounds([tokens] if ends_E is None else ends_E.tolist())
        down, wide = tokens if rows else 0, width if columns else 0
        by_row, by_column = (
            x.new_empty(shape, dtype=torch.uint8).view(torch.float8_e4m3fn) for shape in ((down, width), (wide, tokens))
        )
        shapes = ((down, -(-width // SIZE)), (len(self._bounds) - 1, wide))
        row_scales, column_scales = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
        self.rows = Quantised(by_row, row_scales, Tile.ROW, E4M3, width)
        self.columns = Quantised(by_column.t(), column_scales, Tile.COLUMN, E4M3, width, ends_E)

    def fill(self, x: Tensor, weights_T: Tensor | None, swiglu: bool, scale: Scale) -> None:
        if not x.numel():
            return
        tokens, width = len(x), self.rows.width
        bounds = torch.tensor(self._bounds, dtype=torch.int32, device=x.device)
        outputs = (
            *(self.rows.stored.view(torch.uint8), self.rows.scales),
            *(self.columns.stored.t().view(torch.uint8), self.columns.scales),
        )
        flags = (swiglu, weights_T is not None, *self._asked, scale is Scale.POWER_OF_TWO)
        x, grid = x.contiguous(), (len(self._bounds) - 1, -(-width // SIZE))
        _quantise[grid](x, x if weights_T is None else weights_T, *outputs, bounds, tokens, width, *flags, **OPTIONS)


def product(a: Quantised, b: Quantised, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``Gemm.product``; with ``ends_E`` ``Gemm.by_rows``, and ``Gemm.by_columns`` for an ``a`` that has its own."""
    (m, k), n, by_columns = a.stored.shape, b.stored.shape[-2], a.ends_E is not None
    ends_E = a.ends_E if by_columns else ends_E
    ends = None if ends_E is None else ends_E.tolist()
    out = a.scales.new_empty(*([len(ends)] if by_columns and ends is not None else []), m, n, dtype=dtype)
    if not out.numel():
        return out
    tasks = torch.tensor(_tasks(m, k, ends, by_columns), dtype=torch.int32, device=out.device)
    strides = (*a.stored.stride(), *a.scales.stride(), *_by_expert(b.stored), *_by_expert(b.scales))
    flags = (b.tile is Tile.ROW, dtype == torch.bfloat16)
    grid = (len(tasks), -(-n // SIZE))
    strides += _by_expert(out)[:2]
    _product[grid](a.stored, a.scales, b.stored, b.scales, out, tasks, n, *strides, *flags, **OPTIONS)
    return out


def _by_expert(t: Tensor) -> tuple[int, int, int]:
    """Strides with that of the expert first; 0 for a matrix alone."""
    return (0, *t.stride()) if t.ndim == 2 else t.stride()  # type: ignore[return-value]


def _bounds(ends: list[int]) -> list[int]:
    """Where COLUMN tiles of rows sorted by expert begin, and the last ends."""
    found: list[int] = []
    for start, stop in pairwise([0, *ends]):
        found += range(start, stop, SIZE)
    return [*found, ends[-1]]


def _tasks(m: int, k: int, ends: list[int] | None, by_columns: bool) -> list[tuple[int, int, int, int, int, int]]:
    """(first row, stop, expert, first of K, stop, its tile): the 128 rows or fewer that a program makes."""
    if ends is None:
        groups = [(0, m, 0, 0, k, 0)]
    elif by_columns:
        groups, tile = [], 0
        for expert, (start, stop) in enumerate(pairwise([0, *ends])):
            groups.append((0, m, expert, start, stop, tile))
            tile += -(-(stop - start) // SIZE)
    else:
        groups = [(start, stop, expert, 0, k, 0) for expert, (start, stop) in enumerate(pairwise([0, *ends]))]
    return [(row, min(row + SIZE, group[1]), *group[2:]) for group in groups for row in range(*group[:2], SIZE)]
