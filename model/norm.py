"""RMSNorm: y = x / sqrt(mean(x²) + eps) · w, computed in FP32 whatever the dtype of x."""

from typing import Any

import torch
from torch import Tensor, nn

from model.linear import Owned, WeightGradients


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition. ``x``: [..., D], ``weight``: [D]."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


class _OwnedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, eps: float, owner: WeightGradients) -> Tensor:
        x32 = x.float()
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.weight, ctx.owner = weight, owner
        return (x32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x · scale: gx = scale · (gy w - n · mean(gy w n)), gw = sum over rows of gy n.
        x, weight, scale = ctx.saved_tensors
        gy32 = grads[0].float()
        normal = x.float() * scale
        gyn = gy32 * normal
        ctx.owner.add(ctx.weight, lambda buffer: buffer.add_(gyn.reshape(-1, gyn.shape[-1]).sum(0)))
        mean = (gyn @ weight.float()).div_(x.shape[-1]).unsqueeze_(-1)
        gx = normal.mul_(mean).neg_().addcmul_(gy32, weight.float()).mul_(scale)
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
