"""Multi-head latent attention (DeepSeek-V3 report, 2.1.1).

Queries, keys and values come from low-rank latents; position lives in a small rotary part of its own, and its key is
one head shared by all:

    c_q = norm(W_qa x)             q = W_qb c_q              = (q_nope, q_rope) a head
    c_kv, k_rope = W_kva x         k_nope, v = W_kvb norm(c_kv)
    o = softmax(causal(q kᵀ / sqrt(N + R))) v                out = W_o o

In generation only norm(c_kv) and the turned k_rope of earlier tokens are kept. Since q_nope · k_nope =
(W_kᵀ q_nope) · c for W_kvb = (W_k, W_v) a head, and the weighted mean of W_v c is W_v of the weighted mean, the heads
attend to the latents themselves, one key and value for all of them, and nothing is expanded a token.

B batch, S sequence, D model, H heads, N head dims without position, R rotary, V value, C key-value latent, L = C + R.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels import attention_core as core_kernels
from model.kernels import calls
from model.kernels import core_inputs as kernels
from model.linear import Linear
from model.norm import RMSNorm
from model.positions import Positions
from model.recompute import Recomputation
from model.rope import rotate

LATENT_NORM_EPS = 1e-6
"""Of the two norms of latents, whatever ``rms_norm_eps`` says: so it is in the released code and in transformers."""


@dataclass
class LatentCache:
    """What generation keeps of one layer: for each token norm(c_kv) and the turned k_rope, and nothing else.
    ``latents_BML`` has room for M tokens, of which the first ``length`` are there."""

    latents_BML: Tensor
    length: int = 0

    @property
    def room(self) -> int:
        return self.latents_BML.shape[1]

    def append(self, latents_BSL: Tensor) -> Tensor:
        """Add S tokens; all that are there, as a view."""
        end = self.length + latents_BSL.shape[1]
        assert end <= self.room, (end, self.room)
        self.latents_BML[:, self.length : end] = latents_BSL
        self.length = end
        return self.latents_BML[:, :end]

    def drop(self, tokens: int) -> None:
        """Forget the last ones."""
        assert 0 <= tokens <= self.length, (tokens, self.length)
        self.length -= tokens


class Attention(nn.Module):
    """[B, S, D] -> [B, S, D], causal; within documents, where ``positions`` keeps them apart. With a ``cache`` the S
    tokens follow those in it, and are added to it."""

    cache: LatentCache | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a = Linear(hidden, config.q_lora_rank)
            self.q_a_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o = Linear(heads * config.v_head_dim, hidden)

    def forward(self, x_BSD: Tensor, positions: Positions, again: Recomputation | None = None) -> Tensor:
        """``again``: what is made again of the layer."""
        c, dtype, again = self.config, x_BSD.dtype, again or Recomputation()
        c_q = x_BSD if c.q_lora_rank is None else again("norm", self.q_a_norm, self.q_a(x_BSD, again))
        latent, k_rope = self.kv_a(x_BSD, again).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        latent = again("norm", self.kv_a_norm, latent)
        if self.cache is not None:
            assert positions.documents_BS is None, "a row that is continued is one document"
            k_rope = rotate(k_rope.unsqueeze(2), positions.rotations).squeeze(2)
            latents_BML = self.cache.append(torch.cat([latent, k_rope], dim=-1))
            q_nope, q_rope = self._queries(c_q, positions, again)
            return self.o(self._attend_latents(q_nope, q_rope, latents_BML).flatten(-2))
        own_core = self._has_own_core(x_BSD, positions)
        q, k, v = again(
            "mla_up",
            lambda q, kv, rope: self._core_inputs(q, kv, rope, positions, own_core, again),
            c_q,
            latent,
            k_rope,
        )
        out_BHSK = again.narrowed(
            "mla_up",
            lambda: attend(q, k, v, c.softmax_scale, positions),
            lambda out: _without_padding(out, c.v_head_dim),
            lambda out_BSHV: F.pad(out_BSHV, (0, c.qk_head_dim - c.v_head_dim)),  # zeros, as values were padded with
        )
        result = core_result if self.o.owner is None else _CoreResult.apply
        out = again("mla_up", lambda out: result(out, c.v_head_dim, dtype).flatten(-2), out_BHSK)
        return self.o(out, again)

    def _has_own_core(self, x: Tensor, positions: Positions) -> bool:
        """Whether a kernel of our own is the core: it has no mask."""
        own = core_kernels.serves(x, self.config.qk_head_dim, self.config.v_head_dim)
        return own and self.o.owner is not None and positions.documents_BS is None

    def _queries(self, c_q: Tensor, positions: Positions, again: Recomputation) -> tuple[Tensor, Tensor]:
        """From their latent, or from the layer's input -> [B, S, H, N], and [B, S, H, R] turned."""
        c = self.config
        q_nope, q_rope = self._up(c_q, again).split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, positions.rotations)

    def _up(self, c_q: Tensor, again: Recomputation) -> Tensor:
        """[B, S, H, N + R], not turned."""
        query: Tensor = (self.q if self.config.q_lora_rank is None else self.q_b)(c_q, again)
        return query.unflatten(-1, (self.config.num_attention_heads, -1))

    def _core_inputs(
        self, c_q: Tensor, latent: Tensor, k_rope: Tensor, positions: Positions, own_core: bool, again: Recomputation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The latents and the shared rotary key [B, S, R] -> what the core reads."""
        c = self.config
        keys_values = self.kv_b(latent, again).unflatten(-1, (c.num_attention_heads, -1))
        if self.kv_b.owner is not None:
            query, turns = self._up(c_q, again), positions.rotations
            return _CoreInputs.apply(query, keys_values, k_rope, turns, c.qk_nope_head_dim, own_core)
        k_nope, v = keys_values.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), positions.rotations).expand(-1, -1, c.num_attention_heads, -1)
        q_BSHK = torch.cat(self._queries(c_q, positions, again), dim=-1)
        return core_inputs(q_BSHK, torch.cat([k_nope, k_rope], dim=-1), v)

    def _attend_latents(self, q_nope: Tensor, q_rope: Tensor, latents_BML: Tensor) -> Tensor:
        """[B, S, H, N], [B, S, H, R] and all M tokens' latents, the S queries' own at the end -> [B, S, H, V]."""
        c = self.config
        w_HXC = self.kv_b.weight.to(q_nope.dtype).unflatten(0, (c.num_attention_heads, -1))
        w_key_HNC, w_value_HVC = w_HXC.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q_BSHL = torch.cat([torch.einsum("bshn,hnc->bshc", q_nope, w_key_HNC), q_rope], dim=-1)
        queries, tokens = q_BSHL.shape[1], latents_BML.shape[1]
        visible_SM = torch.ones(queries, tokens, dtype=torch.bool, device=q_BSHL.device).tril(tokens - queries)
        # The value is the first C numbers of the key: both are the cache itself, and the rest of the sum is dropped.
        shared_B1ML = latents_BML.unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)
        mean_BHSL = F.scaled_dot_product_attention(
            q_BSHL.transpose(1, 2), shared_B1ML, shared_B1ML, attn_mask=visible_SM, scale=c.softmax_scale
        )
        return torch.einsum("bhsc,hvc->bshv", mean_BHSL[..., : c.kv_lora_rank], w_value_HVC)


def attend(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, scale: float | None = None, positions: Positions | None = None
) -> Tensor:
    """Causal attention core, from ``core_inputs``; within documents, where ``positions`` keeps them apart. ``scale``
    multiplies the logits, None is the inverse root of K. What ``model.kernels.attention_core`` serves it computes, and
    there values are as wide as they are."""
    mask = None if positions is None else positions.mask(q_BHSK.dtype)
    if mask is None and core_kernels.serves(q_BHSK, q_BHSK.shape[-1], v_BHSK.shape[-1]):
        out: Tensor = _Core.apply(q_BHSK, k_BHSK, v_BHSK, q_BHSK.shape[-1] ** -0.5 if scale is None else scale)
        return out
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=mask is None, scale=scale)


def core_inputs(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, S, K] as the core reads them. Values are padded to the width of the keys: fused
    kernels want one head size, and an unfused core would hold all S x S scores."""
    width = v_BSHV.shape[-1]
    v_BSHK = F.pad(v_BSHV, (0, q_BSHK.shape[-1] - width)) if width < q_BSHK.shape[-1] else v_BSHV
    q, k, v = (t.to(_core_dtype(t)).transpose(1, 2) for t in (q_BSHK, k_BSHK, v_BSHK))
    return q, k, v


def core_result(out_BHSK: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[B, S, H, V] of what the core returned: ``width`` is that of the values without their padding."""
    return out_BHSK.transpose(1, 2)[..., :width].to(dtype)


def _without_padding(out_BHSK: Tensor, width: int) -> Tensor | None:
    """[B, S, H, V]; None where there is no padding, or what padding it again gives would lie otherwise in memory, as
    after an unfused core."""
    padded = width < out_BHSK.shape[-1] and out_BHSK.transpose(1, 2).is_contiguous()
    return core_result(out_BHSK, width, out_BHSK.dtype).contiguous() if padded else None


class _CoreInputs(torch.autograd.Function):
    """The same from the projections' outputs, and each tensor written once: queries [B, S, H, N + R], keys without
    position and values [B, S, H, N + V], the shared key [B, S, R], none of them turned -> [B, H, S, K] three times.
    For our own core in BF16 and without padding: the last [B, H, S, V]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys_values: Tensor, k_rope: Tensor, turns: Tensor, nope: int, own_core: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = keys_values.shape[-1] - nope
        dtype, width = (query.dtype, values) if own_core else (_core_dtype(query), max(values, query.shape[-1]))
        ctx.nope, ctx.values, ctx.turns, ctx.dtype = nope, values, turns, query.dtype
        ctx.by_kernel = calls.serves(query)
        if ctx.by_kernel:
            q, k, v = kernels.forward(query, keys_values, k_rope, turns, nope, width, dtype)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = (query.new_empty(query.shape, dtype=dtype) for _ in range(2))
        v = q.new_empty(*q.shape[:-1], width)
        q[..., :nope] = query[..., :nope]
        q[..., nope:] = rotate(query[..., nope:], turns)
        k[..., :nope] = keys_values[..., :nope]
        k[..., nope:] = rotate(k_rope.unsqueeze(2), turns)
        v[..., :values] = keys_values[..., nope:]
        v[..., values:].zero_()
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gq, gk, gv = (g.transpose(1, 2) for g in grads)
        nope, turned_back = ctx.nope, ctx.turns.conj()
        if ctx.by_kernel:
            return *kernels.backward(gq, gk, gv, ctx.turns, nope, ctx.values), None, None, None
        gquery = torch.empty(gq.shape, dtype=ctx.dtype, device=gq.device)
        gquery[..., :nope] = gq[..., :nope]
        gquery[..., nope:] = rotate(gq[..., nope:], turned_back)
        gkeys_values = gquery.new_empty(*gq.shape[:-1], nope + ctx.values)
        gkeys_values[..., :nope] = gk[..., :nope]
        gkeys_values[..., nope:] = gv[..., : ctx.values]
        gk_rope = rotate(gk[..., nope:].sum(2, keepdim=True), turned_back)
        return gquery, gkeys_values, gk_rope.squeeze(2).to(ctx.dtype), None, None, None


class _Core(torch.autograd.Function):
    """``attend`` by our own kernel: [B, H, S, K] twice and [B, H, S, V] -> [B, H, S, V]."""

    @staticmethod
    def forward(ctx: Any, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        q, k, v = (of.transpose(1, 2) for of in (q_BHSK, k_BHSK, v_BHSV))
        out_BSHV, log_sums = core_kernels.forward(q, k, v, scale)
        out_BHSV = out_BSHV.transpose(1, 2)
        ctx.save_for_backward(q_BHSK, k_BHSK, v_BHSV, out_BHSV, log_sums)
        return out_BHSV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *read, log_sums = ctx.saved_tensors
        q, k, v, out, g = (of.transpose(1, 2) for of in (*read, *grads))
        gq, gk, gv = core_kernels.backward(q, k, v, out, log_sums, g, ctx.scale)
        return gq.transpose(1, 2), gk.transpose(1, 2), gv.transpose(1, 2), None


class _CoreResult(torch.autograd.Function):
    """``core_result``, whose gradient is written once."""

    @staticmethod
    def forward(ctx: Any, out_BHSK: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        ctx.like = out_BHSK.shape[-1], out_BHSK.dtype
        return core_result(out_BHSK, width, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_BSHV,), (width, dtype) = grads, ctx.like
        g_BSHK = g_BSHV.new_empty((*g_BSHV.shape[:-1], width), dtype=dtype)
        g_BSHK[..., : g_BSHV.shape[-1]] = g_BSHV
        g_BSHK[..., g_BSHV.shape[-1] :].zero_()
        return g_BSHK.transpose(1, 2), None, None


def _core_dtype(x: Tensor) -> torch.dtype:
    """FP32 instead of BF16 where the core is faster so."""
    return torch.float32 if x.dtype == torch.bfloat16 and _slow_bf16_core(x.device.type) else x.dtype


@cache
def _slow_bf16_core(device_type: str) -> bool:
    """A CPU's fused core is faster in FP32 than in BF16, by a third with AVX512_BF16, but for AMX."""
    return device_type == "cpu" and not torch.cpu._is_amx_tile_supported()
