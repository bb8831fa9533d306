"""The three products of a linear layer in FP8, and what it keeps for its backward (DeepSeek-V3 report, 3.3).

    forward          y = Fprop(x in ROW tiles, W in BLOCKs)             keeps x in ROW tiles: a byte for each number
    backward (I)     gx = Dgrad(gy in ROW tiles, W in BLOCKs)           keeps gy in COLUMN tiles until W
    backward (W)     gW += Wgrad(gy in COLUMN tiles, x from ROW into COLUMN tiles)

A gradient that came in ROW tiles (``payload.py``) is Dgrad's operand as it is, is kept so until W, and goes from ROW
into COLUMN tiles like x. Everything that W needs is fixed by I, so that it gives the same bits whenever it is run.
Masters and gradients stay FP32 and are the business of whoever owns them; an owner who says when the parameters change
gives the layers ``WeightBlocks``, and a weight is quantised once for all micro-batches of a step. After SwiGLU the
layer keeps SwiGLU's input instead of its own, and makes its own again.

T tokens (rows, R if sorted by expert), D inputs, F outputs, (E,) for experts alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.fp8.formats import E4M3, Format
from model.fp8.gemm import Gemm
from model.fp8.payload import Handover
from model.fp8.quantise import Quantised, Scale, Tile, dequantise, quantise, requantise
from model.linear import WeightGradients
from model.mlp import swiglu_backward
from model.recompute import Recomputation


@dataclass(frozen=True)
class Recipe:
    """In what a layer's numbers are held. ``stored``: the format of the input's copy for backward; an E5M6 one has
    power-of-two scales."""

    input_scale: Scale = Scale.FP32
    gradient_scale: Scale = Scale.FP32
    stored: Format = E4M3


class WeightBlocks:
    """Weights in BLOCKs, each quantised when it is first used and kept until ``forget``, which whoever writes the
    parameters calls. One copy serves both orientations: blocks are square, and ``Quantised.t`` is a view."""

    def __init__(self) -> None:
        self._of: dict[nn.Parameter, Quantised] = {}

    def __call__(self, weight: nn.Parameter) -> Quantised:
        if weight not in self._of:
            self._of[weight] = quantise(weight, Tile.BLOCK)
        return self._of[weight]

    def forget(self) -> None:
        self._of.clear()

    @property
    def nbytes(self) -> int:
        return sum(blocks.nbytes for blocks in self._of.values())


class Fp8Products:
    """``model.linear.Products`` in FP8. ``blocks``: the weight as it is kept; without, it is quantised in every
    product."""

    def __init__(self, gemm: Gemm, recipe: Recipe, blocks: WeightBlocks | None = None) -> None:
        self.gemm, self.recipe = gemm, recipe
        self._blocks = partial(quantise, tile=Tile.BLOCK) if blocks is None else blocks

    def linear(
        self,
        x: Tensor,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        payload: Quantised | None = None,
        again: Recomputation | None = None,
    ) -> Tensor:
        x_TD, again = x.reshape(-1, x.shape[-1]), again or Recomputation()
        operand = self.operand(x_TD, again) if payload is None else payload
        y: Tensor = _Fp8Linear.apply(x, weight, owner, ends_E, self, operand, self.kept(x_TD, operand, again))
        return y

    def swiglu_linear(
        self,
        x: Tensor,
        weights_R: Tensor | None,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        handover: Handover | None = None,
    ) -> Tensor:
        y: Tensor = _Fp8SwiGLULinear.apply(x, weights_R, weight, owner, ends_E, self, handover)
        return y

    def operand(self, x_TD: Tensor, again: Recomputation) -> Quantised:
        """The input as Fprop takes it."""
        return _rows(x_TD, self.recipe.input_scale, E4M3, again)

    def kept(self, x_TD: Tensor, operand: Quantised, again: Recomputation) -> Quantised:
        """The input as it is kept for Wgrad."""
        if self.recipe.stored is E4M3:
            return operand
        return _rows(x_TD, Scale.POWER_OF_TWO, self.recipe.stored, again)

    def output(self, operand: Quantised, weight: nn.Parameter, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self.gemm.fprop(operand, self._blocks(weight), ends_E, dtype)

    def gradient(self, gy_TF: Tensor, ends_E: Tensor | None) -> tuple[Quantised, Quantised]:
        """The output gradient as Dgrad and as Wgrad take it."""
        return self.gemm.rows_and_columns(gy_TF, self.recipe.gradient_scale, ends_E)

    def gradient_columns(self, arrived: Quantised, ends_E: Tensor | None) -> Quantised:
        """The output gradient as Wgrad takes it, of one that came as Dgrad does."""
        return requantise(arrived, Tile.COLUMN, self.recipe.gradient_scale, ends_E)

    def input_gradient(self, gy: Quantised, weight: nn.Parameter, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self.gemm.dgrad(gy, self._blocks(weight), ends_E, dtype)

    def input_columns(self, kept: Quantised, ends_E: Tensor | None) -> Quantised:
        """The input as Wgrad takes it."""
        return requantise(kept, Tile.COLUMN, self.recipe.input_scale, ends_E)

    def remade_columns(self, swiglu_input: Tensor, weights_T: Tensor | None, ends_E: Tensor | None) -> Quantised:
        """The same from SwiGLU's input."""
        return self.gemm.swiglu_columns(swiglu_input, weights_T, self.recipe.input_scale, ends_E)


def _rows(x_TD: Tensor, scale: Scale, stored: Format, again: Recomputation) -> Quantised:
    """In ROW tiles, once for all layers of the same input, and made again where ``x_TD`` is."""
    numbers, scales = again.derived(x_TD, _in_rows, scale, stored)
    return Quantised(numbers, scales, Tile.ROW, stored, x_TD.shape[-1])


def _in_rows(x_TD: Tensor, scale: Scale, stored: Format) -> tuple[Tensor, Tensor]:
    q = quantise(x_TD, Tile.ROW, scale, stored)
    return q.stored, q.scales


class _Fp8Linear(torch.autograd.Function):
    """``operand`` and ``kept``: the input as Fprop takes it, and as Wgrad will."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        products: Fp8Products,
        operand: Quantised,
        kept: Quantised,
    ) -> Tensor:
        ctx.save_for_backward(kept.stored, kept.scales, weight, ends_E)
        ctx.weight, ctx.owner, ctx.products, ctx.dtype, ctx.shape = weight, owner, products, x.dtype, x.shape
        return products.output(operand, weight, ends_E, x.dtype).view(*x.shape[:-1], weight.shape[-2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stored, scales, _, ends_E = ctx.saved_tensors
        products, gx = ctx.products, None
        gy_TF = grads[0].reshape(-1, grads[0].shape[-1])
        rows, gy = products.gradient(gy_TF, ends_E)
        if ctx.needs_input_grad[0]:
            gx = products.input_gradient(rows, ctx.weight, ends_E, ctx.dtype).view(ctx.shape)
        kept = Quantised(stored, scales, Tile.ROW, products.recipe.stored, ctx.shape[-1])
        gw = _deliver(
            ctx, ctx.needs_input_grad[1], lambda: products.gemm.wgrad(gy, products.input_columns(kept, ends_E))
        )
        return gx, gw, None, None, None, None, None


class _Fp8SwiGLULinear(torch.autograd.Function):
    """Keeps the input of SwiGLU in FP8 (report, 3.3.3); the forward's own output is made from the wide one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights_T: Tensor | None,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        products: Fp8Products,
        handover: Handover | None,
    ) -> Tensor:
        x_T2D = x.reshape(-1, x.shape[-1])
        kept = quantise(x_T2D, Tile.ROW)
        ctx.save_for_backward(kept.stored, kept.scales, weights_T, weight, ends_E)
        ctx.weight, ctx.owner, ctx.products, ctx.dtype, ctx.shape = weight, owner, products, x.dtype, x.shape
        ctx.handover = handover
        operand = products.gemm.swiglu_rows(x_T2D, weights_T, products.recipe.input_scale)
        return products.output(operand, weight, ends_E, x.dtype).view(*x.shape[:-1], weight.shape[-2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stored, scales, weights_T, _, ends_E = ctx.saved_tensors
        products = ctx.products
        x_T2D = dequantise(Quantised(stored, scales, Tile.ROW, E4M3, ctx.shape[-1]))
        rows, gradient_columns = _gradient(products, grads[0], ctx.handover, ends_E)
        gswiglu_TD = products.input_gradient(rows, ctx.weight, ends_E, torch.float32)
        gx_T2D, gweights_T = swiglu_backward(x_T2D, weights_T, gswiglu_TD, ctx.dtype)
        columns = products.remade_columns(x_T2D, weights_T, ends_E)
        gw = _deliver(ctx, ctx.needs_input_grad[2], lambda: products.gemm.wgrad(gradient_columns(), columns))
        return gx_T2D.view(ctx.shape), gweights_T, gw, None, None, None, None


def _gradient(
    products: Fp8Products, gy: Tensor, handover: Handover | None, ends_E: Tensor | None
) -> tuple[Quantised, Callable[[], Quantised]]:
    """The output gradient as Dgrad takes it, and what gives it as Wgrad does."""
    if handover is None:
        rows, columns = products.gradient(gy.reshape(-1, gy.shape[-1]), ends_E)
        return rows, lambda: columns
    arrived = handover.take()
    assert arrived.stored.shape == gy.shape, (arrived.stored.shape, gy.shape)
    return arrived, lambda: products.gradient_columns(arrived, ends_E)


def _deliver(ctx: Any, needed: bool, gradient: Callable[[], Tensor]) -> Tensor | None:
    """Leave the weight gradient to the owner for later, or give it to autograd."""
    if ctx.owner is not None:
        ctx.owner.defer(ctx.weight, lambda buffer: buffer.add_(gradient()))
        return None
    return gradient().to(ctx.weight.dtype) if needed else None
