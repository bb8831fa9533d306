"""Continue a row of tokens, one at a time, from a cache of latents.

Kept are, a token and a layer, the ``kv_lora_rank`` numbers of the key-value latent and the ``qk_rope_head_dim`` of the
shared rotary key (``model/attention.py``).

B batch, S sequence, M room for tokens, L = C + R numbers of a latent, D model, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.attention import LatentCache
from model.block import Block
from model.exchange import LocalExchange
from model.positions import Positions
from model.transformer import Transformer


@contextmanager
def latent_caches(model: Transformer, batch: int, room: int, mtp: bool = False) -> Iterator[list[LatentCache]]:
    """Give every layer an empty cache with room for ``room`` tokens; inside, ``features_of`` takes new tokens only.
    ``mtp``: the multi-token-prediction module's block too, as the last."""
    assert model.head is not None
    c, like = model.config, model.head.weight
    caches = []
    for block in _cached(model, mtp):
        latents_BML = like.new_empty(batch, room, c.kv_lora_rank + c.qk_rope_head_dim)
        block.attn.cache = LatentCache(latents_BML)
        caches.append(block.attn.cache)
    try:
        yield caches
    finally:
        for _, block in model.blocks():
            block.attn.cache = None


def bytes_a_token(model: Transformer, mtp: bool = False) -> int:
    """Memory that room for one more token takes at most: its latents in every cache, and RoPE's turns, a complex64 a
    pair and, while they are made (``model/rope.py``), a complex128 and two float64 beside it."""
    assert model.head is not None
    c = model.config
    latents = len(_cached(model, mtp)) * (c.kv_lora_rank + c.qk_rope_head_dim)
    return latents * model.head.weight.element_size() + c.qk_rope_head_dim // 2 * (8 + 16 + 8 + 8)


def _cached(model: Transformer, mtp: bool) -> list[Block]:
    return [block for _, block in (model.blocks() if mtp else model.main_blocks())]


@torch.no_grad()
def features_of(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """What the head reads, [B, S, D], for tokens at the beginning or, inside ``latent_caches``, for those that follow
    what is in the caches. ``model`` is whole."""
    assert model.embed is not None and model.norm is not None
    exchange = LocalExchange(model.config.n_routed_experts)
    length = tokens_BS.shape[1]
    cache = next(block.attn.cache for _, block in model.main_blocks())
    start, room = (0, length) if cache is None else (cache.length, cache.room)
    positions = Positions(model.rotations(room, tokens_BS.device)[start : start + length])
    x_BSD = model.embed(tokens_BS)
    for _, block in model.main_blocks():
        x_BSD, _ = block(x_BSD, positions, exchange)
    features_BSD: Tensor = model.norm(x_BSD)
    return features_BSD


@torch.no_grad()
def generate(
    model: Transformer, prompt: list[int], count: int, temperature: float, seed: int, end: int
) -> Iterator[int]:
    """Up to ``count`` tokens after ``prompt``, which has at least one; ``end`` is the last if it comes. Draws are from
    a generator seeded with ``seed``."""
    assert prompt and model.head is not None
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    new_BS = torch.tensor([prompt], device=device)
    with latent_caches(model, 1, len(prompt) + count):
        for _ in range(count):
            logits_V = model.head(features_of(model, new_BS)[:, -1])[0].cpu()
            token = choose(logits_V, temperature, generator)
            yield token
            if token == end:
                return
            new_BS = torch.tensor([[token]], device=device)


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """At temperature 0 the most probable token, of equal ones the first; otherwise a draw from the softmax of logits
    over temperature, in FP64, in which the smallest temperatures are not 0 yet."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double()
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / temperature, 0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
