"""RoPE: adjacent pairs turned by position · theta^(-2i/R), so that a product of two depends on their distance only."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.rope import rotate, rotations

THETA = 10000.0
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), seeds)
def test_adjacent_pairs_are_turned(length: int, pairs: int, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, length, heads, 2 * pairs)
    turned = rotate(x, rotations(length, 2 * pairs, THETA))
    assert turned.shape == x.shape
    for position in range(length):
        for i in range(pairs):
            angle = position * THETA ** (-2 * i / (2 * pairs))
            a, b = x[:, position, :, 2 * i], x[:, position, :, 2 * i + 1]
            first, second = turned[:, position, :, 2 * i], turned[:, position, :, 2 * i + 1]
            torch.testing.assert_close(first, a * math.cos(angle) - b * math.sin(angle), rtol=0, atol=1e-5)
            torch.testing.assert_close(second, a * math.sin(angle) + b * math.cos(angle), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), seeds)
def test_a_score_depends_on_the_distance_only(query: int, key: int, shift: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(8), torch.randn(8)
    turns = rotations(81, 8, THETA)

    def score(m: int, n: int) -> float:
        at_m = rotate(q.expand(1, 81, 1, 8), turns)[0, m, 0]
        at_n = rotate(k.expand(1, 81, 1, 8), turns)[0, n, 0]
        return (at_m @ at_n).item()

    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=1e-5)


def test_another_distance_is_another_score() -> None:
    x = torch.ones(1, 9, 1, 8)
    turned = rotate(x, rotations(9, 8, THETA))[0, :, 0]
    scores = turned @ turned[0]
    assert len({round(s, 3) for s in scores.tolist()}) == 9


def test_a_long_context_keeps_its_angles() -> None:
    # In FP32 the angle itself would be off by 0.008 at this position.
    position, dims = 131071, 64
    turns = rotations(position + 1, dims, THETA)
    for i in range(dims // 2):
        angle = position * THETA ** (-2 * i / dims)
        assert turns[position, i].real.item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert turns[position, i].imag.item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_bf16_is_turned_in_fp32_and_rounded_once() -> None:
    x = torch.randn(2, 50, 3, 8).bfloat16()
    turns = rotations(50, 8, THETA)
    turned = rotate(x, turns)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float(), rotate(x.float(), turns), rtol=2.0**-8, atol=0)
