"""E4M3 in tiles: ``model.fp8.quantise.quantise`` and ``dequantise``, bit by bit.

T rows, D columns, X and Y tiles down and across.
"""

import numpy as np
import torch
from torch import Tensor

from model.fp8 import SIZE
from model.kernels.calls import array, by_rows
from model.kernels.e4m3 import quantise_columns, quantise_rows, widen_columns, widen_rows


def rows(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """FP32 or BF16 -> E4M3 in tiles of 1 x 128, and the scales."""
    stored, scales_TY = _stored(x_TD), torch.empty(len(x_TD), -(-x_TD.shape[1] // SIZE))
    x, codes, scales = array(x_TD.contiguous()), array(stored), array(scales_TY)
    by_rows(len(x), x.shape[1], lambda a, b: quantise_rows(x[a:b], power_of_two, codes[a:b], scales[a:b]))
    return stored, scales_TY


def columns(x_TD: Tensor, stop_X: list[int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The same in tiles of one column; ``stop_X``: where the tiles end."""
    stored, scales_XD = _stored(x_TD), torch.empty(len(stop_X), x_TD.shape[1])
    x, codes, scales = array(x_TD.contiguous()), array(stored), array(scales_XD)
    stops = np.array(stop_X, np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])[: len(stops)]
    by_rows(
        len(stops),
        SIZE * x_TD.shape[1],
        lambda a, b: quantise_columns(x, starts[a:b], stops[a:b], power_of_two, codes, scales[a:b]),
    )
    return stored, scales_XD


def tiles_of_rows(height: int, tile_rows: int, matrices: int) -> np.ndarray:
    """The row of tiles in which each row is, of matrices that lie one under the other."""
    tile_T = np.arange(height) // tile_rows
    return tile_T if matrices == 1 else (np.arange(matrices)[:, None] * -(-height // tile_rows) + tile_T).ravel()


def widen(stored_TD: Tensor, tile_T: np.ndarray, scales: Tensor, tile_columns: int) -> Tensor:
    """E4M3 -> FP32; ``tile_T``: the row of tiles in which each row is; ``tile_columns``: 128 or 1."""
    out = torch.empty(stored_TD.shape)
    codes, tile_of, of, x = array(stored_TD.contiguous()), tile_T, array(scales.contiguous()), array(out)
    kernel = widen_columns if tile_columns == 1 else widen_rows
    by_rows(len(x), x.shape[1], lambda a, b: kernel(codes[a:b], tile_of[a:b], of, x[a:b]))
    return out


def _stored(x_TD: Tensor) -> Tensor:
    return torch.empty(x_TD.shape, dtype=torch.float8_e4m3fn)
