"""What attention's core reads, from the outputs of the projections: ``model.attention.core_inputs`` after queries' and
keys' rotary part has been turned, and its gradients. Each number is read once and written once.

T = B·S tokens, H heads, N dims without position, R rotary, V value, K = N + R, W width of a value in the core, P = R/2
pairs. ``turns`` are [S, P] or [B·S, P], with a cosine and a sine each.
"""

import numpy as np
import torch
from torch import Tensor

from model.kernels.calls import array, by_rows
from model.kernels.elementwise import core_inputs_backward, core_inputs_forward


def forward(
    query: Tensor, keys_values: Tensor, k_rope: Tensor, turns: Tensor, nope: int, core_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, K], [B, S, H, N + V], [B, S, R] in BF16, complex turns -> q, k [B, S, H, K] and v [B, S, H, W], FP32
    or BF16, of V or more."""
    heads, width = query.shape[-2:]
    q, k = (torch.empty(query.shape, dtype=dtype) for _ in range(2))
    v = q.new_empty(*query.shape[:-1], core_width)
    read = _tokens(query, heads), _tokens(keys_values, heads), _tokens(k_rope)
    written, angles = [_tokens(of, heads) for of in (q, k, v)], _angles(turns)
    by_rows(
        len(read[0]),
        heads * width,
        lambda a, b: core_inputs_forward(*(of[a:b] for of in read), angles, a, nope, *(of[a:b] for of in written)),
    )
    return q, k, v


def backward(
    gq: Tensor, gk: Tensor, gv: Tensor, turns: Tensor, nope: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what ``forward`` read, BF16, from those of what it wrote, FP32 or BF16."""
    heads, width = gq.shape[-2:]
    gquery = torch.empty(gq.shape, dtype=torch.bfloat16)
    gkeys_values = gquery.new_empty(*gq.shape[:-1], nope + values)
    gk_rope = gquery.new_empty(*gq.shape[:-2], width - nope)
    read, angles = [_tokens(of, heads) for of in (gq, gk, gv)], _angles(turns)
    written = _tokens(gquery, heads), _tokens(gkeys_values, heads), _tokens(gk_rope)
    by_rows(
        len(read[0]),
        heads * width,
        lambda a, b: core_inputs_backward(*(of[a:b] for of in read), angles, a, nope, *(of[a:b] for of in written)),
    )
    return gquery, gkeys_values, gk_rope


def _tokens(x: Tensor, *heads: int) -> np.ndarray:
    """[B, S, ...] -> [B·S, (heads,) width]."""
    return array(x.contiguous().view(-1, *heads, x.shape[-1]))


def _angles(turns: Tensor) -> np.ndarray:
    return array(torch.view_as_real(turns).view(-1, turns.shape[-1], 2))
