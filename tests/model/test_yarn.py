"""YaRN by its definition; that it is the one of transformers is for test_transformers_parity to say."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig, Yarn
from model.rope import rotations, stretch
from tests.model.tiny import tiny

YARN = Yarn(factor=40.0, original_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
THETA = 10000.0


def frequencies(dims: int) -> torch.Tensor:
    return THETA ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 64), st.floats(1, 200), st.integers(8, 10**6), st.floats(0.1, 5), st.floats(1.01, 50))
def test_a_frequency_is_kept_slowed_or_between(
    pairs: int, factor: float, length: int, beta_slow: float, ratio: float
) -> None:
    yarn = replace(YARN, factor=factor, original_length=length, beta_slow=beta_slow, beta_fast=beta_slow * ratio)
    before = frequencies(2 * pairs)
    after = stretch(before, THETA, yarn)
    assert (after <= before * (1 + 1e-12)).all() and (after >= before / factor * (1 - 1e-12)).all()
    share = after / before
    assert (share[1:] <= share[:-1] * (1 + 1e-12)).all(), "the slower a pair turns, the more it is stretched"


def test_fast_pairs_are_kept_and_slow_ones_divided() -> None:
    before = frequencies(64)
    after = stretch(before, THETA, YARN)
    turns = before * YARN.original_length / (2 * math.pi)
    # The boundaries are whole pairs, one further out at most.
    kept, slowed = turns > YARN.beta_fast * THETA ** (1 / 32), turns < YARN.beta_slow / THETA ** (1 / 32)
    assert kept.sum() >= 10 and slowed.sum() >= 8
    torch.testing.assert_close(after[kept], before[kept], rtol=1e-12, atol=0)
    torch.testing.assert_close(after[slowed], before[slowed] / 40, rtol=1e-12, atol=0)
    blended = ~kept & ~slowed
    assert ((after < before) & (after > before / 40))[blended].sum() >= 10


def test_the_scale_of_rotations_is_their_length() -> None:
    yarn = replace(YARN, mscale=2.0, mscale_all_dim=0.5)
    want = (0.2 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    torch.testing.assert_close(rotations(5, 8, THETA, yarn=yarn).abs(), torch.full((5, 4), want))


def test_the_released_model_has_the_softmax_scale_of_the_report() -> None:
    assert ModelConfig(yarn_factor=40.0).softmax_scale == pytest.approx(0.1352, abs=5e-5)
    assert ModelConfig().softmax_scale == 192**-0.5


def test_a_factor_of_one_is_no_yarn() -> None:
    assert tiny(yarn_beta_fast=7.0).yarn is None


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"yarn_factor": 0.5}, "model.yarn_factor=0.5 must be at least 1"),
        ({"yarn_beta_slow": 40.0}, "model.yarn_beta_slow=40.0 must be above 0 and below model.yarn_beta_fast"),
        ({"yarn_mscale": -1.0}, "model.yarn_mscale=-1.0 must not be negative"),
        ({"original_max_position_embeddings": 0}, "model.original_max_position_embeddings=0 must be at least 1"),
    ],
)
def test_constants_that_cannot_be_are_named(values: dict[str, float], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        tiny(**values)
