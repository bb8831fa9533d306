"""Which steps are bad, and which data are left out for it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bad_steps import LEAST, WINDOW, SkippedBatches, SpikeRule, read_found, usual_losses, write_found
from launch.config import ConfigError

losses = st.lists(st.floats(min_value=0.1, max_value=20), min_size=LEAST, max_size=2 * WINDOW)


@given(losses, st.floats(min_value=1, max_value=100), st.floats(min_value=21, max_value=1e6))
def test_a_spike_is_judged_by_recent_steps_and_moves_the_rule_little(
    losses: list[float], factor: float, outlier: float
) -> None:
    rule, recent = SpikeRule(factor, losses), sorted(losses[-WINDOW:])
    assert recent[len(recent) // 2 - 1 + len(recent) % 2] <= rule.limit < math.inf
    again = SpikeRule(factor)
    for loss in losses:
        again.add(loss)
    assert again.limit == rule.limit
    before = rule.limit
    rule.add(outlier)
    assert rule.limit <= before + factor * 2 * 20 + 20  # whatever its size


def test_the_rule_as_it_is_stated() -> None:
    rule = SpikeRule(3.0, [2.0, 2.1, 1.9, 2.2, 1.8])
    assert rule.limit == pytest.approx(2.0 + 3 * 1.4826 * 0.1)
    assert SpikeRule(3.0, [2.0] * 5).limit == pytest.approx(2.0 + 3 * 0.01 * 2.0)
    assert SpikeRule(3.0, [2.0] * (LEAST - 1)).limit == SpikeRule(0.0, [2.0] * 50).limit == math.inf


@given(
    st.integers(1, 9),
    st.sets(st.integers(0, 20)),
    st.sets(st.integers(0, 20)),
    st.integers(0, 12),
)
def test_a_bad_batch_is_left_out_as_if_that_had_been_planned(
    size: int, planned: set[int], bad: set[int], steps: int
) -> None:
    """Batches are numbered; those that turn out to be bad are found on the way, or were known before."""

    def taken(skipped: SkippedBatches, found_bad: set[int]) -> list[int]:
        position, batches = 0, []
        while len(batches) < steps:
            start = skipped.next_batch(position, size)
            assert start % size == 0
            if start // size in found_bad:
                skipped.add(start)
                continue
            batches.append(start // size)
            position = start + size
        return batches

    inside = {batch * size + batch % size for batch in planned}  # any place in the batch
    found = taken(SkippedBatches(inside), bad)
    assert found == taken(SkippedBatches({*inside, *(batch * size for batch in bad)}), set())
    assert found == [batch for batch in range(50) if batch not in planned | bad][:steps]


def test_what_was_found_outlives_the_process(tmp_path: Path) -> None:
    file = tmp_path / "skipped.json"
    assert read_found(file) == []
    skipped = SkippedBatches([8], read_found(file))
    skipped.add(24)
    write_found(file, skipped)
    assert read_found(file) == [24]
    lists = (
        '{"first_sequences": [-1]}',
        '{"first_sequences": 3}',
        '{"first_sequences": {}}',
        '{"first_sequences": ""}',
    )
    for damaged in ("{", "[]", "[" * 100000, *lists):
        file.write_text(damaged)
        with pytest.raises(ConfigError, match=r"damaged .*skipped\.json"):
            read_found(file)


def test_the_rule_goes_on_from_the_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, "cross_entropy": n / 3}) + "\n" for n in range(1, 100)))
    assert usual_losses(file, 50) == [n / 3 for n in range(51 - WINDOW, 51)]
    assert usual_losses(tmp_path / "none", 0) == []


def test_a_line_without_a_loss_says_nothing_about_what_is_usual(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    others = [{}, *({"cross_entropy": value} for value in (None, "2.5", True, [2.5], 10**400, math.nan, math.inf))]
    lines = [*others, {"cross_entropy": 2.5}, {"cross_entropy": 3}]
    file.write_text("".join(json.dumps({"step": n, **line}) + "\n" for n, line in enumerate(lines, 1)))
    assert usual_losses(file, len(lines)) == [2.5, 3.0]
