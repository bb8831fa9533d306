"""Products of E4M3 as ``model.fp8.gemm`` defines them: codes multiply as BF16, which they are exactly, and the sum over
each tile of 128 is scaled and added to an FP32 sum.

M rows of the left operand, N columns of the result, K summed dim, Y tiles along it; E experts, T rows sorted by expert,
F outputs and D inputs of a layer; X tiles of rows, each within one expert; P, J as in ``panels``.
"""

import numpy as np
import torch
from torch import Tensor

from model.fp8 import SIZE
from model.kernels.calls import array
from model.kernels.e4m3 import from_e4m3
from model.kernels.jit import helper, kernel
from model.kernels.panels import by_panels, pack_columns, pack_rows, panels_of, tile_of_packed, tile_of_rows
from model.kernels.registers import COLUMNS, ROWS, available
from model.kernels.scalars import narrow, rounded

PAIRS = SIZE // 2
BLOCK = SIZE // COLUMNS
"""Panels."""


def by_blocks(
    a_MK: Tensor, sa_MY: Tensor, w_EFD: Tensor, sw_EXY: Tensor, turned: bool, ends_E: np.ndarray, dtype: torch.dtype
) -> Tensor:
    """Rows in tiles of 1 x 128 times the matrix of their expert in tiles of 128 x 128: [M, D] with Wᵀ -> [M, F], or
    ``turned``, [M, F] with W -> [M, D]; FP32 or BF16."""
    _, outputs, inputs = w_EFD.shape
    out = torch.empty(len(a_MK), inputs if turned else outputs, dtype=dtype)
    read = array(a_MK.contiguous()), array(sa_MY.contiguous()), array(w_EFD.contiguous()), array(sw_EXY.contiguous())
    written = array(out)
    by_panels(out.shape[1], len(out), lambda a, b: _by_blocks(*read, turned, ends_E, a, b, written))
    return out


def weight_gradient(
    gy_TF: Tensor, sgy_XF: Tensor, x_TD: Tensor, sx_XD: Tensor, stop_X: np.ndarray, ends_E: np.ndarray
) -> Tensor:
    """gyᵀ x in FP32 [E, F, D], with scales for each column of a tile of rows; ``stop_X``: where the tiles end."""
    out = torch.zeros(len(ends_E), gy_TF.shape[1], x_TD.shape[1])
    read, written = [array(of.contiguous()) for of in (gy_TF, sgy_XF, x_TD, sx_XD)], array(out)
    by_panels(out.shape[2], len(gy_TF), lambda a, b: _weight_gradient(*read, stop_X, ends_E, a, b, written))
    return out


@helper
def widened(codes_TD):
    """As BF16, with a column of zeros where that makes their number even."""
    rows, width = codes_TD.shape
    wide_TD = np.zeros((rows, width + width % 2), np.int16)
    for t in range(rows):
        codes, wide = codes_TD[t], wide_TD[t, :width]
        for d in range(width):
            wide[d] = narrow(from_e4m3(codes[d]))
    return wide_TD


@helper
def scaled_tiles(a_MK, row, left, sa_MY, b_PJ, s_Y, c_MJ, sum_MJ):
    """Some rows times a panel: the sum over tiles, each scaled by its row's scale and by ``s_Y``. How many rows."""
    sum_MJ[:] = 0
    pairs, done = a_MK.shape[1] // 2, 0
    for y in range(len(s_Y)):
        p = y * PAIRS
        done = tile_of_rows(a_MK[:, 2 * p :], row, left, min(PAIRS, pairs - p), b_PJ[p:], c_MJ)
        for m in range(done):
            scale, c, total = sa_MY[row + m, y] * s_Y[y], c_MJ[m], sum_MJ[m]
            for j in range(COLUMNS):
                total[j] += c[j] * scale
    return done


@kernel(
    "void(uint8[:,::1], float32[:,::1], uint8[:,:,::1], float32[:,:,::1], boolean, int32[::1], int64, int64,"
    " float32[:,::1])",
    "void(uint8[:,::1], float32[:,::1], uint8[:,:,::1], float32[:,:,::1], boolean, int32[::1], int64, int64,"
    " int16[:,::1])",
    able=available(),
)
def _by_blocks(codes_MK, sa_MY, w_EFD, sw_EXY, turned, ends_E, panel, stop, out_MN):
    summed, first = codes_MK.shape[1], 0
    b_NPJ = np.empty((stop - panel, (summed + 1) // 2, COLUMNS), np.int32)
    c_MJ, sum_MJ = np.empty((ROWS, COLUMNS), np.float32), np.empty((ROWS, COLUMNS), np.float32)
    for e in range(len(ends_E)):
        if ends_E[e] > first and summed > 0:
            w_FD, a_MK = widened(w_EFD[e]), widened(codes_MK[first : ends_E[e]])
            if turned:
                pack_rows(w_FD[:, : w_EFD.shape[2]], panel, b_NPJ)
            else:
                pack_columns(w_FD, panel, b_NPJ)
            for n in range(stop - panel):
                block, start, row = (panel + n) // BLOCK, COLUMNS * (panel + n), 0
                s_Y = sw_EXY[e, :, block].copy() if turned else sw_EXY[e, block].copy()
                while row < len(a_MK):
                    left = len(a_MK) - row
                    done = scaled_tiles(a_MK, row, left, sa_MY[first:], b_NPJ[n], s_Y, c_MJ, sum_MJ)
                    for m in range(done):
                        total, out = sum_MJ[m], out_MN[first + row + m, start : start + COLUMNS]
                        for j in range(len(out)):
                            out[j] = rounded(total[j], out[j])
                    row += done
        elif ends_E[e] > first:
            out_MN[first : ends_E[e], COLUMNS * panel : COLUMNS * stop] = 0
        first = ends_E[e]


@kernel(
    "void(uint8[:,::1], float32[:,::1], uint8[:,::1], float32[:,::1], int64[::1], int32[::1], int64, int64,"
    " float32[:,:,::1])",
    able=available(),
)
def _weight_gradient(gy_TF, sgy_XF, x_TD, sx_XD, stop_X, ends_E, panel, stop, out_EFD):
    outputs, inputs = gy_TF.shape[1], x_TD.shape[1]
    a_NPJ = np.empty((panels_of(outputs), PAIRS, COLUMNS), np.int32)
    b_NPJ, c_MJ = np.empty((stop - panel, PAIRS, COLUMNS), np.int32), np.empty((ROWS, COLUMNS), np.float32)
    first, e = 0, 0
    for x in range(len(stop_X)):
        while ends_E[e] <= first:
            e += 1
        pairs = (stop_X[x] - first + 1) // 2
        pack_rows(widened(gy_TF[first : stop_X[x]])[:, :outputs], 0, a_NPJ)
        pack_rows(widened(x_TD[first : stop_X[x]])[:, :inputs], panel, b_NPJ)
        row = 0
        while row < outputs:
            done = 0
            for n in range(stop - panel):
                done = tile_of_packed(a_NPJ, row, outputs, pairs, b_NPJ[n], c_MJ)
                start = COLUMNS * (panel + n)
                scales = sx_XD[x, start : start + COLUMNS]
                for m in range(done):
                    c, out, scale = c_MJ[m], out_EFD[e, row + m, start : start + COLUMNS], sgy_XF[x, row + m]
                    for j in range(len(out)):
                        out[j] += c[j] * scale * scales[j]
            row += done
        first = stop_X[x]
