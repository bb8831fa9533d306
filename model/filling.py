"""Rows by expert, each expert's filled up to a multiple of a few rows.

A CPU compiles a BF16 product for every shape that it meets, and experts get another number of rows each time: filled up
they meet few shapes. A row in excess is the expert's last one again. Its result is dropped and its gradient is zero, so
that whatever stands between ``fill`` and ``unfill``, and treats each row for itself, computes what it would without.

R rows sorted by expert, P of them with those in excess, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP_ROWS = 32
"""No more than 12 % of the products are idle where an expert has 256 rows."""


@dataclass(frozen=True)
class Filling:
    """``place_R``: where each row stands; ``row_P``: which row stands at each place; ``idle``: the places in excess;
    ``ends_E``: where each expert's places end, int32."""

    place_R: Tensor
    row_P: Tensor
    idle: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, ends_E: Tensor) -> "Filling":
        """``ends_E``: where each expert's rows end."""
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        sizes_E = (counts_E + (GROUP_ROWS - 1)) // GROUP_ROWS * GROUP_ROWS
        filled_ends_E = sizes_E.cumsum(0)
        shift_E = (filled_ends_E - sizes_E) - (ends_E - counts_E)
        place_R = torch.arange(int(ends_E[-1])) + shift_E.repeat_interleave(counts_E)
        row_P = torch.arange(int(filled_ends_E[-1])) - shift_E.repeat_interleave(sizes_E)
        last_P = (ends_E - 1).repeat_interleave(sizes_E)
        idle = (row_P > last_P).nonzero().view(-1)
        return cls(place_R, torch.minimum(row_P, last_P), idle, filled_ends_E.to(torch.int32))

    def fill(self, x_RD: Tensor) -> Tensor:
        """[R, ...] -> [P, ...]. Gradients of rows in excess must be zero, as those are that ``unfill`` sends back."""
        filled: Tensor = _Fill.apply(x_RD, self)
        return filled

    def unfill(self, y_PF: Tensor) -> Tensor:
        """[P, ...] -> [R, ...]."""
        rows: Tensor = _Unfill.apply(y_PF, self)
        return rows


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, filling: Filling) -> Tensor:
        ctx.filling = filling
        return x_RD.index_select(0, filling.row_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.filling.place_R), None


class _Unfill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PF: Tensor, filling: Filling) -> Tensor:
        ctx.filling = filling
        return y_PF.index_select(0, filling.place_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        filling = ctx.filling
        return grads[0].index_select(0, filling.row_P).index_fill_(0, filling.idle, 0), None
