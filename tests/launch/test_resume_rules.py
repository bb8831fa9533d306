"""What a run may change between two starts, and what would make it another run."""

import re
from pathlib import Path

import pytest

from launch.resume_rules import resume_differences
from tests.launch.test_config import MINIMAL, loads


@pytest.mark.parametrize(
    ("override", "fixed"),
    [
        ("model.hidden_size=128", True),
        ("model.q_lora_rank=null", True),
        ("train.seed=9", True),
        ("train.sequence_length=4", True),
        ("data.validation_fraction=0.2", True),
        ("data.source=elsewhere", False),
        ("data.validation_sequences=1", False),
        ("train.steps=99", False),
        ("layout.data=2", False),
        ("optimizer.learning_rate=1e-5", False),
        ("checkpoint.every=1", False),
        ("train.micro_batch_size=2", False),
        ("precision.compute=fp8", True),
        ("precision.compute=fp32", True),
        ("precision.backend=reference", False),
    ],
)
def test_a_resumed_run_keeps_its_model_seed_and_data(tmp_path: Path, override: str, fixed: bool) -> None:
    old, new = loads(tmp_path, MINIMAL), loads(tmp_path, MINIMAL, override)
    refused, recorded = resume_differences(old, new)
    lines, others = (refused, recorded) if fixed else (recorded, refused)
    assert others == []
    assert len(lines) == 1 and lines[0].startswith(f"{override.partition('=')[0]}: run has ")
    assert resume_differences(old, old) == ([], [])


IN_TOKENS = "phases.learning_rate=[{until: 64 tokens, end: 2.2e-4}, {end: 1.0e-4}]"
IN_STEPS = "phases.learning_rate=[{until: 2 steps, end: 2.2e-4}, {end: 1.0e-4}]"


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        (
            IN_TOKENS,
            ["train.global_batch_size=8"],
            r"train\.global_batch_size: run has 4, given 8, which must stay: phases",
        ),
        (IN_TOKENS, ["phases.batch_multiple=2"], r"phases\.batch_multiple: run has 1, given 2, which must stay"),
        (IN_TOKENS, ["phases.global_batch_size=[{end: 4}]"], r"phases\.global_batch_size: .* must stay"),
        (IN_TOKENS, ["train.global_batch_size=8", IN_STEPS], r"train\.global_batch_size: .* must stay"),
        (IN_STEPS, [IN_TOKENS], r"phases\.learning_rate: run has .* which must not count tokens: the run did not from"),
        (IN_TOKENS, [IN_STEPS], None),
        (IN_TOKENS, ["train.steps=20", "layout.data=2"], None),
        (IN_TOKENS, [IN_TOKENS.replace("64", "96")], None),
        (IN_STEPS, ["train.global_batch_size=8", "phases.batch_multiple=2"], None),
        (IN_STEPS, ["phases.global_batch_size=[{until: 3 steps, end: 2}, {end: 4}]"], None),
    ],
)
def test_past_batches_keep_their_size_where_phases_count_tokens(
    tmp_path: Path, before: str, after: list[str], refused: str | None
) -> None:
    overrides = ("optimizer.warmup_steps=0", before)
    old, new = loads(tmp_path, MINIMAL, *overrides), loads(tmp_path, MINIMAL, *overrides, *after)
    lines, _ = resume_differences(old, new)
    assert (refused is None and not lines) or (refused is not None and len(lines) == 1 and re.match(refused, lines[0]))


def test_a_difference_names_both_values(tmp_path: Path) -> None:
    old, new = loads(tmp_path, MINIMAL), loads(tmp_path, MINIMAL, "model.hidden_size=128")
    assert resume_differences(old, new)[0] == ["model.hidden_size: run has 7168, given 128"]


def test_what_is_recomputed_may_change(tmp_path: Path) -> None:
    some, full = (loads(tmp_path, MINIMAL, f"model.recompute={value}") for value in ("[norm, mla_up]", "full"))
    refused, recorded = resume_differences(some, full)
    assert refused == [] and recorded == ["model.recompute: run has [norm, mla_up], given 'full'"]
