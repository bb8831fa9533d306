"""RMSNorm: y = x / sqrt(mean(x²) + eps) · w, computed in FP32 whatever the dtype of x."""

from typing import Any

import torch
from torch import Tensor, nn

from model.kernels import calls
from model.kernels import norm as kernels
from model.linear import Owned, WeightGradients


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition. ``x``: [..., D], ``weight``: [D]."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


class _OwnedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, eps: float, owner: WeightGradients) -> Tensor:
        ctx.weight, ctx.owner = weight, owner
        if calls.serves(x):
            y, scale = kernels.forward(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return y
        x32 = x.float()
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # gx = scale · (gy w - x · scale² · mean(gy w x)), gw = sum over rows of gy x · scale.
        x, weight, scale = ctx.saved_tensors
        if calls.serves(x):
            gx, gweight = kernels.backward(x, weight, scale, grads[0])
            ctx.owner.add(ctx.weight, lambda buffer: buffer.add_(gweight))
            return gx, None, None, None
        x32, gy32, weight32, width = x.float(), grads[0].float(), weight.float(), x.shape[-1]
        gyx = gy32 * x32
        ctx.owner.add(ctx.weight, lambda buffer: buffer.addmv_(gyx.reshape(-1, width).t(), scale.view(-1)))
        mean = (gyx @ weight32).div_(-width).unsqueeze_(-1).mul_(scale.pow(3))
        gx = (x32 * mean).addcmul_(gy32 * weight32, scale)
        return gx.to(x.dtype), None, None, None


class RMSNorm(Owned):
    """RMSNorm over the last dimension, with a learnt weight [D]."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.owner is None:
            return rms_norm(x, self.weight, self.eps)
        return _OwnedRMSNorm.apply(x, self.weight, self.eps, self.owner)
