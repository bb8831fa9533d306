"""What FP8 and BF16 hold is what the table in docs/fp8.md predicts."""

import pytest

from benchmarks.fp8_storage import CONFIG, held_bytes, kept_bytes
from launch.config import load

WIDTHS = "hidden_size=200 v_head_dim=50 intermediate_size=136 moe_intermediate_size=72 num_hidden_layers=4".split()
WIDTHS += "n_routed_experts=4 n_group=2 topk_group=1 num_experts_per_tok=2".split()


def test_what_is_held_is_what_is_predicted() -> None:
    config = load(CONFIG, [f"model.{width}" for width in WIDTHS])  # tiles that end early
    for row in kept_bytes(config.model):
        for precision in ("bf16", "fp8"):
            assert row[precision] == row["predicted"][precision], row
        assert row["fp8"] < 0.8 * row["bf16"]
    for row in held_bytes(config):
        for precision in ("bf16", "fp8"):  # buckets are padded
            assert row[precision] == pytest.approx(row["predicted"][precision], rel=1e-3)
