"""A transformer block as phases with communication between them, so that whoever runs it can put work there:

    attention   h = x + attn(norm(x)),  u = norm(h),  and in an MoE block the routing of u
    dispatch    rows of u to the ranks of their experts                              (communication)
    mlp         y = routed experts on the rows that arrived,  s = shared experts (or the dense MLP) on u
    combine     z = for each token the sum of its experts' results                   (communication)

and the block's output is h + s + z. A dense block has attention and mlp only, and its output is h + s.

B batch, S sequence, T = B·S tokens, D model, K experts a token, R rows sorted by expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.exchange import Dispatched, Exchange
from model.mlp import MLP, Experts
from model.norm import RMSNorm
from model.positions import Positions
from model.recompute import Recomputation
from model.router import Router, Routing


@dataclass(frozen=True)
class Attended:
    """What the attention phase leaves: the residual stream, the normalised input of the MLP, and where it goes."""

    h_BSD: Tensor
    u_BSD: Tensor
    routing: Routing | None


class Block(nn.Module):
    """One layer. ``experts``: the global numbers of the routed experts held here; ignored by a dense layer."""

    def __init__(self, config: ModelConfig, layer: int, experts: Sequence[int]) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_moe(layer):
            self.router: Router | None = Router(config)
            self.experts: Experts | None = Experts(config, experts)
            shared = config.n_shared_experts * config.moe_intermediate_size
            self.mlp = MLP(config.hidden_size, shared) if shared else None
        else:
            self.router = self.experts = None
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def attention_phase(self, x_BSD: Tensor, positions: Positions, again: Recomputation) -> Attended:
        """``again``: of this forward of this layer, the same for all phases, made with ``recompute``."""
        attended = again.phase(self._attend, x_BSD, positions)
        again.forget(but=attended.u_BSD)
        return attended

    def _attend(self, x_BSD: Tensor, positions: Positions, again: Recomputation) -> Attended:
        h_BSD = x_BSD + self.attn(again("norm", self.attn_norm, x_BSD), positions, again)
        u_BSD = again("norm", self.mlp_norm, h_BSD)
        return Attended(h_BSD, u_BSD, None if self.router is None else self.router(u_BSD, again))

    def local_phase(self, u_BSD: Tensor, again: Recomputation) -> Tensor:
        """The part of the mlp phase that needs nothing from elsewhere: shared experts, or the dense MLP. A block
        without either (``mlp`` is None) has no such part."""
        assert self.mlp is not None
        y_BSD: Tensor = again.phase(self.mlp, u_BSD)
        again.forget()
        return y_BSD

    def expert_phase(self, rows_RD: Tensor, weights_R: Tensor, sent: Dispatched, again: Recomputation) -> Tensor:
        """The part of the mlp phase that works on what was dispatched; its tensors with a gradient stand apart."""
        assert self.experts is not None
        y_RD: Tensor = again.phase(self.experts, rows_RD, weights_R, sent.ends_E, sent.payload, sent.handover)
        again.forget()
        return y_RD

    def forward(self, x_BSD: Tensor, positions: Positions, exchange: Exchange) -> tuple[Tensor, Tensor | None]:
        """The whole layer at once, and its balance loss: the definition, under plain autograd."""
        again = Recomputation(self.recompute)
        attended = self.attention_phase(x_BSD, positions, again)
        out_BSD = attended.h_BSD
        if self.mlp is not None:
            out_BSD = out_BSD + self.local_phase(attended.u_BSD, again)
        routing = attended.routing
        if routing is None:
            return out_BSD, None
        sent = exchange.dispatch(attended.u_BSD.flatten(0, 1), routing.weights_TK, routing.indices_TK).wait()
        y_RD = self.expert_phase(sent.rows_RD, sent.weights_R, sent, again)
        z_TD = exchange.combine(y_RD, sent.layout).wait()
        return out_BSD + z_TD.view_as(out_BSD), routing.balance
