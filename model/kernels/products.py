"""The three products of linear layers, for rows sorted by expert: each is one kernel over all experts.

An expert's weights, or its rows, are packed once a product; its sums stay in registers and are rounded once. Weight
gradients are added to FP32 as they are. Threads share the columns of what is written.

R rows sorted by expert, E experts, D inputs, F outputs; M, N, P, J as in ``panels``.
"""

import numpy as np
import torch
from torch import Tensor

from model.kernels.calls import array, by_rows
from model.kernels.jit import helper, kernel
from model.kernels.panels import PAIR, address, pack_columns, pack_rows, panels_of, tile
from model.kernels.registers import COLUMNS, ROWS, available
from model.kernels.scalars import narrow


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are for ``x`` [..., D] and weights [..., F, D] on this machine."""
    even = not (weight.shape[-1] | weight.shape[-2]) & 1
    return x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and even and available()


def forward(x: Tensor, weight_EFD: Tensor, ends_E: np.ndarray) -> Tensor:
    """x Wᵀ: [..., D] -> [..., F], BF16."""
    _, outputs, inputs = weight_EFD.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    x_RD, y_RF, w = array(x.contiguous().view(-1, inputs)), array(y.view(-1, outputs)), array(weight_EFD)
    by_rows(_panels(outputs), COLUMNS * len(x_RD), lambda a, b: _forward(x_RD, w, ends_E, a, b, y_RF))
    return y


def input_gradient(gy: Tensor, weight_EFD: Tensor, ends_E: np.ndarray) -> Tensor:
    """gy W: [..., F] -> [..., D], BF16."""
    _, outputs, inputs = weight_EFD.shape
    gx = gy.new_empty(*gy.shape[:-1], inputs)
    gy_RF, gx_RD, w = array(gy.contiguous().view(-1, outputs)), array(gx.view(-1, inputs)), array(weight_EFD)
    by_rows(_panels(inputs), COLUMNS * len(gx_RD), lambda a, b: _input_gradient(gy_RF, w, ends_E, a, b, gx_RD))
    return gx


def add_weight_gradient(gy: Tensor, x: Tensor, ends_E: np.ndarray, buffer_EFD: Tensor) -> None:
    """FP32 ``buffer_EFD`` += gyᵀ x."""
    _, outputs, inputs = buffer_EFD.shape
    gy_RF, x_RD = array(gy.contiguous().view(-1, outputs)), array(x.contiguous().view(-1, inputs))
    buffer = array(buffer_EFD)
    by_rows(_panels(inputs), COLUMNS * len(x_RD), lambda a, b: _weight_gradient(gy_RF, x_RD, ends_E, a, b, buffer))


def _panels(columns: int) -> int:
    return -(-columns // COLUMNS)


@helper
def round_to(c_MJ, done, y_RF, row, start):
    """The first ``done`` rows of a tile, to BF16, from ``row`` and the column ``start`` on."""
    for m in range(done):
        c, y = c_MJ[m], y_RF[row + m, start : start + COLUMNS]
        for j in range(len(y)):
            y[j] = narrow(c[j])


@helper
def add_to(c_MJ, done, g_FD, row, start):
    for m in range(done):
        c, g = c_MJ[m], g_FD[row + m, start : start + COLUMNS]
        for j in range(len(g)):
            g[j] += c[j]


@helper
def multiply(x_RD, first, last, pairs, b_NPJ, panel, c_MJ, y_RF):
    """Rows from ``first`` to ``last`` times the panels, which are those from ``panel`` on of what is written."""
    for n in range(b_NPJ.shape[0]):
        row = first
        while row < last:
            a = address(x_RD[row:])
            done = tile(last - row, a, x_RD.strides[0], PAIR, pairs, address(b_NPJ[n]), address(c_MJ))
            round_to(c_MJ, done, y_RF, row, COLUMNS * (panel + n))
            row += done


@kernel("void(int16[:,::1], int16[:,:,::1], int32[::1], int64, int64, int16[:,::1])", able=available())
def _forward(x_RD, w_EFD, ends_E, panel, stop, y_RF):
    pairs, first = x_RD.shape[1] // 2, 0
    b_NPJ, c_MJ = np.empty((stop - panel, pairs, COLUMNS), np.int32), np.empty((ROWS, COLUMNS), np.float32)
    for e in range(len(ends_E)):
        if ends_E[e] > first:
            pack_columns(w_EFD[e], panel, b_NPJ)
            multiply(x_RD, first, ends_E[e], pairs, b_NPJ, panel, c_MJ, y_RF)
        first = ends_E[e]


@kernel("void(int16[:,::1], int16[:,:,::1], int32[::1], int64, int64, int16[:,::1])", able=available())
def _input_gradient(gy_RF, w_EFD, ends_E, panel, stop, gx_RD):
    pairs, first = gy_RF.shape[1] // 2, 0
    b_NPJ, c_MJ = np.empty((stop - panel, pairs, COLUMNS), np.int32), np.empty((ROWS, COLUMNS), np.float32)
    for e in range(len(ends_E)):
        if ends_E[e] > first:
            pack_rows(w_EFD[e], panel, b_NPJ)
            multiply(gy_RF, first, ends_E[e], pairs, b_NPJ, panel, c_MJ, gx_RD)
        first = ends_E[e]


@kernel("void(int16[:,::1], int16[:,::1], int32[::1], int64, int64, float32[:,:,::1])", able=available())
def _weight_gradient(gy_RF, x_RD, ends_E, panel, stop, g_EFD):
    outputs, most, first = gy_RF.shape[1], 0, 0
    for e in range(len(ends_E)):
        most, first = max(most, (ends_E[e] - first + 1) // 2), ends_E[e]
    a_NPJ = np.empty((panels_of(outputs), most, COLUMNS), np.int32)
    b_NPJ, c_MJ, first = np.empty((stop - panel, most, COLUMNS), np.int32), np.empty((ROWS, COLUMNS), np.float32), 0
    for e in range(len(ends_E)):
        pairs = (ends_E[e] - first + 1) // 2
        if pairs > 0:
            pack_rows(gy_RF[first : ends_E[e]], 0, a_NPJ)
            pack_rows(x_RD[first : ends_E[e]], panel, b_NPJ)
            row = 0
            while row < outputs:
                left, done = min(outputs - row, COLUMNS - row % COLUMNS), 0
                a = address(a_NPJ[row // COLUMNS, 0, row % COLUMNS :])
                for n in range(stop - panel):
                    done = tile(left, a, PAIR, PAIR * COLUMNS, pairs, address(b_NPJ[n]), address(c_MJ))
                    add_to(c_MJ, done, g_EFD[e], row, COLUMNS * (panel + n))
                row += done
        first = ends_E[e]
