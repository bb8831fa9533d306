"""Which experts a token goes to (DeepSeek-V3 report, 2.1.2).

Scores are sigmoids of the token's affinity to each expert's centroid. A bias per expert steers the *selection* towards
balance and is no part of the gate value: groups (one a node) are ranked by the sum of their two best biased scores,
the best ``topk_group`` groups compete, and the K best experts win. Their raw scores, normalised, are the gate.

B batch, S sequence, T = B·S tokens, D model, E experts, G groups, K experts a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear
from model.recompute import Recomputation


@dataclass(frozen=True)
class Routing:
    """``indices_TK``: the chosen experts, int64. ``weights_TK``: their gate values, FP32. ``balance``: the
    complementary balance loss (eq. 17, without alpha) summed over the sequences, FP32 scalar."""

    indices_TK: Tensor
    weights_TK: Tensor
    balance: Tensor


class Router(nn.Module):
    """Token -> experts. The bias is state, not a parameter: ``update_bias`` moves it once a step."""

    bias_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.centroids = Linear(config.hidden_size, config.n_routed_experts)
        self.register_buffer("bias_E", torch.zeros(config.n_routed_experts))

    def forward(self, x_BSD: Tensor, again: Recomputation | None = None) -> Routing:
        """``again``: what is made again of the layer; the FP32 input is, where ``x_BSD`` is."""
        c, again = self.config, again or Recomputation()
        # The gate runs in FP32 even under BF16: a rounded score changes which expert is chosen.
        scores_BSE = torch.sigmoid(self.centroids(again("norm", Tensor.float, x_BSD)))
        scores_TE = scores_BSE.flatten(0, 1)
        indices_TK = choose(scores_TE.detach(), self.bias_E, c)
        weights_TK = scores_TE.gather(1, indices_TK)
        if c.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(indices_TK, weights_TK * c.routed_scaling_factor, balance_loss(scores_BSE, c))

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, speed: float) -> None:
        """Move the bias by ``speed``, after a step of whose whole batch ``load_E`` tokens chose each expert."""
        load_E = load_E.float()
        self.bias_E += speed * torch.sign(load_E.mean() - load_E)


def choose(scores_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> Tensor:
    """The K chosen experts of each token, int64 [T, K]."""
    biased_TE = scores_TE + bias_E
    if config.topk_group < config.n_group:
        biased_TGX = biased_TE.unflatten(1, (config.n_group, -1))
        best = min(2, biased_TGX.shape[-1])
        group_score_TG = biased_TGX.topk(best, dim=-1).values.sum(-1)
        kept_TJ = group_score_TG.topk(config.topk_group, dim=-1, sorted=False).indices
        closed_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, kept_TJ, False)
        biased_TE = biased_TGX.masked_fill(closed_TG.unsqueeze(-1), -torch.inf).flatten(1)
    return biased_TE.topk(config.num_experts_per_tok, dim=-1).indices


def balance_loss(scores_BSE: Tensor, config: ModelConfig) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (eq. 17-20). f counts the K best *raw* scores, without bias or node limit."""
    sequence, experts = scores_BSE.shape[1:]
    chosen_BSK = scores_BSE.detach().topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    counts_BE = torch.zeros_like(scores_BSE).scatter_(-1, chosen_BSK, 1.0).sum(1)
    f_BE = counts_BE * (experts / (config.num_experts_per_tok * sequence))
    p_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum()
