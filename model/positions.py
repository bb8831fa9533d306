"""Where the tokens of a batch stand, and which of them see each other.

Ordinarily a token stands at its place in the sequence and sees every token up to it. A sequence that is packed from
several documents may keep them apart instead: positions begin again at each of them, and no token sees another
document, so that each is what it would be alone. The token that ends a document begins the next one, as in generation
and evaluation: it is the first token's only context.

B batch, S sequence, P pairs of rotary dims.
"""

import torch
from torch import Tensor


class Positions:
    """``rotations``: RoPE's turns, [S, P] for all sequences or [B, S, P] for each; ``documents_BS``: each token's
    document, counted within its sequence, where documents are kept apart."""

    def __init__(self, rotations: Tensor, documents_BS: Tensor | None = None) -> None:
        self.rotations, self.documents_BS = rotations, documents_BS
        self._mask: Tensor | None = None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, S, S], added to attention's logits: 0 where a query (third dim) sees a key, -inf elsewhere. Made once
        for all layers: a fused core that is given booleans makes such a sum of its own in each of them. None: a
        query sees every key up to its own."""
        if self.documents_BS is None:
            return None
        if self._mask is None or self._mask.dtype != dtype:
            same_BSS = self.documents_BS[:, :, None] == self.documents_BS[:, None, :]
            zeros_BSS = torch.zeros(same_BSS.shape, dtype=dtype, device=same_BSS.device)
            self._mask = zeros_BSS.masked_fill_(~same_BSS.tril(), -torch.inf).unsqueeze(1)
        return self._mask


def documents_of(tokens_BS: Tensor, start: int) -> Tensor:
    """Each token's document, counted from 0 or 1 within its sequence; a document begins with the token ``start``, and
    the first one wherever the sequence does."""
    return (tokens_BS == start).cumsum(1)


def places_in(documents_BS: Tensor) -> Tensor:
    """How many tokens of its document stand before each token."""
    places_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = documents_BS.diff(dim=1, prepend=documents_BS[:, :1] - 1) != 0
    return places_S - torch.where(begins_BS, places_S, 0).cummax(1).values
