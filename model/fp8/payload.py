"""Rows that travel in FP8, activations and their gradients: what dispatch sends, and what the expert layers take
without widening it.

A row is its D numbers and then its scales, D + 4 ceil(D / 128) bytes: 7168 + 224 in DeepSeek-V3 (report, 3.3.3). Scales
are powers of two, so that a payload that was widened to BF16 on its way, where an interface wants that, is the same
payload again when it is quantised: dequantise and quantise then change no number.
"""

import torch
from torch import Tensor

from model.fp8 import SIZE
from model.fp8.formats import E4M3
from model.fp8.quantise import Quantised, Scale, Tile, quantise


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


class Handover:
    """Where the gradient of a layer's output is left, when it came in FP8, for the layer's backward. Autograd hands
    that a tensor of the output's dtype and no other, which is then an ``anchor``. For one backward."""

    def __init__(self) -> None:
        self._gradient: Quantised | None = None

    def leave(self, gradient: Quantised) -> None:
        assert self._gradient is None, "the gradient before was not taken"
        self._gradient = gradient

    def take(self) -> Quantised:
        """What was left, in the hands of the caller alone."""
        gradient, self._gradient = self._gradient, None
        assert gradient is not None, "backward of a layer whose output's gradient comes in FP8, and none came"
        return gradient


def anchor(payload: Quantised, dtype: torch.dtype) -> Tensor:
    """A tensor of the payload's shape that takes no memory, for autograd: in place of rows, to hang gradients of
    ``dtype`` on, because those of FP8 tensors would be rounded to FP8; in place of a gradient of that dtype, to hand
    on. Its numbers mean nothing."""
    return torch.zeros((), dtype=dtype, device=payload.stored.device).expand(len(payload.stored), payload.width)
