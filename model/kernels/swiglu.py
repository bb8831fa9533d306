"""SwiGLU forward and backward, [T, 2F] -> [T, F]: ``model.mlp.swiglu`` and its gradients.

T rows, F width; ``weights_T`` are the rows' gate values, or empty.
"""

import numpy as np
import torch
from torch import Tensor

from model.kernels.calls import array, by_rows
from model.kernels.elementwise import swiglu_backward, swiglu_forward


def forward(x: Tensor, weights_T: Tensor | None) -> Tensor:
    """[..., 2F] -> [..., F] in the dtype of ``x``, BF16 or FP32."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    x_T2F, weights, y_TF = array(x.contiguous().view(-1, 2 * width)), _weights(weights_T), array(y.view(-1, width))
    by_rows(len(y_TF), width, lambda a, b: swiglu_forward(x_T2F[a:b], weights[a:b], y_TF[a:b]))
    return y


def backward(x: Tensor, weights_T: Tensor | None, gy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input, BF16, and of the gate values, FP32; ``x`` and ``gy`` in BF16 or both in FP32."""
    width, gx = gy.shape[-1], torch.empty(x.shape, dtype=torch.bfloat16)
    gweights_T = None if weights_T is None else torch.empty_like(weights_T)
    x_T2F, gx_T2F = array(x.contiguous().view(-1, 2 * width)), array(gx.view(-1, 2 * width))
    gy_TF, weights, gweights = array(gy.contiguous().view(-1, width)), _weights(weights_T), _weights(gweights_T)
    by_rows(
        len(gy_TF),
        width,
        lambda a, b: swiglu_backward(x_T2F[a:b], weights[a:b], gy_TF[a:b], gx_T2F[a:b], gweights[a:b]),
    )
    return gx, gweights_T


def _weights(weights_T: Tensor | None) -> np.ndarray:
    return np.empty(0, np.float32) if weights_T is None else array(weights_T)
