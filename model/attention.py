"""Multi-head latent attention (DeepSeek-V3 report, 2.1.1).

Queries, keys and values come from low-rank latents; position lives in a small rotary part of its own, and its key is
one head shared by all:

    c_q = norm(W_qa x)             q = W_qb c_q              = (q_nope, q_rope) a head
    c_kv, k_rope = W_kva x         k_nope, v = W_kvb norm(c_kv)
    o = softmax(causal(q kᵀ / sqrt(N + R))) v                out = W_o o

B batch, S sequence, D model, H heads, N head dims without position, R rotary, V value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear, gemm_operand
from model.norm import RMSNorm
from model.rope import rotate


class Attention(nn.Module):
    """[B, S, D] -> [B, S, D], causal."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a = Linear(hidden, config.q_lora_rank)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o = Linear(heads * config.v_head_dim, hidden)

    def forward(self, x_BSD: Tensor, rotations_SP: Tensor) -> Tensor:
        c = self.config
        query = self.q(x_BSD) if c.q_lora_rank is None else self.q_b(self.q_a_norm(self.q_a(x_BSD)))
        q_nope, q_rope = query.unflatten(-1, (c.num_attention_heads, -1)).split(
            [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1
        )
        latent, k_rope = self.kv_a(x_BSD).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        k_nope, v = (
            self.kv_b(self.kv_a_norm(latent))
            .unflatten(-1, (c.num_attention_heads, -1))
            .split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        )
        k_rope = rotate(k_rope.unsqueeze(2), rotations_SP).expand(-1, -1, c.num_attention_heads, -1)
        q_BSHK = torch.cat([q_nope, rotate(q_rope, rotations_SP)], dim=-1)
        k_BSHK = torch.cat([k_nope, k_rope], dim=-1)
        return self.o(attend(q_BSHK, k_BSHK, v).flatten(-2))


def attend(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor) -> Tensor:
    """Causal attention core -> [B, S, H, V]. Values are padded to the width of the keys: fused kernels want one head
    size, and an unfused core would hold all S x S scores."""
    width = v_BSHV.shape[-1]
    v_BSHK = F.pad(v_BSHV, (0, q_BSHK.shape[-1] - width)) if width < q_BSHK.shape[-1] else v_BSHV
    q, k, v = (gemm_operand(t).transpose(1, 2) for t in (q_BSHK, k_BSHK, v_BSHK))
    out_BHSK = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q_BSHK.shape[-1] ** -0.5)
    return out_BHSK.transpose(1, 2)[..., :width].to(v_BSHV.dtype)
