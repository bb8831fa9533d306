"""The three products of linear layers, for rows sorted by expert: each is one kernel over all experts.

An expert's weights, or its rows, are packed once a product; its sums stay in registers and are rounded once. Weight
gradients are added to FP32 as they are. Threads share the columns of what is written.

R rows sorted by expert, E experts, D inputs, F outputs, K what is summed over and C what comes out, one of the two;
M, N, P, J as in ``panels``.
"""

import numpy as np
import torch
from torch import Tensor

from model.kernels.calls import array
from model.kernels.jit import kernel
from model.kernels.panels import by_panels, pack_columns, pack_rows, panels_of, tile_of_packed, tile_of_rows
from model.kernels.registers import COLUMNS, ROWS, available
from model.kernels.scalars import narrow


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are for ``x`` [..., D] and weights [..., F, D] on this machine."""
    even = not (weight.shape[-1] | weight.shape[-2]) & 1
    return x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and even and available()


def forward(x: Tensor, weight_EFD: Tensor, ends_E: np.ndarray) -> Tensor:
    """x Wᵀ: [..., D] -> [..., F], BF16."""
    return _by_experts(x, weight_EFD, ends_E, turned=False)


def input_gradient(gy: Tensor, weight_EFD: Tensor, ends_E: np.ndarray) -> Tensor:
    """gy W: [..., F] -> [..., D], BF16."""
    return _by_experts(gy, weight_EFD, ends_E, turned=True)


def _by_experts(x: Tensor, weight_EFD: Tensor, ends_E: np.ndarray, turned: bool) -> Tensor:
    columns = weight_EFD.shape[2 if turned else 1]
    y = x.new_empty(*x.shape[:-1], columns)
    x_RK, y_RC, w = array(x.contiguous().view(-1, x.shape[-1])), array(y.view(-1, columns)), array(weight_EFD)
    by_panels(columns, len(x_RK), lambda a, b: _multiply(x_RK, w, turned, ends_E, a, b, y_RC))
    return y


def add_weight_gradient(gy: Tensor, x: Tensor, ends_E: np.ndarray, buffer_EFD: Tensor) -> None:
    """FP32 ``buffer_EFD`` += gyᵀ x."""
    _, outputs, inputs = buffer_EFD.shape
    gy_RF, x_RD = array(gy.contiguous().view(-1, outputs)), array(x.contiguous().view(-1, inputs))
    buffer = array(buffer_EFD)
    by_panels(inputs, len(x_RD), lambda a, b: _add_weight_gradient(gy_RF, x_RD, ends_E, a, b, buffer))


@kernel("void(int16[:,::1], int16[:,:,::1], boolean, int32[::1], int64, int64, int16[:,::1])", able=available())
def _multiply(x_RK, w_EFD, turned, ends_E, panel, stop, y_RC):
    """Rows times Wᵀ of their expert, or W, the ``turned`` one: the panels from ``panel`` to ``stop``."""
    pairs, first = x_RK.shape[1] // 2, 0
    b_NPJ, c_MJ = np.empty((stop - panel, pairs, COLUMNS), np.int32), np.empty((ROWS, COLUMNS), np.float32)
    for e in range(len(ends_E)):
        if ends_E[e] > first:
            if turned:
                pack_rows(w_EFD[e], panel, b_NPJ)
            else:
                pack_columns(w_EFD[e], panel, b_NPJ)
            for n in range(stop - panel):
                start, row = COLUMNS * (panel + n), first
                while row < ends_E[e]:
                    done = tile_of_rows(x_RK, row, ends_E[e] - row, pairs, b_NPJ[n], c_MJ)
                    for m in range(done):
                        c, y = c_MJ[m], y_RC[row + m, start : start + COLUMNS]
                        for j in range(len(y)):
                            y[j] = narrow(c[j])
                    row += done
        first = ends_E[e]


@kernel("void(int16[:,::1], int16[:,::1], int32[::1], int64, int64, float32[:,:,::1])", able=available())
def _add_weight_gradient(gy_RF, x_RD, ends_E, panel, stop, g_EFD):
    outputs, most, first = gy_RF.shape[1], 0, 0
    for e in range(len(ends_E)):
        most, first = max(most, (ends_E[e] - first + 1) // 2), ends_E[e]
    a_NPJ = np.empty((panels_of(outputs), most, COLUMNS), np.int32)
    b_NPJ, c_MJ, first = np.empty((stop - panel, most, COLUMNS), np.int32), np.empty((ROWS, COLUMNS), np.float32), 0
    for e in range(len(ends_E)):
        pairs, row = (ends_E[e] - first + 1) // 2, 0
        if pairs > 0:
            pack_rows(gy_RF[first : ends_E[e]], 0, a_NPJ)
            pack_rows(x_RD[first : ends_E[e]], panel, b_NPJ)
            while row < outputs:
                done = 0
                for n in range(stop - panel):
                    done = tile_of_packed(a_NPJ, row, outputs, pairs, b_NPJ[n], c_MJ)
                    start = COLUMNS * (panel + n)
                    for m in range(done):
                        c, g = c_MJ[m], g_EFD[e, row + m, start : start + COLUMNS]
                        for j in range(len(g)):
                            g[j] += c[j]
                row += done
        first = ends_E[e]
