"""What FP8 and BF16 hold is what the table in docs/fp8.md predicts."""

from pathlib import Path

import pytest

from benchmarks.fp8_storage import CONFIG, held_bytes, kept_bytes, main
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


@pytest.mark.parametrize("config,message", [("configs/deepseek-v3.yaml", "fewer model."), ("none.yaml", "none.yaml")])
def test_what_cannot_be_measured_is_one_line(config: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(Path(__file__).parents[2] / config)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
