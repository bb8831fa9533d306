"""What the dispatch benchmark counts without processes."""

import torch

from benchmarks.dispatch import copies
from benchmarks.dispatch_ranks import FP8_ROW_BYTES, MODEL
from model.fp8 import payload


def test_a_token_crosses_to_half_as_many_nodes_as_experts() -> None:
    """DeepSeek-V3: 256 experts, 8 a token on at most 4 of 8 nodes. A node is the own one of a token in 8."""
    found = copies()
    assert 6.98 < found["once an expert"] < 7.02
    assert 3.4 < found["once a node (hierarchical)"] <= 3.5
    assert found["once a node (hierarchical)"] < found["once a rank (flat)"] < found["once an expert"]


def test_an_fp8_row_is_its_numbers_and_a_scale_for_every_128() -> None:
    assert FP8_ROW_BYTES == payload.pack(torch.randn(1, MODEL.hidden_size)).shape[1] == 7392
