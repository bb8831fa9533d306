"""Multi-token prediction: a module behind the last layer that predicts the token after the next (DeepSeek-V3 report,
2.2, depth 1).

With h_i what the main model's head reads at position i and e the embedding,

    x_i = W_eh [enorm(e(t_i+1)), hnorm(h_i)]       logits of t_i+2 = head(norm(block(x)_i))

The report writes the two halves the other way round; this order is the released weights' (``eh_proj``), and so is that
h comes from behind the main model's final norm, as in vLLM and SGLang, which run them. Embedding and head are the main
model's, one copy of each; the block is a mixture of experts.

The loss is the sum over the positions that have such a target, all but the last, divided by the number of all
positions (eq. 24). The last position goes through the block too, its next token is known: sequences keep their length.

B batch, S sequence, D model.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block
from model.config import ModelConfig
from model.linear import Linear
from model.norm import RMSNorm

NO_TARGET = -100
"""A target that counts for nothing: what torch's cross-entropy ignores."""


class MTP(nn.Module):
    """What the module has of its own. ``experts``: the global numbers of the routed experts held here."""

    def __init__(self, config: ModelConfig, experts: Sequence[int]) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.enorm = RMSNorm(hidden, config.rms_norm_eps)
        self.hnorm = RMSNorm(hidden, config.rms_norm_eps)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.block = Block(config, config.num_hidden_layers, experts)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)

    def enter(self, features_BSD: Tensor, next_BSD: Tensor) -> Tensor:
        """The block's input from the main model's features and the embeddings of the next tokens, [B, S, D]."""
        x_BSD: Tensor = self.eh_proj(torch.cat([self.enorm(next_BSD), self.hnorm(features_BSD)], dim=-1))
        return x_BSD


def targets_after(targets_BS: Tensor, document_start: int | None) -> Tensor:
    """The token after each position's target; the last position has none. Where documents are kept apart, which the
    token ``document_start`` begins, a document's last position has none either."""
    after_BS = F.pad(targets_BS[:, 1:], (0, 1), value=NO_TARGET)
    return after_BS if document_start is None else after_BS.masked_fill(targets_BS == document_start, NO_TARGET)
