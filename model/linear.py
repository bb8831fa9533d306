"""Linear layers whose backward is split: gradients for the inputs at once (I), for the weights later (W).

With y = x Wᵀ, the input gradient is gx = gy W and the weight gradient gW = gyᵀ x. A pipeline wants gx as early as
possible and can fill its bubbles with gW, so the layer hands the pair (x, gy) to the ``WeightGradients`` of whoever
owns its parameters and returns. Nothing is run twice: the deferral sits inside the layer's own backward. Without an
owner a layer is ordinary autograd, and that is the definition it is tested against.

A layer computes its three products in the dtype of its input, or as its ``Products`` says.

T tokens (rows), D inputs, F outputs, E experts, R rows sorted by expert.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fp8.payload import Handover
from model.fp8.quantise import Quantised
from model.kernels import products
from model.recompute import Recomputation

Contribution = Callable[[Tensor], None]
"""Adds one micro-batch's gradient to the FP32 buffer of a parameter."""


class WeightGradients:
    """FP32 gradient buffers of a stage's parameters, and the contributions to them that wait for their W.

    ``defer`` collects during a backward, ``take`` hands over what was collected so that its owner can keep it per
    micro-batch, ``apply`` adds it. ``add`` is for gradients too cheap to be worth deferring (norms, embedding).
    """

    def __init__(self, buffers: dict[nn.Parameter, Tensor]) -> None:
        self._buffers = buffers
        self._collected: list[tuple[nn.Parameter, Contribution]] = []

    @torch.no_grad()
    def add(self, parameter: nn.Parameter, contribution: Contribution) -> None:
        contribution(self._buffers[parameter])

    def defer(self, parameter: nn.Parameter, contribution: Contribution) -> None:
        self._collected.append((parameter, contribution))

    def take(self) -> list[tuple[nn.Parameter, Contribution]]:
        collected, self._collected = self._collected, []
        return collected

    @torch.no_grad()
    def apply(self, collected: list[tuple[nn.Parameter, Contribution]]) -> None:
        for parameter, contribution in collected:
            contribution(self._buffers[parameter])


class Owned(nn.Module):
    """A module whose parameters' gradients may belong to somebody: ``owner`` is None under plain autograd."""

    owner: WeightGradients | None = None


class Products(Protocol):
    """How a linear layer computes in a narrower format than its input's (``model/fp8/linear.py``). Input gradients are
    autograd's, weight gradients go to ``owner`` if there is one. ``ends_E``: for rows sorted by expert."""

    def linear(
        self,
        x: Tensor,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        payload: Quantised | None = None,
        again: Recomputation | None = None,
    ) -> Tensor:
        """[..., D] -> [..., F] in the dtype of ``x``. ``payload``: ``x`` as it was quantised before; then the numbers
        of ``x`` are not read, and it may be a ``model.fp8.payload.anchor``. ``again``: what is made again of the layer;
        the narrow copies of ``x`` are, where ``x`` is, and are shared with other layers of the same input."""
        ...

    def swiglu_linear(
        self,
        x: Tensor,
        weights_R: Tensor | None,
        weight: nn.Parameter,
        owner: WeightGradients | None,
        ends_E: Tensor | None,
        handover: Handover | None = None,
    ) -> Tensor:
        """The layer after ``model.mlp.swiglu`` of ``x`` and gate values ``weights_R``, [..., 2D] -> [..., F].
        ``handover``: backward finds the output's gradient there, and does not read what autograd hands it."""
        ...


def own(module: nn.Module, owner: WeightGradients | None) -> None:
    """Send the weight gradients of every layer in ``module`` to ``owner``."""
    for child in module.modules():
        if isinstance(child, Owned):
            child.owner = owner


@cache
def _slow_bf16(device_type: str) -> bool:
    # A CPU with AMX or AVX512_BF16 multiplies BF16 at twice its FP32 rate or more, one without at half of it. Products
    # of BF16 numbers are exact in FP32 and both paths accumulate in FP32, so widening the operands changes the order
    # of a sum and nothing else.
    return device_type == "cpu" and not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def compiles_shapes(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of ``x`` and ``weight`` is one of those of torch in BF16 that a CPU compiles for each shape."""
    native = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _slow_bf16("cpu")
    return native and not products.serves(x, weight)


def gemm_operand(x: Tensor) -> Tensor:
    """``x`` in the format in which this device multiplies it fastest: FP32 instead of BF16 on many CPUs."""
    return x.float() if x.dtype == torch.bfloat16 and _slow_bf16(x.device.type) else x


PIECE = 1 << 17
"""Elements; their FP32 copy is 512 KiB."""


def accumulate(buffer: Tensor, product: Tensor) -> None:
    """``buffer`` += ``product``, both contiguous. A CPU makes an FP32 copy of a BF16 summand first: in pieces, it never
    leaves the cache."""
    if product.dtype == buffer.dtype or product.device.type != "cpu" or product.numel() <= PIECE:
        buffer.add_(product)
    else:
        torch._foreach_add_(buffer.view(-1).split(PIECE), product.view(-1).split(PIECE))


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: nn.Parameter, owner: WeightGradients) -> Tensor:
        ctx.save_for_backward(x_TD, weight_FD)
        ctx.weight, ctx.owner = weight_FD, owner
        return F.linear(gemm_operand(x_TD), gemm_operand(weight_FD.to(x_TD.dtype))).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gy_TF,) = grads
        x_TD, weight_FD = ctx.saved_tensors
        x_TD = x_TD.detach()  # what waits for W must not keep the graph that x came from
        gy_TF = gemm_operand(gy_TF)

        def contribute(buffer_FD: Tensor) -> None:
            x2_TD = gemm_operand(x_TD).reshape(-1, x_TD.shape[-1])
            gy2_TF = gy_TF.reshape(-1, gy_TF.shape[-1])
            if x2_TD.dtype == torch.float32:
                buffer_FD.addmm_(gy2_TF.t(), x2_TD)
            else:
                accumulate(buffer_FD, gy2_TF.t() @ x2_TD)

        ctx.owner.defer(ctx.weight, contribute)
        gx_TD = (gy_TF @ gemm_operand(weight_FD.to(x_TD.dtype))).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        return gx_TD, None, None


class Linear(Owned):
    """y = x Wᵀ without a bias, in the dtype of ``x`` [..., D]; a weight [F, D] in BF16 serves an FP32 input too."""

    products: Products | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor, again: Recomputation | None = None) -> Tensor:
        """``again``: for a layer with ``products``, as there."""
        if self.products is not None:
            return self.products.linear(x, self.weight, self.owner, None, None, again)
        if self.owner is None:
            return F.linear(x, self.weight.to(x.dtype))
        return _SplitLinear.apply(x, self.weight, self.owner)


class _SplitGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EFD: nn.Parameter, ends_E: Tensor, owner: WeightGradients) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EFD)
        ctx.weight, ctx.owner, ctx.ends_E = weight_EFD, owner, ends_E
        if products.serves(x_RD, weight_EFD):
            return products.forward(x_RD, weight_EFD, ends_E.numpy())
        w_EDF = gemm_operand(weight_EFD).transpose(1, 2)
        return F.grouped_mm(gemm_operand(x_RD), w_EDF, offs=ends_E).to(x_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_EFD = ctx.saved_tensors
        x_RD, ends_E = x_RD.detach(), ctx.ends_E
        if products.serves(x_RD, weight_EFD):
            gy_RF = grads[0].contiguous()
            ctx.owner.defer(ctx.weight, lambda of: products.add_weight_gradient(gy_RF, x_RD, ends_E.numpy(), of))
            return products.input_gradient(gy_RF, weight_EFD, ends_E.numpy()), None, None, None
        gy_RF = gemm_operand(grads[0].contiguous())

        def contribute(buffer_EFD: Tensor) -> None:
            accumulate(buffer_EFD, F.grouped_mm(gy_RF.t(), gemm_operand(x_RD), offs=ends_E))

        ctx.owner.defer(ctx.weight, contribute)
        gx_RD = F.grouped_mm(gy_RF, gemm_operand(weight_EFD), offs=ends_E).to(x_RD.dtype)
        return gx_RD, None, None, None


class GroupedLinear(Owned):
    """One linear layer per expert over rows sorted by expert: rows up to ``ends_E[0]`` go through expert 0, and so on.

    ``x_RD``: [R, D]; ``ends_E``: int32 [E], cumulative; the last is R. R = 0 and experts without rows are ordinary.
    """

    products: Products | None = None

    def __init__(self, experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))

    def forward(self, x_RD: Tensor, ends_E: Tensor, payload: Quantised | None = None) -> Tensor:
        """``payload``: for a layer with ``products``, as there."""
        if self.products is not None:
            return self.products.linear(x_RD, self.weight, self.owner, ends_E, payload)
        assert payload is None, "a layer without products reads its input"
        if self.owner is None:
            return F.grouped_mm(x_RD, self.weight.transpose(1, 2), offs=ends_E)
        return _SplitGroupedLinear.apply(x_RD, self.weight, ends_E, self.owner)


class _OwnedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tokens: Tensor, weight_VD: nn.Parameter, owner: WeightGradients) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.owner = weight_VD, owner
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        gy_TD = grads[0].reshape(-1, grads[0].shape[-1]).float()
        ctx.owner.add(ctx.weight, lambda buffer_VD: _add_rows(buffer_VD, tokens.flatten(), gy_TD))
        return None, None, None, None


def _add_rows(buffer_VD: Tensor, rows_T: Tensor, values_TD: Tensor) -> None:
    """Add each value to its row, which may come more than once, in an order that is always the same: on a GPU
    ``index_add_`` adds atomically, in any."""
    if buffer_VD.is_cuda:
        buffer_VD.index_put_((rows_T,), values_TD, accumulate=True)
    else:
        buffer_VD.index_add_(0, rows_T, values_TD)


class Embedding(Owned):
    """Rows of a table [V, D] by token number."""

    def __init__(self, vocab_size: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, features))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.owner is None:
            return F.embedding(tokens, self.weight)
        # Tokens carry no gradient; the anchor is what makes autograd call the backward.
        anchor = torch.empty(0, device=tokens.device, requires_grad=True)
        return _OwnedEmbedding.apply(anchor, tokens, self.weight, self.owner)
