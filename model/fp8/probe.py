"""Where quantisation error comes from: a model that computes widely while each layer also does its products in FP8.

``probe`` puts a ``Probe`` in every layer that FP8 would compute in. Outputs and gradients are the wide ones, so errors
do not build up from layer to layer: each is what that layer's own quantisation does to its own operands. An error is
the root of the sum of squares of the difference over that of the wide result.

T tokens (rows), D inputs, F outputs, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fp8.assign import recipes
from model.fp8.gemm import Gemm
from model.fp8.linear import Fp8Products
from model.fp8.payload import Handover
from model.fp8.quantise import Quantised, Tile, dequantise, quantise
from model.linear import GroupedLinear, Linear, WeightGradients
from model.mlp import swiglu
from model.recompute import Recomputation

KINDS = ("input", "weight", "gradient", "gradient_block", "fprop", "dgrad", "wgrad")
"""Errors that a probe measures: of the input, the weight and the output gradient as they enter the products, of the
gradient if it had 128 x 128 scales, and of the three products."""


@dataclass
class Probe:
    """``model.linear.Products`` of one layer, under plain autograd. ``errors``: by kind, from the last forward and
    backward; ``lost``: the share of the gradient's numbers that became zero, and that with 128 x 128 scales. A layer
    that saw no token has neither."""

    products: Fp8Products
    errors: dict[str, float] = field(default_factory=dict)
    lost: tuple[float, float] | None = None

    def linear(
        self,
        x: Tensor,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        payload: Quantised | None = None,
        again: Recomputation | None = None,
    ) -> Tensor:
        assert owner is None and payload is None
        products = self.products

        def columns(x_TD: Tensor) -> Quantised:
            alone = Recomputation()
            return products.input_columns(products.kept(x_TD, products.operand(x_TD, alone), alone), ends_E)

        y: Tensor = _Probed.apply(x, weight, ends_E, self, columns)
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
        assert owner is None and handover is None
        wide_T2D = x.detach().reshape(-1, x.shape[-1])
        weights_T = None if weights_R is None else weights_R.detach()

        def columns(_: Tensor) -> Quantised:
            return self.products.remade_columns(dequantise(quantise(wide_T2D, Tile.ROW)), weights_T, ends_E)

        y: Tensor = _Probed.apply(swiglu(x, weights_R), weight, ends_E, self, columns)
        return y

    def note(self, kind: str, got: Tensor, wide: Tensor) -> None:
        norm = torch.linalg.vector_norm(wide.float()).item()
        if norm > 0:
            self.errors[kind] = torch.linalg.vector_norm(got.float() - wide.float()).item() / norm


class _Probed(torch.autograd.Function):
    """A linear layer in FP32, and beside it in FP8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        ends_E: Tensor | None,
        probe: Probe,
        columns: Callable[[Tensor], Quantised],
    ) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        y_TF = _product(x_TD, weight.transpose(-1, -2), ends_E)
        operand = probe.products.operand(x_TD, Recomputation())
        probe.note("input", dequantise(operand), x_TD)
        probe.note("weight", dequantise(quantise(weight, Tile.BLOCK)), weight)
        probe.note("fprop", probe.products.output(operand, weight, ends_E, torch.float32), y_TF)
        ctx.save_for_backward(x, weight, ends_E)
        ctx.probe, ctx.columns = probe, columns
        return y_TF.to(x.dtype).view(*x.shape[:-1], -1) if x.numel() else y_TF.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends_E = ctx.saved_tensors
        probe, products = ctx.probe, ctx.probe.products
        x_TD, gy_TF = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        gx_TD = _product(gy_TF, weight, ends_E)
        if ends_E is None:
            gw = gy_TF.float().t() @ x_TD.float()
        else:
            gw = F.grouped_mm(gy_TF.float().t(), x_TD.float(), offs=ends_E)
        tiles = [dequantise(quantise(gy_TF, tile, products.recipe.gradient_scale)) for tile in (Tile.ROW, Tile.BLOCK)]
        for kind, got in zip(("gradient", "gradient_block"), tiles, strict=True):
            probe.note(kind, got, gy_TF)
        nonzero = (gy_TF != 0).sum().item()
        if nonzero:
            row, block = (1 - (got != 0).sum().item() / nonzero for got in tiles)
            probe.lost = row, block
        rows, columns = products.gradient(gy_TF, ends_E)
        probe.note("dgrad", products.input_gradient(rows, weight, ends_E, torch.float32), gx_TD)
        probe.note("wgrad", products.gemm.wgrad(columns, ctx.columns(x_TD)), gw)
        return gx_TD.to(x.dtype).view_as(x), gw.to(weight.dtype), None, None, None


def _product(x_TD: Tensor, weight: Tensor, ends_E: Tensor | None) -> Tensor:
    """[T, D] x [(E,) D, F] in FP32."""
    x_TD, weight = x_TD.float().contiguous(), weight.float()
    return x_TD @ weight if ends_E is None else F.grouped_mm(x_TD, weight, offs=ends_E)


def probe(model: nn.Module, gemm: Gemm) -> dict[str, Probe]:
    """Give every linear layer that FP8 would compute in a probe, by its name in ``model``."""
    probes = {}
    for name, recipe in recipes(model).items():
        if recipe is not None:
            layer = model.get_submodule(name)
            assert isinstance(layer, Linear | GroupedLinear)
            layer.products = probes[name] = Probe(Fp8Products(gemm, recipe))
    return probes
