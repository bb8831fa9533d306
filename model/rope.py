"""Rotary position embedding: adjacent pairs (2i, 2i+1) turned by position · theta^(-2i/R).

B batch, S sequence, H heads, R rotary dims.
"""

import torch
from torch import Tensor


def rotations(length: int, dims: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Unit complex numbers [S, R/2], one turn for every position and pair. Computed in FP64: an angle grows with the
    position, and FP32 would lose digits of it in long contexts."""
    frequencies = theta ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims)
    angles = torch.arange(length, dtype=torch.float64, device=device).outer(frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x_BSHR: Tensor, rotations_SP: Tensor) -> Tensor:
    """``x_BSHR`` with each of its pairs turned, in FP32, in the dtype that it came in."""
    pairs = torch.view_as_complex(x_BSHR.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations_SP[:, None, :]).flatten(-2).to(x_BSHR.dtype)
