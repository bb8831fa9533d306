"""SwiGLU, and the feed-forward halves of a block: one dense MLP, or shared and routed experts.

    swiglu(g, u) = silu(g) · u          mlp(x) = W_down swiglu(W_gate x, W_up x)

Gate and up projection are one matrix, gate first. A routed expert's gate value multiplies the narrow activation rather
than its wide output: the same product, and combine is then a plain sum that can be made in parts on the way back.

T tokens, D model, F width of the MLP, E experts, R rows sorted by expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.filling import Filling
from model.fp8.payload import Handover
from model.fp8.quantise import Quantised
from model.kernels import calls
from model.kernels import swiglu as kernels
from model.linear import GroupedLinear, Linear, Owned, compiles_shapes
from model.recompute import Recomputation


def swiglu(x_T2F: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """The definition, in FP32: silu of the first half times the second, times the row's gate value if there is one."""
    gate, up = x_T2F.float().chunk(2, dim=-1)
    y = F.silu(gate) * up
    return (y if weights_T is None else y * weights_T.unsqueeze(-1)).to(x_T2F.dtype)


def activate(x_T2F: Tensor, weights_T: Tensor | None) -> Tensor:
    """``swiglu`` without a gradient, by a kernel where there is one."""
    if x_T2F.device.type == "cpu":
        return kernels.forward(x_T2F, weights_T)
    return swiglu(x_T2F, weights_T)


class _SwiGLU(torch.autograd.Function):
    """The same with a backward that keeps the input alone and makes the activation again."""

    @staticmethod
    def forward(ctx: Any, x_T2F: Tensor, weights_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_T2F, weights_T)
        if calls.serves(x_T2F):
            return kernels.forward(x_T2F, weights_T)
        gate, up = x_T2F.float().chunk(2, dim=-1)
        y = F.silu(gate).mul_(up)
        if weights_T is not None:
            y.mul_(weights_T.unsqueeze(-1))
        return y.to(x_T2F.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_T2F, weights_T = ctx.saved_tensors
        return swiglu_backward(x_T2F, weights_T, grads[0], x_T2F.dtype)


def swiglu_backward(
    x_T2F: Tensor, weights_T: Tensor | None, gy_TF: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input, in ``dtype``, and of the gate values, in FP32; computed in FP32."""
    if dtype == torch.bfloat16 and x_T2F.device.type == "cpu":
        return kernels.backward(x_T2F, weights_T, gy_TF)
    gate, up = (half.float() for half in x_T2F.chunk(2, dim=-1))  # one after the other, where they are copies
    gy = gy_TF.float()
    silu, gsilu, gweights_T = F.silu(gate), gy * up, None
    if weights_T is not None:
        gweights_T = torch.mul(silu, gsilu).sum(-1)
        silu.mul_(weights_T.unsqueeze(-1))
        gsilu.mul_(weights_T.unsqueeze(-1))
    gx_T2F = torch.empty_like(x_T2F, dtype=dtype)
    ggate, gup = gx_T2F.chunk(2, dim=-1)
    gup.copy_(silu.mul_(gy))
    ggate.copy_(torch.ops.aten.silu_backward(gsilu, gate))
    return gx_T2F, gweights_T


class MLP(Owned):
    """[..., D] -> [..., D]."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * width)
        self.down = Linear(width, hidden)

    def forward(self, x: Tensor, again: Recomputation | None = None) -> Tensor:
        again = again or Recomputation()
        h = self.gate_up(x, again)
        if self.down.products is not None:
            return self.down.products.swiglu_linear(h, None, self.down.weight, self.down.owner, None)
        return self.down(again("swiglu", swiglu if self.owner is None else _SwiGLU.apply, h, None))


class Experts(Owned):
    """The routed experts with the global numbers ``experts``, over rows already sorted by expert."""

    def __init__(self, config: ModelConfig, experts: Sequence[int]) -> None:
        super().__init__()
        self.experts = experts
        width = config.moe_intermediate_size
        self.gate_up = GroupedLinear(len(experts), config.hidden_size, 2 * width)
        self.down = GroupedLinear(len(experts), width, config.hidden_size)

    def forward(
        self,
        rows_RD: Tensor,
        weights_R: Tensor,
        ends_E: Tensor,
        payload: Quantised | None = None,
        handover: Handover | None = None,
        again: Recomputation | None = None,
    ) -> Tensor:
        """``payload``: the rows as they came in FP8, for the layer's ``products``, as the gradient of what is returned
        will in ``handover``."""
        again = again or Recomputation()
        fills = any(compiles_shapes(rows_RD, layer.weight) for layer in (self.gate_up, self.down))
        if self.owner is None or self.gate_up.products is not None or not fills:
            return self._compute(rows_RD, weights_R, ends_E, payload, handover, again)
        filling = Filling.of(ends_E)
        y_PD = self._compute(filling.fill(rows_RD), filling.fill(weights_R), filling.ends_E, None, None, again)
        return filling.unfill(y_PD)

    def _compute(
        self,
        rows_RD: Tensor,
        weights_R: Tensor,
        ends_E: Tensor,
        payload: Quantised | None,
        handover: Handover | None,
        again: Recomputation,
    ) -> Tensor:
        h = self.gate_up(rows_RD, ends_E, payload)
        if self.down.products is not None:
            return self.down.products.swiglu_linear(h, weights_R, self.down.weight, self.down.owner, ends_E, handover)
        assert handover is None, "a layer without products reads the gradient that autograd hands it"
        return self.down(again("swiglu", swiglu if self.owner is None else _SwiGLU.apply, h, weights_R), ends_E)
