"""RMSNorm forward and backward: ``model.norm.rms_norm`` and its gradients.

T rows, D width; ``scale_T`` is 1 / sqrt(mean(x²) + eps) of each row.
"""

import numpy as np
import torch
from torch import Tensor

from model.kernels.calls import array, by_rows
from model.kernels.elementwise import norm_backward, norm_forward

BLOCK_ELEMENTS = 1 << 16
"""Of the rows whose weight gradients are added up in one go."""


def forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..., D] in BF16 -> the same shape and dtype, and the scales, FP32 [T]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    x_TD, y_TD, weight = array(x.contiguous().view(-1, width)), array(y.view(-1, width)), array(weight_D.float())
    scale_T = torch.empty(len(x_TD))
    scales = array(scale_T)
    by_rows(len(x_TD), width, lambda a, b: norm_forward(x_TD[a:b], weight, np.float32(eps), y_TD[a:b], scales[a:b]))
    return y, scale_T


def backward(x: Tensor, weight_D: Tensor, scale_T: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input, BF16, and of the weight, FP32 [D]."""
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    x_TD, gy_TD = (array(of.contiguous().view(-1, width)) for of in (x, gy))
    gx_TD, weight, scales = array(gx.view(-1, width)), array(weight_D.float()), array(scale_T)
    # Summed by blocks of rows that are the same however many threads there are, and so are the bits.
    block = max(BLOCK_ELEMENTS // width, 1)
    gweight_XD = np.zeros((-(-len(x_TD) // block), width), np.float32)

    def run(a: int, b: int) -> None:
        for x in range(a, b):
            rows = slice(x * block, (x + 1) * block)
            norm_backward(x_TD[rows], weight, scales[rows], gy_TD[rows], gx_TD[rows], gweight_XD[x])

    by_rows(len(gweight_XD), block * width, run)
    return gx, torch.from_numpy(gweight_XD.sum(axis=0))
