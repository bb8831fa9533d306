"""RMSNorm forward and backward: ``model.norm.rms_norm`` and its gradients.

T rows, D width; ``scale_T`` is 1 / sqrt(mean(x²) + eps) of each row.
"""

import numpy as np
import torch
from torch import Tensor

from model.kernels.calls import array, by_rows
from model.kernels.compiled import norm_backward, norm_forward


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
    parts: list[np.ndarray] = []

    def run(a: int, b: int) -> None:
        gweight_D = np.zeros(width, np.float32)
        parts.append(gweight_D)
        norm_backward(x_TD[a:b], weight, scales[a:b], gy_TD[a:b], gx_TD[a:b], gweight_D)

    by_rows(len(x_TD), width, run)
    return gx, torch.from_numpy(parts[0] if len(parts) == 1 else np.sum(parts, axis=0))
