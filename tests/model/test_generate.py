"""Generation from latents is the model itself: the same logits, from a cache of C + R numbers a token and layer."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.generate import choose, features_of, generate, latent_caches
from model.transformer import Transformer, initialise
from tests.model.tiny import tiny

CASES = {
    "latent queries": tiny(),
    "direct queries": tiny(q_lora_rank=None, v_head_dim=20),
    "yarn": tiny(original_max_position_embeddings=8, yarn_factor=4.0, yarn_mscale=2.0),
}
NONE = -1
"""An end of document that no token is."""


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialise(model, 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name and parameter.ndim > 1:
                parameter.mul_(5)  # so that attention is not uniform
    return model


MODELS = {name: build(config) for name, config in CASES.items()}


@torch.no_grad()
def recomputed(model: Transformer, tokens: Tensor) -> Tensor:
    assert model.head is not None
    logits: Tensor = model.head(features_of(model, tokens))
    return logits


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(list(CASES)), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 2**31))
def test_logits_are_those_of_a_pass_without_a_cache(case: str, parts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = MODELS[case]
    tokens = torch.randint(model.config.vocab_size, (2, sum(parts)))
    with latent_caches(model, 2, sum(parts) + 3):
        got = torch.cat([recomputed(model, part) for part in tokens.split(parts, dim=1)], dim=1)
    want = recomputed(model, tokens)
    # Absorbing W_kvb sums the same products in another order, a few hundred of them: some tens of FP32's roundings.
    assert (got - want).norm() / want.norm() < 1e-5


def test_the_pass_without_a_cache_is_the_model_that_is_trained() -> None:
    model, tokens = MODELS["yarn"], torch.randint(40, (2, 13))
    logits = recomputed(model, tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:]).cross_entropy.item(), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_nothing_but_latents_and_rotary_keys_is_kept(case: str) -> None:
    model = MODELS[case]
    c, expanded = model.config, 0

    def count(*_: object) -> None:
        nonlocal expanded
        expanded += 1

    hooks = [block.attn.kv_b.register_forward_hook(count) for _, block in model.blocks()]
    with latent_caches(model, 3, 11) as caches:
        recomputed(model, torch.zeros(3, 7, dtype=torch.int64))
        recomputed(model, torch.zeros(3, 1, dtype=torch.int64))
        kept = [tensor for cache in caches for tensor in vars(cache).values() if isinstance(tensor, Tensor)]
        tensors = sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept)
        assert tensors == c.num_hidden_layers * 3 * 11 * (c.kv_lora_rank + c.qk_rope_head_dim)
        assert [cache.length for cache in caches] == [8] * c.num_hidden_layers
    for hook in hooks:
        hook.remove()
    assert expanded == 0, "keys and values were made for tokens, which the absorbed product is there to spare"
    assert all(block.attn.cache is None for _, block in model.blocks())


def continuation(prompt: list[int], count: int, temperature: float = 0.0, seed: int = 0, end: int = NONE) -> list[int]:
    tokens: Iterator[int] = generate(MODELS["latent queries"], prompt, count, temperature, seed, end)
    return list(tokens)


def test_greedy_takes_the_best_token_of_a_recomputed_pass() -> None:
    row = [3, 1, 4]
    for _ in range(12):
        row.append(int(recomputed(MODELS["latent queries"], torch.tensor([row]))[0, -1].argmax()))
    assert continuation([3, 1, 4], 12) == row[3:]


def test_it_stops_after_the_end_of_a_document() -> None:
    tokens = continuation([3, 1, 4], 12)
    end = tokens[5]
    assert continuation([3, 1, 4], 12, end=end) == tokens[: tokens.index(end) + 1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20, generator=generator)
    draws = torch.tensor([choose(logits, temperature, generator) for _ in range(4000)])
    found, want = torch.bincount(draws, minlength=20) / 4000, torch.softmax(logits / temperature, 0)
    # The largest deviation of a share of 4000 draws is 0.008; five of them.
    assert (found - want).abs().max() < 0.04


def test_a_seed_repeats_its_draws() -> None:
    assert continuation([7], 9, 1.0, seed=1) == continuation([7], 9, 1.0, seed=1)
    assert continuation([7], 9, 1.0, seed=1) != continuation([7], 9, 1.0, seed=2)


def test_a_temperature_near_zero_is_greedy() -> None:
    assert continuation([7], 9, 1e-300) == continuation([7], 9)
