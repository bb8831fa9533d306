"""Tensors in a narrow format with one scale for each small tile (DeepSeek-V3 report, 3.3.2).

Of a tile with largest magnitude a, and M the largest number of the format:

    s = max(a / M, 2^-126)                rounded up to a power of two where that is asked for
    q = the number of the format nearest to x · (1 / s), 1 / s rounded to FP32
    x̂ = q · s

so s is always a normal number with a normal inverse, a tile of zeros gives zeros, and magnitudes too small for the tile
become subnormal numbers of the format or zero. A tile that holds an infinity or NaN has s = NaN (0x7FC00000), and all
of it is and reads as NaN. Scales come from the tensor itself, not from its history.

Tiles: ROW 1 x 128 (a token, 128 channels), COLUMN 128 x 1 (128 tokens, a channel), BLOCK 128 x 128 (weights). At the
end of a row or column they are smaller. COLUMN tiles of rows sorted by expert begin anew at each expert.

T rows, D columns, E experts, X and Y tiles down and across.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor

from model.fp8 import SIZE
from model.fp8.formats import E4M3, Format, decode, encode, round_to

SMALLEST_SCALE = 2.0**-126
_CACHED = 1 << 18  # numbers that a pass works on: their FP32 operands stay in a core's cache


class Tile(Enum):
    """(rows, columns)."""

    ROW = (1, SIZE)
    COLUMN = (SIZE, 1)
    BLOCK = (SIZE, SIZE)

    def turned(self) -> "Tile":
        return Tile(self.value[::-1])


class Scale(Enum):
    FP32 = "fp32"
    POWER_OF_TWO = "power of two"


@dataclass(frozen=True)
class Quantised:
    """``stored``: a matrix [T, D] as ``formats.encode`` gives it, or one for each expert [E, T, D]; ``scales``: FP32
    [(E,) X, Y]. ``ends_E``: where each expert's rows end, if COLUMN tiles begin anew there."""

    stored: Tensor
    scales: Tensor
    tile: Tile
    format: Format
    width: int
    ends_E: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes + self.scales.nbytes

    def t(self) -> "Quantised":
        """The transpose, a view. The ``ends_E`` of its rows are then those of its columns."""
        assert self.format is E4M3, self.format
        stored, scales = self.stored.transpose(-1, -2), self.scales.transpose(-1, -2)
        return Quantised(stored, scales, self.tile.turned(), self.format, stored.shape[-1], self.ends_E)

    def rows(self, start: int, stop: int) -> "Quantised":
        """A view of some rows of a matrix in ROW tiles."""
        assert self.tile is Tile.ROW and self.ends_E is None, self
        return Quantised(self.stored[start:stop], self.scales[start:stop], self.tile, self.format, self.width)

    def matrix(self, expert: int) -> "Quantised":
        """A view of one expert's matrix."""
        return Quantised(self.stored[expert], self.scales[expert], self.tile, self.format, self.width)


@torch.no_grad()
def quantise(
    x: Tensor, tile: Tile, scale: Scale = Scale.FP32, to: Format = E4M3, ends_E: Tensor | None = None
) -> Quantised:
    """``x``: [T, D] or [E, T, D] in FP32 or BF16. ``ends_E``: int32, the last T; for COLUMN tiles alone."""
    if ends_E is not None:
        assert tile is Tile.COLUMN and to is E4M3, (tile, to)
    if x.device.type == "cpu" and x.ndim == 2 and to is E4M3 and tile is not Tile.BLOCK:
        return _quantise_by_kernel(x, tile, scale, ends_E)
    return _quantise_by_operators(x, tile, scale, to, ends_E)


def _quantise_by_operators(x: Tensor, tile: Tile, scale: Scale, to: Format, ends_E: Tensor | None) -> Quantised:
    if ends_E is not None:
        return _quantise_groups(x, scale, ends_E)
    *lead, height, width = x.shape
    scales = x.new_empty(*lead, -(-height // tile.value[0]), -(-width // tile.value[1]), dtype=torch.float32)
    stored = x.new_empty(*lead, height, to.stored_width(width), dtype=to.dtype)
    for rows, tiles in _passes(x, tile):
        part, of = x[..., rows, :].to(torch.float32, copy=True), scales[..., tiles, :]
        blocks = list(_whole_tiles(part, of, tile))
        for block, amax in blocks:
            torch.amax(block.abs(), (-3, -1), out=amax)
        of.copy_(scale_of(of, scale, to))
        inverse = of.reciprocal()
        for (block, _), (_, r) in zip(blocks, _whole_tiles(part, inverse, tile), strict=True):
            block.mul_(r.unsqueeze(-2).unsqueeze(-1))
        stored[..., rows, :].copy_(encode(part, to))
    return Quantised(stored, scales, tile, to, width)


def _quantise_by_kernel(x_TD: Tensor, tile: Tile, scale: Scale, ends_E: Tensor | None) -> Quantised:
    from model.kernels import tiles as kernels

    rounded = scale is Scale.POWER_OF_TWO
    if tile is Tile.ROW:
        stored, scales = kernels.rows(x_TD, rounded)
    else:
        stored, scales = kernels.columns(x_TD, column_ends([len(x_TD)] if ends_E is None else ends_E.tolist()), rounded)
    return Quantised(stored, scales, tile, E4M3, x_TD.shape[1], ends_E)


def column_ends(ends: Iterable[int]) -> list[int]:
    """Where COLUMN tiles end that begin anew at each of ``ends``."""
    stops, start = [], 0
    for stop in ends:
        stops += [*range(start + SIZE, stop, SIZE), stop] if start < stop else []
        start = stop
    return stops


def _quantise_groups(x_TD: Tensor, scale: Scale, ends_E: Tensor) -> Quantised:
    """COLUMN tiles that begin anew at each expert, in few passes: the experts may be many and their rows few."""
    wide, magnitude = x_TD.float(), x_TD.abs().float()
    tiles_E, tile_T = _group_tiles(ends_E)
    scales = wide.new_empty(tiles_E[-1], x_TD.shape[1])
    start, first = 0, 0
    for stop, last in zip(ends_E.tolist(), tiles_E, strict=True):
        for block, amax in _whole_tiles(magnitude[start:stop], scales[first:last], Tile.COLUMN):
            torch.amax(block, (-3, -1), out=amax)
        start, first = stop, last
    scales = scale_of(scales, scale, E4M3)
    stored = encode(wide * scales.reciprocal().index_select(0, tile_T), E4M3)
    return Quantised(stored, scales, Tile.COLUMN, E4M3, x_TD.shape[1], ends_E)


@torch.no_grad()
def dequantise(q: Quantised) -> Tensor:
    """x̂ in FP32, exact for power-of-two scales and one rounding of the product otherwise."""
    if q.ends_E is not None:
        assert q.tile is Tile.COLUMN, q.tile
    if q.stored.device.type == "cpu" and q.format is E4M3:
        return _widen_by_kernel(q)
    return _dequantise_by_operators(q)


def _dequantise_by_operators(q: Quantised) -> Tensor:
    if q.ends_E is not None:
        _, tile_T = _group_tiles(q.ends_E)
        return decode(q.stored, q.format, q.width).mul_(q.scales.index_select(0, tile_T))
    out = q.scales.new_empty(*q.stored.shape[:-1], q.width)
    for rows, tiles in _passes(out, q.tile):
        part = out[..., rows, :]
        part.copy_(decode(q.stored[..., rows, :], q.format, q.width))
        for block, of in _whole_tiles(part, q.scales[..., tiles, :], q.tile):
            block.mul_(of.unsqueeze(-2).unsqueeze(-1))
    return out


def _widen_by_kernel(q: Quantised) -> Tensor:
    from model.kernels import tiles as kernels

    down, across = q.tile.value
    *lead, height, width = q.stored.shape
    if q.ends_E is None:  # of all experts, one matrix under the other
        tile_T = kernels.tiles_of_rows(height, down, math.prod(lead))
    else:
        tile_T = _group_tiles(q.ends_E)[1].numpy()
    wide = kernels.widen(q.stored.flatten(0, -2), tile_T, q.scales.flatten(0, -2), across)
    return wide.view(*lead, height, width)


def requantise(q: Quantised, tile: Tile, scale: Scale, ends_E: Tensor | None = None) -> Quantised:
    """The same numbers in other tiles, in E4M3: what the weight gradient's product needs of a stored activation (the
    transpose is in the strides). With power-of-two scales on both sides only subnormal numbers of the old or the new
    tile change."""
    return quantise(dequantise(q), tile, scale, E4M3, ends_E)


def scale_of(amax: Tensor, scale: Scale, to: Format) -> Tensor:
    """s of tiles with these largest magnitudes, FP32."""
    s = (amax / to.largest).clamp_min_(SMALLEST_SCALE)
    if scale is Scale.POWER_OF_TWO:  # carry any bit of the mantissa into the exponent
        s = s.view(torch.int32).add_(0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite(), s, torch.nan)


def _passes(x: Tensor, tile: Tile) -> Iterator[tuple[slice, slice]]:
    """(rows, tiles down) of [..., T, D] to work on at once: all on a GPU, what fits a cache on a CPU."""
    height, tile_rows = x.shape[-2], tile.value[0]
    if not x.numel():
        return
    at_once = height
    if x.device.type == "cpu":
        at_once = max(_CACHED * height // x.numel() // tile_rows, 1) * tile_rows
    for start in range(0, height, at_once):
        stop = min(start + at_once, height)
        yield slice(start, stop), slice(start // tile_rows, -(-stop // tile_rows))


def _whole_tiles(x: Tensor, scales: Tensor, tile: Tile) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut [..., T, D] into what is full tiles and the smaller ones at the ends, as views: ([..., X, rows of a tile, Y,
    columns of a tile], scales [..., X, Y])."""
    for rows, tile_rows, down in _ranges(x.shape[-2], tile.value[0]):
        for columns, tile_columns, across in _ranges(x.shape[-1], tile.value[1]):
            block = x[..., rows, columns].unflatten(-1, (-1, tile_columns)).unflatten(-3, (-1, tile_rows))
            yield block, scales[..., down, across]


def _ranges(length: int, size: int) -> Iterator[tuple[slice, int, slice]]:
    """(elements, size of their tiles, the tiles): the full tiles, then a last one that is smaller."""
    full = length // size
    if full:
        yield slice(0, full * size), size, slice(0, full)
    if length % size:
        yield slice(full * size, length), length % size, slice(full, full + 1)


def _group_tiles(ends_E: Tensor) -> tuple[list[int], Tensor]:
    """(how many COLUMN tiles end with each expert, the tile of each row). On a GPU the host waits for ``ends_E``."""
    ends = ends_E.tolist()
    stops = column_ends(ends)
    lengths = torch.tensor([stop - start for start, stop in pairwise([0, *stops])], dtype=torch.int64)
    return [bisect_right(stops, end) for end in ends], torch.repeat_interleave(lengths.to(ends_E.device))


def quantise_reference(
    x: Tensor, tile: Tile, scale: Scale = Scale.FP32, to: Format = E4M3, ends_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, tile by tile, of a matrix [T, D]: (q in FP32, the scales [X, Y])."""
    q, scales = torch.empty(x.shape), []
    height, width = tile.value
    ends = [len(x)] if ends_E is None else ends_E.tolist()
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        for top in range(start, stop, height):
            of_row = []
            for left in range(0, x.shape[1], width):
                part = (slice(top, min(top + height, stop)), slice(left, left + width))
                s = scale_of(x[part].float().abs().amax(), scale, to)
                q[part] = round_to(x[part].float() * s.reciprocal(), to)
                of_row.append(s)
            scales.append(torch.stack(of_row) if of_row else torch.empty(0))
    return q, torch.stack(scales) if scales else torch.empty(0, -(-x.shape[1] // width))
