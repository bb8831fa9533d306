"""Drafts change how many passes a text takes and nothing of the text."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import speculative
from model.attention import LatentCache
from model.generate import generate
from model.speculative import DraftCounts, generate_speculatively
from model.transformer import Transformer, initialise
from tests.model.tiny import tiny

NONE = -1
"""An end of document that no token is."""


def trained() -> Transformer:
    """A model that knows a rule well and its exceptions badly, so that drafts are right and wrong."""
    torch.manual_seed(0)
    model = Transformer(tiny(num_nextn_predict_layers=1))
    initialise(model, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(30):
        starts = torch.randint(40, (16, 1))
        rows = (starts + torch.arange(13) ** 2) % 37
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        ((loss.cross_entropy + 0.3 * loss.mtp) / rows.numel()).backward()
        optimizer.step()
    return model


MODEL = trained()


def drafted(prompt: list[int], count: int, end: int = NONE) -> tuple[list[int], DraftCounts]:
    counts = DraftCounts()
    return list(generate_speculatively(MODEL, prompt, count, end, counts)), counts


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=9), st.integers(1, 25))
def test_the_tokens_are_those_of_greedy_decoding(prompt: list[int], count: int) -> None:
    expected = list(generate(MODEL, prompt, count, 0.0, 0, NONE))
    with patch.object(speculative, "_draft", wraps=speculative._draft) as draft:
        tokens, counts = drafted(prompt, count)
    assert tokens == expected and draft.call_count == counts.drafted
    assert counts.tokens == count and counts.accepted <= counts.drafted <= counts.passes
    # A pass gives a token, and one more for each draft that was right; the first is the prompt's.
    assert count == counts.passes + counts.accepted
    for end in expected[:: max(1, count // 3)]:
        assert drafted(prompt, count, end)[0] == expected[: expected.index(end) + 1]


def test_drafts_of_both_kinds_were_among_them() -> None:
    counts = drafted([3, 4, 7], 60)[1]
    assert 0 < counts.accepted < counts.drafted
    assert counts.tokens_per_step == pytest.approx(60 / (60 - counts.accepted))


@pytest.mark.parametrize("right", [True, False])
def test_drafts_that_are_always_right_halve_the_passes_and_wrong_ones_cost_none(right: bool) -> None:
    row = [3, 4, 7, *generate(MODEL, [3, 4, 7], 20, 0.0, 0, NONE), 0]

    def oracle(model: object, cache: LatentCache, features: torch.Tensor, following: list[int]) -> int:
        cache.length += len(following)
        return row[cache.length + 1] if right else (row[cache.length + 1] + 1) % 40

    with patch.object(speculative, "_draft", oracle):
        tokens, counts = drafted([3, 4, 7], 20)
    assert tokens == row[3:-1]
    assert counts.passes == (11 if right else 20)


def test_the_module_keeps_latents_and_nothing_else() -> None:
    c = MODEL.config
    kept: list[LatentCache] = []
    for _, block in MODEL.blocks():
        block.register_forward_hook(lambda block, *_: kept.append(block.attn.cache))
    tokens = drafted([3, 4, 7], 20)[0]
    caches = list({id(cache): cache for cache in kept}.values())
    assert len(caches) == c.num_hidden_layers + 1 and len(tokens) == 20
    numbers = sum(cache.latents_BML.untyped_storage().nbytes() // 4 for cache in caches)
    assert numbers == (c.num_hidden_layers + 1) * (3 + 20) * (c.kv_lora_rank + c.qk_rope_head_dim)
    assert all(block.attn.cache is None for _, block in MODEL.blocks())
