"""Activations that travel in FP8: what dispatch sends, and what the expert layers take without widening it.

A row is its D numbers and then its scales, D + 4 ceil(D / 128) bytes: 7168 + 224 in DeepSeek-V3 (report, 3.3.3). Scales
are powers of two, so that a payload that was widened to BF16 on its way, where an interface wants that, is the same
payload again when it is quantised: dequantise and quantise then change no number.
"""

import torch
from torch import Tensor

from model.fp8.formats import E4M3
from model.fp8.quantise import SIZE, Quantised, Scale, Tile, quantise


def pack(x_TD: Tensor) -> Tensor:
    """Quantise rows and lay each out as bytes: -> uint8 [T, D + 4 ceil(D / 128)]."""
    q = quantise(x_TD, Tile.ROW, Scale.POWER_OF_TWO)
    return torch.cat([q.stored.view(torch.uint8), q.scales.view(torch.uint8)], dim=1)


def unpack(rows: Tensor, width: int) -> Quantised:
    """Rows of ``width`` numbers from their bytes, in any order and number. Both parts are copies: scales must be
    aligned in memory, and products want their numbers contiguous."""
    assert rows.shape[1] == width + 4 * -(-width // SIZE), (rows.shape, width)
    stored, scales = (part.clone(memory_format=torch.contiguous_format) for part in rows.tensor_split([width], dim=1))
    return Quantised(stored.view(torch.float8_e4m3fn), scales.view(torch.float32), Tile.ROW, E4M3, width)


def anchor(payload: Quantised, dtype: torch.dtype) -> Tensor:
    """A tensor of the payload's shape that takes no memory, for autograd to hang gradients of ``dtype`` on: those of
    FP8 tensors would be rounded to FP8. Its numbers mean nothing."""
    return torch.zeros((), dtype=dtype, device=payload.stored.device).expand(len(payload.stored), payload.width)
