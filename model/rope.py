"""Rotary position embedding: adjacent pairs (2i, 2i+1) turned by position · theta^(-2i/R).

B batch, S sequence, H heads, R rotary dims, P = R/2 pairs.
"""

import math

import torch
from torch import Tensor

from model.config import Yarn


def rotations(
    length: int, dims: int, theta: float, device: torch.device | None = None, yarn: Yarn | None = None
) -> Tensor:
    """Complex numbers [S, R/2], one turn for every position and pair; of length one, times YaRN's scale if there is
    one. Computed in FP64: an angle grows with the position, and FP32 would lose digits of it in long contexts."""
    frequencies = theta ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims)
    if yarn is not None:
        frequencies = stretch(frequencies, theta, yarn)
    angles = torch.arange(length, dtype=torch.float64, device=device).outer(frequencies)
    radius = 1.0 if yarn is None else yarn.rotation_scale
    return torch.polar(torch.full_like(angles, radius), angles).to(torch.complex64)


def stretch(frequencies_P: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """YaRN: each frequency as it is, divided by the factor, or a blend of the two, linear in the number of its pair
    between the whole numbers that enclose the pairs with ``beta_fast`` and ``beta_slow`` turns in the original
    context (the boundaries that the released models were trained with)."""
    pairs = len(frequencies_P)

    def pair_with(turns: float) -> float:
        return pairs * math.log(yarn.original_length / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(pair_with(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_with(yarn.beta_slow)), 2 * pairs - 1)
    numbers_P = torch.arange(pairs, dtype=torch.float64, device=frequencies_P.device)
    slowed_P = ((numbers_P - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return frequencies_P * (1 - slowed_P) + frequencies_P / yarn.factor * slowed_P


def rotate(x_BSHR: Tensor, rotations: Tensor) -> Tensor:
    """``x_BSHR`` with each of its pairs turned, in FP32, in the dtype that it came in; ``rotations`` are [S, P] or
    [B, S, P]."""
    # Contiguous: pairs begin at an even number in memory, wherever a head or a latent of odd width stood before them.
    pairs = torch.view_as_complex(x_BSHR.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations.unsqueeze(-2)).flatten(-2).to(x_BSHR.dtype)
